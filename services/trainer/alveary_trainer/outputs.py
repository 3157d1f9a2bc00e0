"""The store of what a run leaves: its ./outputs and ./logs, and the manifest that makes them the run's.

Walking, hashing and JSON happen on threads: a run may have any number of files of any size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_json
from alveary_core.errors import AlvearyError, Unavailable
from alveary_core.objectstore import DigestMismatch, FileChanged, ObjectStore
from alveary_trainer.adapters.runtime import open_beneath
from alveary_trainer.file_names import printable
from alveary_trainer.file_walk import FoundFile, Stamp, stamp_of, walk

T = TypeVar("T")
BUCKET = "runs"
TOPS = ("outputs", "logs")
# What storing may raise where a run's files cannot be stored.
STORING = (AlvearyError, DigestMismatch, OSError)
_WORKERS = 32
_MAX_REMARKS = 20
_PROGRESS_SECONDS = 2.0
# How long storing may stand still: no byte is sent.
STALLED_SECONDS = 600.0
# How long storing is tried again while the node's disk is full, and how often.
_DISK_FULL_SECONDS = 900.0
_DISK_FULL_RETRY_SECONDS = 2.0
# A file that changed less long ago than this may change again without looking different, nanoseconds.
_YOUNG_NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class Published:
    """A manifest in the object store."""

    digest: str
    files: int
    bytes: int


@dataclass
class _Progress:
    """How far storing is."""

    total_files: int
    total_bytes: int
    files: int = 0
    bytes: int = 0
    # When the log was told last, time.monotonic().
    told_at: float = field(default_factory=time.monotonic)


def not_stored(failure: BaseException) -> str:
    """The sentence for a user whose outputs could not be stored."""
    return printable(f"its outputs could not be stored: {failure or type(failure).__name__}")


async def retry_while_disk_full(work: Callable[[], Awaitable[T]], disk_fault: Callable[[], str], log: Callable[[str], None]) -> T:
    """The result of `work`, which is tried again while `disk_fault` says that the node's disk is full.

    The object store may be on the same disk.

    Raises:
        one of STORING: it failed for another reason, or for _DISK_FULL_SECONDS.
    """
    deadline = time.monotonic() + _DISK_FULL_SECONDS
    while True:
        try:
            return await work()
        except STORING as failure:
            fault = disk_fault()
            if not fault or time.monotonic() > deadline:
                raise
            log(f"{not_stored(failure)}; it is tried again, as {fault}")
            await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)


class OutputStore:
    """Stores the files of one member of an attempt, at runs/<run>/<attempt>/."""

    def __init__(self, store: ObjectStore, run_id: str, attempt: int, index: int, code: Path, log: Callable[[str], None]) -> None:
        """`code`: the working directory. `index`: the member; all but the first stage their files until names are agreed on."""
        self._store, self._run_id, self._attempt, self._index = store, run_id, attempt, index
        self._code, self._log = code, log
        # The run's own folders, and below what its files are read; known once its runtime is.
        self.own, self.below = code, code
        # What the script stored itself, by name.
        self.uploaded: dict[str, c.FileEntry] = {}
        self._known: dict[str, tuple[Stamp, c.FileEntry]] = {}
        # When a byte was sent last, time.monotonic().
        self._moved = 0.0
        self._stopped = False
        # What `store_all` has stored, by its own name, and how far it is with ./outputs and ./logs.
        self.done: dict[str, c.FileEntry] = {}
        self._progress = _Progress(0, 0)

    @property
    def progress(self) -> tuple[int, int]:
        """How many files of ./outputs and ./logs `store_all` has stored, of how many."""
        return self._progress.files, self._progress.total_files

    def key(self, name: str) -> str:
        """Key of a file of the attempt."""
        return f"{self._run_id}/{self._attempt}/{name}"

    def _staging_key(self, name: str) -> str:
        """Key of a file whose final name is not decided: any member but the first has a folder of its own."""
        return self.key(f".gang/{self._index}/{name}" if self._index else name)

    @contextlib.asynccontextmanager
    async def _open(self, path: Path) -> AsyncIterator[Path]:
        holder = contextlib.ExitStack()
        try:
            yield await asyncio.to_thread(holder.enter_context, open_beneath(path, self.below))
        finally:
            holder.close()

    def _on_sent(self, _: int) -> None:
        # On the threads that send: they cannot be cancelled from outside, so they end here.
        if self._stopped:
            raise InterruptedError("storing was broken off")
        self._moved = time.monotonic()

    def stop(self) -> None:
        """End each upload after the part that is being sent; what is stored stays."""
        self._stopped = True

    async def put(self, path: Path, name: str, final: str = "") -> c.FileEntry:
        """Store a file under its final name; where that is not decided yet, under its staging key."""
        async with self._open(path) as readable:
            key = self.key(final) if final else self._staging_key(name)
            try:
                entry = await self._store.put_file(BUCKET, key, readable, self._on_sent)
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

    async def find(self) -> list[FoundFile]:
        """Files of ./outputs and ./logs; the log names those that are left out or renamed."""
        result = await asyncio.to_thread(walk, self._code, TOPS, self.own, self.below)
        for text in result.remarks[:_MAX_REMARKS]:
            self._log(text)
        if len(result.remarks) > _MAX_REMARKS:
            self._log(f"{len(result.remarks) - _MAX_REMARKS} more files are not stored, or under other names")
        return result.files

    async def store_all(self, names: Mapping[str, str] | None) -> dict[str, c.FileEntry]:
        """Store ./outputs and ./logs; returns what is stored, by its own name.

        `names`: under which name to store each file, by its own name; "" or missing: not at all. None: under their own.

        Raises:
            one of STORING: something cannot be stored, or for STALLED_SECONDS nothing moved.
        """
        files = await self.find()
        if names is not None:
            files = [f for f in files if names.get(f.name)]
        self.done = {n: e for n, e in self.uploaded.items() if e.sha256}
        self._progress = _Progress(len(files), sum(f.size for f in files))
        if files:
            self._log(f"storing {len(files)} files, {self._progress.total_bytes / 1e6:.1f} MB")
        # A file under several names (links) is sent once.
        first: dict[tuple[int, int], FoundFile] = {}
        again = [f for f in files if first.setdefault((f.device, f.inode), f) is not f]

        def final(file: FoundFile) -> str:
            return names[file.name] if names is not None else file.name

        async def send(file: FoundFile) -> None:
            await self._send(file, final(file))

        async def copy(file: FoundFile) -> None:
            origin = first[file.device, file.inode]
            await self._copy(file, final(file), origin, final(origin))

        await self._run_unless_stalled(each(list(first.values()), send, _WORKERS))
        await self._run_unless_stalled(each(again, copy, _WORKERS))
        if names is not None:
            await self._move_uploads(names, {f.name for f in files})
        return self.done

    async def _send(self, file: FoundFile, final: str) -> None:
        """Store a file, unless `sync` has stored it as it is now."""
        known = self._known.get(file.name)
        if known is not None and known[0] == file.stamp and final == file.name:
            entry = known[1]
        else:
            entry = await self.put(file.path, file.name, final)
        self._add(entry, sent_bytes=entry.size)

    async def _copy(self, file: FoundFile, final: str, origin: FoundFile, source: str) -> None:
        """Store a file that is `origin` under another name, which is stored as `source`."""
        await self._store.copy(BUCKET, self.key(final), BUCKET, self.key(source))
        entry = c.FileEntry()
        entry.CopyFrom(self.done[origin.name])
        entry.path = file.name
        self._add(entry)

    def _add(self, entry: c.FileEntry, sent_bytes: int = 0) -> None:
        self.done[entry.path] = entry
        progress, self._moved = self._progress, time.monotonic()
        progress.files += 1
        progress.bytes += sent_bytes
        if self._moved - progress.told_at > _PROGRESS_SECONDS:
            progress.told_at = self._moved
            sent, size = progress.bytes / 1e6, progress.total_bytes / 1e6
            self._log(f"stored {progress.files} of {progress.total_files} files, {sent:.1f} of {size:.1f} MB")

    async def _move_uploads(self, names: Mapping[str, str], present: set[str]) -> None:
        """Copy what the script stored itself, and is not among the files that are `present`, to its final names."""
        for own in self.uploaded.keys() - present:
            if names.get(own) and self.key(names[own]) != self._staging_key(own):
                await self._store.copy(BUCKET, self.key(names[own]), BUCKET, self._staging_key(own))

    async def _run_unless_stalled(self, work: Any) -> None:
        """Do the work, unless nothing moves for STALLED_SECONDS."""
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

    async def sync(self, files: Sequence[FoundFile], large_bytes: int, still_seconds: float) -> int:
        """Store those of a live run's files that changed, one after another; returns how many.

        A file with more than `large_bytes` is stored once it has not changed for `still_seconds`.
        """
        count = 0
        for file in files:
            known = self._known.get(file.name)
            age = time.time_ns() - file.stamp[3]
            if (known is not None and known[0] == file.stamp) or (file.size > large_bytes and age < still_seconds * 1e9):
                continue
            try:
                entry = await self.put(file.path, file.name)
                now = await asyncio.to_thread(file.path.stat)
            except (OSError, ValueError, FileChanged):
                continue  # it was removed, or became something else, meanwhile
            count += 1
            if stamp_of(now) == file.stamp and age > _YOUNG_NANOSECONDS:
                self._known[file.name] = (file.stamp, entry)
            else:
                # It changed while it was sent: next time, or at the end.
                self._known.pop(file.name, None)
        return count

    async def publish_manifest(self, entries: Mapping[str, c.FileEntry]) -> Published:
        """Store the manifest that makes the files of `entries` the outputs of the attempt."""

        def build() -> tuple[bytes, Published]:
            manifest = c.Manifest(files=sorted(entries.values(), key=lambda f: f.path))
            data = manifest_json(manifest)
            digest = hashlib.sha256(data).hexdigest()
            return data, Published(digest, len(manifest.files), sum(f.size for f in manifest.files))

        data, published = await asyncio.to_thread(build)
        await self._store.put(BUCKET, self.key("manifest.json"), data)
        return published


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
