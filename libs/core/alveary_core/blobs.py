"""Files by content: a bucket's `blobs/<sha256>`. Nothing is there that is not what its name says.

A client gets links that bind content, length and "only where nothing is there", which the object store enforces. Large files
go up in parts, which can be sent side by side and again; what the parts make is read and digested here before it counts,
and so is everything where the object store does not enforce digests. Until then it lies under `incoming/<sha256>`, as an
upload that only this side can complete. A blob that turns out to be wrong is moved to `damaged/`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core import telemetry
from alveary_core.claims import Claims
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from alveary_core.objectstore import ObjectStore
from alveary_core.presign import checksum

T = TypeVar("T")
# Files of more bytes go up in parts.
PARTS_FROM = 64 << 20
_PART = 16 << 20
# Parts of a file: links to more would not fit into an answer.
_MAX_PARTS = 1000
# Links of one answer.
_MAX_LINKS = 4000
# Files of one question.
MAX_FILES = 10_000
# How long one question is answered with what came, seconds.
_PATIENCE = 20.0
# Single questions to the object store at once, and blobs that are read at once.
_ASKED, _READ = 32, 2
# Digests of one page of a listing below which asking for each is faster.
_DENSE = 30
EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Prepared:
    """What is missing."""

    slots: list[c.UploadSlot]
    # Files that are being verified, or whose slots did not fit.
    pending: int


async def each(work: Callable[[T], Awaitable[None]], items: Iterable[T], at_once: int = _ASKED) -> None:
    """`work` of all items, some at once; the first failure stops the rest and is raised as it is."""
    todo = iter(items)

    async def worker() -> None:
        for item in todo:
            await work(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(at_once)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def sizes(store: ObjectStore, bucket: str, digests: Iterable[str]) -> dict[str, int]:
    """Bytes of the blobs that are there, by digest. Many are found in listings, which hold a thousand each."""
    found: dict[str, int] = {}

    async def ask(digest: str) -> None:
        size = await store.size(bucket, f"blobs/{digest}")
        if size is not None:
            found[digest] = size

    async def walk(wanted: list[str]) -> None:
        while wanted:
            # "." sorts before all hex digits: the listing begins with the digest itself.
            page = await store.page(bucket, f"blobs/{wanted[0][0]}", after=f"blobs/{wanted[0][:-1]}.")
            there = {key.removeprefix("blobs/"): size for key, size, _ in page}
            last = max(there) if len(page) == 1000 else "g"
            covered = [d for d in wanted if d <= last]
            found.update({d: there[d] for d in covered if d in there})
            wanted = wanted[len(covered) :]
            if len(covered) < _DENSE:
                await each(ask, wanted, 4)
                return

    wanted = sorted(set(digests))
    if len(wanted) <= 200:
        await each(ask, wanted)
    else:
        groups: dict[str, list[str]] = {}
        for digest in wanted:
            groups.setdefault(digest[0], []).append(digest)
        await each(walk, groups.values(), 8)
    return found


class Blobs:
    """The blobs of one bucket, as one replica of a service sees them."""

    def __init__(self, store: ObjectStore, bucket: str) -> None:
        self._store, self._bucket = store, bucket
        self.claims = Claims(store, bucket)
        self._enforced: bool | None = None
        self._verifying: dict[str, asyncio.Future[None]] = {}
        self._failures: dict[str, str] = {}
        self._readers = asyncio.Semaphore(_READ)

    async def missing(self, files: Sequence[c.FileEntry]) -> list[c.FileEntry]:
        """Those of `files` whose blob is missing or of another size, each digest once."""
        wanted = {f.sha256: f for f in files}
        there = await sizes(self._store, self._bucket, wanted)
        return [file for digest, file in wanted.items() if there.get(digest) != file.size]

    async def require(self, files: Sequence[c.FileEntry]) -> None:
        """Make sure that all blobs are there, and stay until an event refers to them.

        Raises:
            FailedPrecondition: some are not.
        """
        await self.claims.hold(f.sha256 for f in files)
        missing = {f.sha256 for f in await self.missing(files)}
        if missing:
            names = [f.path for f in files if f.sha256 in missing]
            raise FailedPrecondition(f"{len(names)} of {len(files)} files were not uploaded, {names[0]!r} first: PUT them, then try again")

    async def prepare(self, files: Sequence[c.FileEntry], doubted: Iterable[str] = ()) -> Prepared:
        """Where to PUT what is missing; what came in parts is put together and verified. Answers within about 20 s.

        `doubted`: digests among `files` whose content was found to differ.

        Raises:
            InvalidArgument: too many files, or one digest with two sizes.
            Unavailable: the object store failed while one of them was verified.
        """
        if len(files) > MAX_FILES:
            raise InvalidArgument(("manifest.files", f"{len(files)} files: ask for at most {MAX_FILES} at once"))
        by_digest: dict[str, c.FileEntry] = {}
        for file in files:
            if by_digest.setdefault(file.sha256, file).size != file.size:
                raise InvalidArgument(("manifest.files", f"{file.path!r}: the same sha256 stands for another size elsewhere"))
        await self.claims.hold(by_digest)
        for digest in by_digest:
            for name in (digest, f"doubt/{digest}"):
                if failure := self._failures.pop(name, ""):
                    raise Unavailable(f"{by_digest[digest].path!r} could not be verified: {failure}")
        if self._enforced is None:
            self._enforced = await self._store.enforces_checksums(self._bucket)
        for digest in doubted:
            if digest in by_digest and digest not in self._verifying:
                self._begin(f"doubt/{digest}", self._check(digest))
        there = await sizes(self._store, self._bucket, by_digest)
        for digest, file in by_digest.items():
            if digest in there and there[digest] != file.size:
                await self._set_aside(digest, f"it has {there.pop(digest)} bytes, not {file.size}")
        missing = [f for d, f in by_digest.items() if d not in there]
        if any(f.sha256 == EMPTY for f in missing):
            await self._store.put(self._bucket, f"blobs/{EMPTY}", b"")
            missing = [f for f in missing if f.sha256 != EMPTY]
        staged = {f.sha256: f for f in missing if f.size > PARTS_FROM or not self._enforced}
        parts: dict[str, list[c.UploadPart]] = {}
        left_out = 0
        links = 0
        for file in staged.values():
            if links > _MAX_LINKS:
                left_out += 1
                continue
            parts[file.sha256] = found = await self._parts(file)
            links += len(found)
        busy = {d: t for d in by_digest for t in (self._verifying.get(d), self._verifying.get(f"doubt/{d}")) if t is not None}
        left_out += len(busy)  # what becomes of them is seen when they are asked for again
        slots = []
        for file in missing:
            if file.sha256 in busy:
                continue
            if file.sha256 in staged:
                if parts.get(file.sha256):
                    slots.append(c.UploadSlot(sha256=file.sha256, parts=parts[file.sha256]))
            elif links <= _MAX_LINKS:
                links += 1
                headers = {"x-amz-checksum-sha256": checksum(file.sha256), "content-length": str(file.size), "if-none-match": "*"}
                url = self._store.put_url(self._bucket, f"blobs/{file.sha256}", headers=headers)
                slots.append(c.UploadSlot(sha256=file.sha256, url=url, headers=headers))
            else:
                left_out += 1
        if busy and not slots:
            await asyncio.wait(busy.values(), timeout=_PATIENCE)
        return Prepared(slots, left_out)

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Future[None] = asyncio.create_task(work)
        self._verifying[name] = task

        def ended(done: asyncio.Future[None]) -> None:
            self._verifying.pop(name, None)
            if not done.cancelled() and (error := done.exception()) is not None:
                telemetry.logger().warning("blobs.verify", bucket=self._bucket, name=name, error=str(error))
                # The next call reports it; the one after that starts again.
                self._failures[name] = str(error)

        task.add_done_callback(ended)

    async def _parts(self, file: c.FileEntry) -> list[c.UploadPart]:
        """Links to the parts of a file that did not come yet; where all of them came, none, and its verification begins."""
        if file.sha256 in self._verifying:
            return []
        store, bucket, key = self._store, self._bucket, f"incoming/{file.sha256}"
        size = max(_PART, -(-file.size // _MAX_PARTS))
        spans = [(offset, min(size, file.size - offset)) for offset in range(0, file.size, size)]
        # The oldest: all clients that upload the same file continue it.
        begun = sorted(u.id for u in await store.uploads(bucket, key) if u.key == key)
        if not begun and await store.size(bucket, key) == file.size:  # put together by a process that ended then
            self._begin(file.sha256, self._accept(file))
            return []
        upload_id = begun[0] if begun else await store.begin_upload(bucket, key)
        try:
            came = await store.parts(bucket, key, upload_id) if begun else {}
        except NotFound:  # another client completed it meanwhile
            came, upload_id = {}, await store.begin_upload(bucket, key)
        missing = [(n, *span) for n, span in enumerate(spans, 1) if came.get(n, (-1, ""))[0] != span[1]]
        if not missing:
            self._begin(file.sha256, self._put_together(file, upload_id, [came[n][1] for n in range(1, len(spans) + 1)]))
            return []

        def link(number: int, length: int) -> str:
            headers = {"content-length": str(length)}
            return store.put_url(bucket, key, headers=headers, query={"partNumber": str(number), "uploadId": upload_id})

        return [c.UploadPart(offset=offset, size=length, url=link(number, length)) for number, offset, length in missing]

    async def _put_together(self, file: c.FileEntry, upload_id: str, etags: Sequence[str]) -> None:
        """Make a blob of an upload whose parts all came, if it is what it should be. No client can write the object meanwhile."""
        await self._store.complete(self._bucket, f"incoming/{file.sha256}", upload_id, etags)
        await self._accept(file)

    async def _accept(self, file: c.FileEntry) -> None:
        store, bucket, key = self._store, self._bucket, f"incoming/{file.sha256}"
        async with self._readers:
            digest = await store.digest(bucket, key)
            if digest == file.sha256:
                await store.copy(bucket, f"blobs/{file.sha256}", bucket, key, file.size)
            else:
                telemetry.logger().warning("blobs.wrong", bucket=bucket, expected=file.sha256, found=digest)
            await store.delete(bucket, [key])

    async def _check(self, digest: str) -> None:
        async with self._readers:
            try:
                found = await self._store.digest(self._bucket, f"blobs/{digest}")
            except NotFound:
                return
            if found != digest:
                await self._set_aside(digest, f"its sha256 is {found}")

    async def _set_aside(self, digest: str, why: str) -> None:
        """Move a wrong blob away, so that the next right upload takes its place."""
        telemetry.logger().error("blobs.damaged", bucket=self._bucket, digest=digest, why=why)
        key = f"blobs/{digest}"
        await self._store.copy(self._bucket, f"damaged/{digest}-{time.time_ns()}", self._bucket, key)
        await self._store.delete(self._bucket, [key])

    async def take(self, files: Sequence[c.FileEntry], source_bucket: str, sources: Mapping[str, str], patience: float = _PATIENCE) -> int:
        """Copy blobs that are missing from other objects of the store, `sources` by digest, for `patience` seconds.

        Returns how many are still missing: asking again goes on with them.
        """
        await self.claims.hold(f.sha256 for f in files)
        missing = await self.missing(files)
        deadline = time.monotonic() + patience
        left = len(missing)

        async def one(file: c.FileEntry) -> None:
            nonlocal left
            if time.monotonic() < deadline:
                await self._store.copy(self._bucket, f"blobs/{file.sha256}", source_bucket, sources[file.sha256], file.size)
                left -= 1

        await each(one, missing)
        return left
