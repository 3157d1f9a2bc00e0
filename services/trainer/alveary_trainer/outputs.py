"""What a run leaves: its ./outputs and ./logs, found, named and stored; of several nodes under names that all agree on.

Walking, hashing and JSON happen on threads: a run may have any number of files of any size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_json
from alveary_core.errors import AlvearyError, Unavailable
from alveary_core.objectstore import DigestMismatch, FileChanged, ObjectStore
from alveary_trainer.adapters.runtime import opened
from alveary_trainer.file_names import shown, stored_name
from alveary_trainer.gang import File, Gang, name_files

T = TypeVar("T")
TOPS = ("outputs", "logs")
# What storing may raise where a run's files cannot be stored.
STORING = (AlvearyError, DigestMismatch, OSError)
_WORKERS = 32
# Files that are reached through symbolic links, in all.
_MOST_LINKED = 100_000
_MOST_REMARKS = 20
# How long storing may stand still, seconds: no byte is sent.
STALLED_SECONDS = 600.0
# A file that changed less long ago than this may change again without looking different, nanoseconds.
_YOUNG = 1_000_000_000
_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Found:
    """A file of ./outputs or ./logs."""

    path: Path
    # Under which it is stored.
    name: str
    # Device, inode, size and times: what two of them have in common is the same content.
    device: int
    inode: int
    size: int
    stamp: _Stamp


@dataclass
class Walk:
    """What there is to store, and what is said about the rest."""

    files: list[Found] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def _stamp(info: os.stat_result) -> _Stamp:
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def walk(folder: Path, tops: Sequence[str], own: Path, below: Path) -> Walk:
    """Files at or below `folder`/<tops>, named relative to `folder`. Blocks.

    Links are followed to files and folders within `own`; what leads elsewhere, cannot be read below `below`, or is no file is
    left out, and said.
    """
    found, names = Walk(), set[str]()
    inside = os.path.realpath(own)
    linked = 0

    def remark(path: str, text: str) -> None:
        found.remarks.append(f"{shown(os.fsencode(os.path.relpath(path, folder)))}: {text}")

    def add(path: str, info: os.stat_result) -> None:
        try:
            with opened(Path(path), below):
                pass
            name, odd = stored_name(os.fsencode(os.path.relpath(path, folder)))
        except (ValueError, OSError) as error:
            remark(path, f"not stored: {getattr(error, 'strerror', None) or error}")
            return
        chosen, tries = name, 1
        while chosen in names:
            tries += 1
            chosen = f"{name}~{tries}"
        names.add(chosen)
        if odd:
            remark(path, f"its name {odd}: stored as {chosen}")
        found.files.append(Found(Path(path), chosen, info.st_dev, info.st_ino, info.st_size, _stamp(info)))

    todo: list[tuple[str, frozenset[tuple[int, int]], bool]] = [(str(folder / top), frozenset(), False) for top in reversed(tops)]
    while todo:
        where, ancestors, through = todo.pop()
        try:
            here = Path(where).stat()
            if stat.S_ISREG(here.st_mode):
                add(where, here)
                continue
            entries = sorted(os.scandir(where), key=lambda e: e.name)
        except OSError as error:
            if where not in {str(folder / top) for top in tops} or os.path.lexists(where):
                remark(where, f"not stored: {error.strerror}")
            continue
        line = ancestors | {(here.st_dev, here.st_ino)}
        deeper = []
        for entry in entries:
            link = entry.is_symlink()
            try:
                info = Path(entry.path).stat()
            except OSError as error:
                remark(entry.path, f"not stored: {'a link that leads nowhere' if link else error.strerror}")
                continue
            if link and not (real := os.path.realpath(entry.path)).startswith(f"{inside}{os.sep}"):
                remark(entry.path, f"not stored: it leads outside the run's own folders, to {shown(os.fsencode(real))}")
                continue
            if link or through:
                linked += 1
                if linked > _MOST_LINKED:
                    remark(entry.path, f"not stored: more than {_MOST_LINKED:,} files are reached through links")
                    return found
            if stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in line:
                    remark(entry.path, "not stored: it leads back to a folder that it is in")
                else:
                    deeper.append((entry.path, line, link or through))
            elif stat.S_ISREG(info.st_mode):
                add(entry.path, info)
            else:
                remark(entry.path, "not stored: it is no file")
        todo += reversed(deeper)
    return found


class OutputStore:
    """Stores the files of one member of an attempt, at runs/<run>/<attempt>/."""

    def __init__(
        self, store: ObjectStore, run_id: str, attempt: int, index: int, code: Path, note: Callable[[str], None], *, count: int = 1
    ) -> None:
        """`code`: the working directory. `index` of `count` members; any but the first has a place of its own until names are agreed on."""
        self._store, self._run_id, self._attempt, self._index, self._count = store, run_id, attempt, index, count
        self._code, self._note = code, note
        # The run's own folders, and below what its files are read; known once its runtime is.
        self.own, self.below = code, code
        # What the script stored itself, by name.
        self.uploaded: dict[str, c.FileEntry] = {}
        self._known: dict[str, tuple[_Stamp, c.FileEntry]] = {}
        self._moved, self._stopped = 0.0, False
        # How far `store_all` has come: what is stored, by its own name, and files of ./outputs and ./logs.
        self.done: dict[str, c.FileEntry] = {}
        self.stored = self.total = 0

    def key(self, name: str) -> str:
        """Key of a file of the attempt."""
        return f"{self._run_id}/{self._attempt}/{name}"

    def _aside(self, name: str) -> str:
        return self.key(f".gang/{self._index}/{name}" if self._index else name)

    @contextlib.asynccontextmanager
    async def _open(self, path: Path) -> AsyncIterator[Path]:
        holder = contextlib.ExitStack()
        try:
            yield await asyncio.to_thread(holder.enter_context, opened(path, self.below))
        finally:
            holder.close()

    def _progress(self, _: int) -> None:
        # On the threads that send: what cannot be cancelled from outside ends here.
        if self._stopped:
            raise InterruptedError("storing was broken off")
        self._moved = time.monotonic()

    def stop(self) -> None:
        """Let what is being sent end after its present part; what is stored stays."""
        self._stopped = True

    async def put(self, path: Path, name: str, final: str = "") -> c.FileEntry:
        """Store a file under its final name; where that is not known yet, any member but the first has a place of its own."""
        async with self._open(path) as readable:
            try:
                entry = await self._store.put_file("runs", self.key(final) if final else self._aside(name), readable, self._progress)
            except FileChanged as error:
                raise FileChanged(f"{name} changed while it was stored") from error
        entry.path = name
        return entry

    async def upload(self, path: Path, name: str, *, unique: bool = False) -> c.FileEntry:
        """Store a file for the script now; `unique`: under a name that it has not used yet, beginning like this one."""
        if unique:
            stem, dot, suffix = name.rpartition(".")
            number = 1
            while name in self.uploaded:
                number += 1
                name = f"{stem}_{number}{dot}{suffix}"
            self.uploaded[name] = c.FileEntry(path=name)  # taken, before others ask meanwhile
        try:
            entry = self.uploaded[name] = await self.put(path, name)
        except BaseException:
            if unique:
                self.uploaded.pop(name, None)
            raise
        return entry

    # ---- storing --------------------------------------------------------------------------------------------------

    async def found(self) -> list[Found]:
        """Files of ./outputs and ./logs; what is left out or renamed is said."""
        result = await asyncio.to_thread(walk, self._code, TOPS, self.own, self.below)
        for text in result.remarks[:_MOST_REMARKS]:
            self._note(text)
        if len(result.remarks) > _MOST_REMARKS:
            self._note(f"{len(result.remarks) - _MOST_REMARKS} more files are not stored, or under other names")
        return result.files

    async def store_all(self, names: Mapping[str, str] | None) -> dict[str, c.FileEntry]:
        """./outputs and ./logs, under the names that were decided (None: their own); returns what is stored, by its own name.

        Raises:
            one of STORING: something cannot be stored, or for STALLED_SECONDS nothing moved.
        """
        files = await self.found()
        if names is not None:
            files = [f for f in files if names.get(f.name)]
        done = self.done = {n: e for n, e in self.uploaded.items() if e.sha256}
        self.stored, self.total = 0, len(files)
        size, begun = sum(f.size for f in files), time.monotonic()
        if files:
            self._note(f"storing {len(files)} files, {size / 1e6:.1f} MB")
        # The same content under two names (links) is sent once.
        first: dict[tuple[int, int], Found] = {}
        again = [f for f in files if first.setdefault((f.device, f.inode), f) is not f]
        said, sent = begun, 0

        async def one(file: Found) -> None:
            nonlocal said, sent
            final = names[file.name] if names is not None else file.name
            known = self._known.get(file.name)
            if known is not None and known[0] == file.stamp and final == file.name:
                entry = known[1]
            else:
                entry = await self.put(file.path, file.name, final)
            done[file.name] = entry
            self.stored, sent, self._moved = self.stored + 1, sent + entry.size, time.monotonic()
            if time.monotonic() - said > 2:
                said = time.monotonic()
                self._note(f"stored {self.stored} of {len(files)} files, {sent / 1e6:.1f} of {size / 1e6:.1f} MB")

        async def copy(file: Found) -> None:
            origin = first[file.device, file.inode].name
            source, final = (names[n] if names is not None else n for n in (origin, file.name))
            await self._store.copy("runs", self.key(final), "runs", self.key(source))
            entry = c.FileEntry()
            entry.CopyFrom(done[origin])
            entry.path = file.name
            done[file.name] = entry
            self.stored, self._moved = self.stored + 1, time.monotonic()

        await self._unstalled(each(list(first.values()), one, _WORKERS))
        await self._unstalled(each(again, copy, _WORKERS))
        # What the script stored itself, under names that are no files of ./outputs and ./logs.
        if names is not None:
            present = {f.name for f in files}
            for own in self.uploaded.keys() - present:
                if names.get(own) and self.key(names[own]) != self._aside(own):
                    await self._store.copy("runs", self.key(names[own]), "runs", self._aside(own))
        return done

    async def _unstalled(self, work: Any) -> None:
        """Do the work, unless nothing moves for too long."""
        task = asyncio.ensure_future(work)
        self._moved = time.monotonic()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=STALLED_SECONDS / 60)
                if not task.done() and time.monotonic() - self._moved > STALLED_SECONDS:
                    raise Unavailable(f"the object store has taken nothing for {STALLED_SECONDS:.0f} s")
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def sync(self, files: Sequence[Found], most: int, still_seconds: float) -> int:
        """Store those of a live run's files that changed, one after another; returns how many.

        A file with more than `most` bytes is stored once it stood still for `still_seconds`.
        """
        count = 0
        for file in files:
            known = self._known.get(file.name)
            age = time.time_ns() - file.stamp[3]
            if (known is not None and known[0] == file.stamp) or (file.size > most and age < still_seconds * 1e9):
                continue
            try:
                entry = await self.put(file.path, file.name)
                now = await asyncio.to_thread(file.path.stat)
            except (OSError, ValueError, FileChanged):
                continue  # it went, or became something else, meanwhile
            count += 1
            if _stamp(now) == file.stamp and age > _YOUNG:
                self._known[file.name] = (file.stamp, entry)
            else:
                # It changed while it was sent: next time, or at the end.
                self._known.pop(file.name, None)
        return count

    # ---- of several nodes -----------------------------------------------------------------------------------------

    async def list_files(self) -> str:
        """Say in the object store which files this member has; returns the digest of what it said."""
        files = await self.found()

        def look() -> list[File]:
            listed = {n: File(n, e.size, e.sha256, e.executable) for n, e in self.uploaded.items() if e.sha256}
            for file in files:
                with opened(file.path, self.below) as readable, readable.open("rb") as content:
                    info = os.fstat(content.fileno())
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                    listed[file.name] = File(file.name, info.st_size, digest, bool(info.st_mode & 0o100))
            return [f for _, f in sorted(listed.items())]

        listed = await asyncio.to_thread(look)
        return await self._say_aside(f"{self._index}.json", lambda: [asdict(f) for f in listed])

    async def _say_aside(self, name: str, what: Callable[[], object]) -> str:
        data = await asyncio.to_thread(lambda: json.dumps(what()).encode())
        await self._store.put("runs", self.key(f".gang/{name}"), data)
        return await _digest(data)

    async def _read_aside(self, name: str, digest: str) -> Any:
        data = await self._store.get("runs", self.key(f".gang/{name}"))
        if await _digest(data) != digest:
            raise DigestMismatch(f"runs/{self._run_id}/{self._attempt}/.gang/{name} is not what was written there")
        return await asyncio.to_thread(json.loads, data)

    async def _listings(self, gang: Gang) -> dict[int, list[File]]:
        found = {}
        for index, report in sorted(gang.reports.items()):
            listed = await self._read_aside(f"{index}.json", report.listing) if report.listing else []
            found[index] = await asyncio.to_thread(_files, listed)
        return found

    async def name_files(self, gang: Gang) -> str:
        """Decide under which names all members store their files: the one with rank 0 keeps its own."""
        if self._count == 1:
            return "own"
        order = sorted(gang.reports, key=lambda i: (min(gang.reports[i].ranks, default=10**9), i))
        listings = await self._listings(gang)
        return await self._say_aside("names.json", lambda: name_files(listings, order))

    async def names(self, agreed: str) -> dict[str, str] | None:
        """Under which names this member stores its files; None: their own. `agreed`: what `name_files` returned."""
        if self._count == 1:
            return None
        found: dict[str, str] = (await self._read_aside("names.json", agreed))[str(self._index)]
        return found

    async def make_whole(self, gang: Gang, agreed: str, mine: Mapping[str, c.FileEntry]) -> tuple[str, int, int]:
        """Store the manifest that makes what all members stored the run's; returns its digest, files and bytes."""
        entries: dict[str, c.FileEntry] = {}
        if self._count == 1:
            entries = dict(mine)
        else:
            every: dict[str, dict[str, str]] = await self._read_aside("names.json", agreed)
            listings = await self._listings(gang)

            def gather() -> None:
                for index, files in listings.items():
                    for file in files:
                        if name := every[str(index)].get(file.path):
                            entries[name] = c.FileEntry(path=name, size=file.size, sha256=file.sha256, executable=file.executable)

            await asyncio.to_thread(gather)

        def whole() -> tuple[bytes, str, int, int]:
            manifest = c.Manifest(files=sorted(entries.values(), key=lambda f: f.path))
            data = manifest_json(manifest)
            return data, hashlib.sha256(data).hexdigest(), len(manifest.files), sum(f.size for f in manifest.files)

        data, digest, count, size = await asyncio.to_thread(whole)
        await self._store.put("runs", self.key("manifest.json"), data)
        if self._count > 1:
            await self._store.delete("runs", await self._store.keys("runs", self.key(".gang/")))
        return digest, count, size


def _files(listed: Sequence[Mapping[str, Any]]) -> list[File]:
    return [File(**one) for one in listed]


async def _digest(data: bytes) -> str:
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())


async def each(items: Sequence[T], work: Callable[[T], Any], workers: int) -> None:
    """`work` for each item, `workers` at a time; the first error ends it and is raised."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workers, len(items))):
                group.create_task(worker())
    except ExceptionGroup as error:
        raise error.exceptions[0] from error
