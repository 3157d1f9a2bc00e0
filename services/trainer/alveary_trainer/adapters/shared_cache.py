"""Folders by digest, shared by all trainers of a machine; the least recently used go when there is too much.

Locks are flock(2) on small files beside the folders: they go with the process that holds them, kill -9 included. A
folder that is in use is held shared; it is made under an exclusive lock of its own, so once however many ask; it is
evicted only under an exclusive lock, so never from under a run. Lock files stay: removing them would let two
processes hold "the same" lock.

A run may change what it is given, where trainers run as root: so a folder is compared with what was put into it before
each use (`fingerprint.py`), and one that has changed is set aside and made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from alveary_trainer.adapters.fingerprint import Change, Fingerprint, change_of

# make(part, final): fill `part`, which becomes `final`.
Make = Callable[[Path, Path], Awaitable[None]]
# Told of a folder that has changed, before it is made anew.
Changed = Callable[[Change], Awaitable[None]]
_ASIDE = ".changed-"
_POLL = 0.02


class SharedCache:
    """One folder of folders, at most about `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int, *, strict: bool = True) -> None:
        """`strict`: see Fingerprint.of."""
        self._folder, self._limit, self._strict = folder, limit, strict
        self._locks = folder / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    @contextlib.asynccontextmanager
    async def use(self, name: str, make: Make, changed: Changed | None = None) -> AsyncIterator[Path]:
        """The folder `name`, made where it is not there or was changed; it stays as long as this context does.

        Raises:
            Whatever `make` raises; nothing is left of the attempt.
        """
        async with self._lock(name, fcntl.LOCK_SH) as mark:
            final = self._folder / name
            if not final.exists() or (await asyncio.to_thread(self._change, final)) is not None:
                async with self._lock(f"{name}.make", fcntl.LOCK_EX):
                    # Another may have made it anew meanwhile.
                    if final.exists() and (change := await asyncio.to_thread(self._change, final)):
                        if changed is not None:
                            await changed(change)
                        await asyncio.to_thread(self._discard, final, mark)
                    if not final.exists():
                        size = await self._make(name, final, make)
                        os.pwrite(mark, f"{size:020}".encode(), 0)
                        await asyncio.to_thread(self._evict)
            os.utime(mark)
            yield final

    async def _make(self, name: str, final: Path, make: Make) -> int:
        part = self._folder / f".part-{name}"
        await asyncio.to_thread(remove_tree, part)  # of one that was killed
        part.mkdir()
        try:
            await make(part, final)
            size = await asyncio.to_thread(size_of, part)
            # First: a folder without its record would be made anew, a record without its folder is never looked at.
            (await asyncio.to_thread(Fingerprint.of, part, strict=self._strict)).save(self._record(final))
            part.rename(final)
            return size
        finally:
            await asyncio.to_thread(remove_tree, part)

    def _record(self, final: Path) -> Path:
        return self._locks / f"{final.name}.record"

    def _change(self, final: Path) -> Change | None:
        return change_of(final, Fingerprint.load(self._record(final)), strict=self._strict)

    def _discard(self, final: Path, mark: int) -> None:
        """Take a folder out of use. Runs that have it open keep it: it is removed once nobody uses the name any more."""
        aside = final.with_name(f"{_ASIDE}{final.name}-{secrets.token_hex(4)}")
        final.rename(aside)
        # Alone with it? Converting drops the lock for a moment (flock(2)), in which nobody finds anything under the name.
        if _try(mark, fcntl.LOCK_EX):
            remove_tree(aside)
        fcntl.flock(mark, fcntl.LOCK_SH)

    @contextlib.asynccontextmanager
    async def _lock(self, name: str, kind: int) -> AsyncIterator[int]:
        # Waiting ends: whoever holds it makes one folder, or removes one, or dies; and the run that waits can be cancelled.
        mark = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try(mark, kind):
                await asyncio.sleep(_POLL)
            yield mark
        finally:
            os.close(mark)

    def _evict(self) -> None:
        found = []
        for folder in self._folder.iterdir():
            mark = self._locks / folder.name
            if folder.name.startswith(_ASIDE):
                with self._exclusive(folder.name.removeprefix(_ASIDE).rpartition("-")[0]) as got:
                    if got:
                        remove_tree(folder)
            if folder.name.startswith("."):
                continue
            text = mark.read_text() if mark.exists() else ""
            size = int(text) if text else size_of(folder)
            found.append((mark.stat().st_mtime if mark.exists() else 0.0, folder.name, size))
        total = sum(size for _, _, size in found)
        for _, name, size in sorted(found):
            if total <= self._limit:
                return
            with self._exclusive(name) as got:
                if not got:
                    continue  # in use
                doomed = self._folder / f".evicted-{name}"
                remove_tree(doomed)
                with contextlib.suppress(FileNotFoundError):  # another trainer was faster
                    (self._folder / name).rename(doomed)
                total -= size
            remove_tree(doomed)

    @contextlib.contextmanager
    def _exclusive(self, name: str) -> Iterator[bool]:
        mark = os.open(self._locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield _try(mark, fcntl.LOCK_EX)
        finally:
            os.close(mark)


def _try(mark: int, kind: int) -> bool:
    try:
        fcntl.flock(mark, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(os.lstat(os.path.join(root, f)).st_size for root, _, files in os.walk(folder) for f in files)


def remove_tree(folder: Path) -> None:
    """Remove a folder with read-only parts; nothing where there is none."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(root, name)):
                os.chmod(os.path.join(root, name), 0o755)
    shutil.rmtree(folder, ignore_errors=True)
