"""Bytes to and from the object store through presigned links: parallel, verified, resumed where they were cut.

What goes up is exactly what was digested; what comes down is all there or nothing, and overwrites nothing unasked.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import urllib3

from alveary.backoff import Backoff, retry
from alveary.errors import AlvearyError
from alveary.landing import Landing, Wanted
from alveary_contracts.common.v1 import common_pb2 as c

T = TypeVar("T")
_PARALLEL = 16
_CHUNK = 1 << 20
# Files that are asked for at once; links live for an hour.
BATCH = 1000
# Files of no more bytes are read whole, and digested before they are sent.
_WHOLE = 8 << 20
# How often one transfer is tried while nothing of it passes, and its pauses, seconds.
_TRIES = 7
_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
# How often a file may be asked for again after all of it was sent.
_ROUNDS = 4
# Verification in the object store, bytes a second at worst.
_VERIFIED = 10e6

Progress = Callable[[int, int], None]
# Slots of what is missing of some files, and how many files are still being verified.
Prepare = Callable[[Sequence[c.FileEntry]], Awaitable[tuple[Sequence[c.UploadSlot], int]]]


@dataclass
class Listing:
    """Files that can be downloaded."""

    # By path.
    files: list[c.FileEntry]
    # Links to files behind a path, in order: those that come next.
    links_after: Callable[[str], Awaitable[Sequence[c.FileLink]]]

    @classmethod
    def of(cls, links: Iterable[c.FileLink]) -> Listing:
        """Of links in hand, which cannot be renewed."""
        known = sorted(links, key=lambda link: link.file.path)

        async def after(path: str) -> Sequence[c.FileLink]:
            return [link for link in known if link.file.path > path]

        return cls([link.file for link in known], after)


class _Again(Exception):
    """It did not pass; trying again may help."""


class _Expired(Exception):
    """The link is not valid any more."""


_TRANSIENT = (_Again, urllib3.exceptions.HTTPError)


class Transfers:
    """At most sixteen transfers at once."""

    def __init__(self, ca: str = "") -> None:
        self._http = urllib3.PoolManager(
            ssl_context=ssl.create_default_context(cadata=ca) if ca else None,
            maxsize=_PARALLEL,
            retries=False,
            timeout=urllib3.Timeout(10, read=120),
        )
        self._threads = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="alveary-transfer")

    async def _run(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    # ---- up -------------------------------------------------------------------------------------------------------

    async def upload(self, prepare: Prepare, manifest: c.Manifest, paths: Mapping[str, Path], progress: Progress | None = None) -> None:
        """PUT what the object store does not have; `progress` is called with bytes done (or there already) and bytes in all, if anything is sent.

        Raises:
            AlvearyError: a file changed meanwhile; or the object store refused, or did not answer again and again.
        """
        files = list({f.sha256: f for f in manifest.files}.values())
        count = _Count(sum(f.size for f in files), progress)
        for begin in range(0, len(files), BATCH):
            batch = files[begin : begin + BATCH]
            await self._upload_batch(prepare, {f.sha256: f for f in batch}, paths, count)

    async def _upload_batch(self, prepare: Prepare, files: dict[str, c.FileEntry], paths: Mapping[str, Path], count: _Count) -> None:
        before = count.done
        rounds: dict[str, int] = {}
        deadline = time.monotonic() + 300 + sum(f.size for f in files.values()) / _VERIFIED
        backoff = Backoff(_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        while True:
            slots, pending = await prepare(list(files.values()))
            if not slots and not pending:
                break
            for slot in slots:
                rounds[slot.sha256] = rounds.get(slot.sha256, 0) + 1
                if rounds[slot.sha256] > _ROUNDS:
                    path = paths[files[slot.sha256].path]
                    await self._run(_check, path, files[slot.sha256])
                    raise AlvearyError(f"{path} was uploaded {_ROUNDS} times, and is not there: the object store refuses it", "DATA_LOSS")
            if slots:
                again = await self._upload_slots(slots, files, paths, count)
                if not again and not pending and not any(s.parts for s in slots):
                    break
                backoff.reset()
            elif time.monotonic() > deadline:
                raise AlvearyError(f"the platform is still verifying {pending} files: try again later", "DEADLINE_EXCEEDED")
            else:
                await backoff.pause()
        count.set(before + sum(f.size for f in files.values()), quiet=not rounds)

    async def _upload_slots(
        self, slots: Iterable[c.UploadSlot], files: Mapping[str, c.FileEntry], paths: Mapping[str, Path], count: _Count
    ) -> bool:
        """Send them; True where a link had expired."""
        again = False

        async def one(slot: c.UploadSlot, part: c.UploadPart) -> None:
            nonlocal again
            file = files[slot.sha256]
            try:
                await self._patiently(lambda: self._put(slot, part, paths[file.path], file), f"upload of {paths[file.path]}")
            except _Expired:
                again = True
            else:
                count.add(part.size)

        pieces = [(s, p) for s in slots for p in (s.parts or [c.UploadPart(offset=0, size=files[s.sha256].size, url=s.url)])]
        await gather(one(*piece) for piece in pieces)
        return again

    async def _patiently(self, work: Callable[[], T], what: str) -> T:
        """`work` in a thread, again with growing pauses while it fails by what passes."""
        backoff = Backoff(_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, jitter=0.5)
        try:
            return await retry(lambda: self._run(work), lambda error: isinstance(error, _TRANSIENT), tries=_TRIES, backoff=backoff)
        except _TRANSIENT as error:
            raise AlvearyError(f"{what} failed {_TRIES} times: {error}", "UNAVAILABLE") from error

    def _put(self, slot: c.UploadSlot, part: c.UploadPart, path: Path, file: c.FileEntry) -> None:
        headers = {**slot.headers, "content-length": str(part.size)}
        with _opened(path) as opened:
            if file.size <= _WHOLE:
                data = opened.read(file.size + 1)
                if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
                    raise _changed(path)
                reply = self._http.request("PUT", part.url, body=data, headers=headers, redirect=False)
            else:
                body: Any = _Span(path, opened, part.offset, part.size)
                reply = self._http.request("PUT", part.url, body=body, headers=headers, redirect=False)
        # 412: another client stored it meanwhile.
        if reply.status < 300 or reply.status == 412:
            return
        said = f"the object store said {reply.status}: {reply.data[:300].decode(errors='replace')}"
        # 404: the upload that the part belongs to is over. Asking again tells.
        if reply.status in (403, 404):
            raise _Expired(said)
        if reply.status == 400:
            _check(path, file)
        if reply.status >= 500 or reply.status in (400, 408, 409, 429):
            raise _Again(said)
        raise AlvearyError(f"upload of {path} failed: {said}", "UNAVAILABLE")

    # ---- down -----------------------------------------------------------------------------------------------------

    async def download(
        self, link: c.FileLink, path: Path, progress: Callable[[int], None] | None = None, *, overwrite: bool = False
    ) -> None:
        """Store one file as `path`: whole and verified, or not at all.

        Raises:
            AlvearyError: something else is there already, it is damaged, or the object store did not answer again and again.
        """
        listing = Listing.of([link])
        await self._bring(listing, Landing(path.parent, [Wanted(link.file, path.name)], overwrite), progress)

    async def download_all(
        self, listing: Listing, folder: Path, progress: Callable[[int], None] | None = None, *, overwrite: bool = False
    ) -> None:
        """Store files in `folder`, with their folders: all of them verified, or none. What came before a failure is kept, and is gone
        on with by the next call.

        Raises:
            AlvearyError: a path would leave `folder`, other files of these names are there, one is damaged, there is not enough space,
                or the object store did not answer again and again.
        """
        await self._bring(listing, Landing(folder, [Wanted(f, f.path) for f in listing.files], overwrite), progress)

    async def _bring(self, listing: Listing, landing: Landing, progress: Callable[[int], None] | None) -> None:
        try:
            missing = {w.file.path: w for w in await self._run(landing.open)}
            links = _Links(listing, missing)
            await gather(self._fetch_all(links, landing, progress) for _ in range(min(_PARALLEL, len(missing))))
            await self._run(landing.settle)
        finally:
            await self._run(landing.close)

    async def _fetch_all(self, links: _Links, landing: Landing, progress: Callable[[int], None] | None) -> None:
        while (link := await links.next()) is not None:
            await self._fetch(link, links, landing, progress)

    async def _fetch(self, link: c.FileLink, links: _Links, landing: Landing, progress: Callable[[int], None] | None) -> None:
        piece, url = landing.piece(link.file), link.url
        renewed = damaged = tries = 0
        backoff = Backoff(2 * _PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, jitter=0.5)
        while True:
            before = piece.size
            try:
                await self._run(self._fetch_once, url, link.file, piece, progress)
                if await self._run(piece.whole):
                    return
                if damaged:
                    raise AlvearyError(
                        f"{link.file.path} is damaged in the object store: its sha256 is {piece.digest}, not {link.file.sha256}. Upload it "
                        "again with verify=True (--verify), which replaces what is wrong there",
                        "DATA_LOSS",
                    )
                damaged += 1  # on the way, perhaps
                await self._run(piece.restart)
            except _Expired as error:
                if renewed == _ROUNDS and piece.size == before:
                    raise AlvearyError(f"download of {link.file.path} failed: {error}", "UNAVAILABLE") from error
                renewed = renewed + 1 if piece.size == before else 1
                url = await links.renew(link.file.path)
            except _TRANSIENT as error:
                if piece.size != before:
                    tries = 0
                    backoff.reset()
                tries += 1
                if tries >= _TRIES:
                    raise AlvearyError(f"download of {link.file.path} was cut {_TRIES} times: {error}", "UNAVAILABLE") from error
                await backoff.pause()

    def _fetch_once(self, url: str, file: c.FileEntry, piece: Any, progress: Callable[[int], None] | None) -> None:
        """Read on from where `piece` ends."""
        if file.sha256 and piece.size >= file.size:
            return
        headers = {"accept-encoding": "identity", **({"range": f"bytes={piece.size}-"} if piece.size else {})}
        reply = self._http.request("GET", url, headers=headers, preload_content=False, redirect=False)
        try:
            if reply.status in (403, 404):
                raise _Expired(f"the object store said {reply.status}: {reply.read(300).decode(errors='replace')}")
            if reply.status == 416 or (reply.status == 200 and piece.size):  # it does not go on where it was
                piece.restart()
            if reply.status not in (200, 206):
                raise _Again(f"the object store said {reply.status}: {reply.read(300).decode(errors='replace')}")
            for chunk in reply.stream(_CHUNK, decode_content=False):
                piece.write(chunk)
                if progress:
                    progress(len(chunk))
        finally:
            reply.close()
            reply.release_conn()


class _Count:
    """Bytes done of bytes in all."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total, progress

    def add(self, size: int) -> None:
        self.set(self.done + size)

    def set(self, done: int, quiet: bool = False) -> None:
        self.done = done
        if self._progress and not quiet:
            self._progress(min(done, self._total), self._total)


class _Links:
    """Links to files that are still missing, asked for as they are needed, in order."""

    def __init__(self, listing: Listing, missing: Mapping[str, Any]) -> None:
        self._listing = listing
        self._todo = [i for i, f in enumerate(listing.files) if f.path in missing]
        self._urls: dict[str, str] = {}
        self._asking = asyncio.Lock()
        self._next = 0

    async def next(self) -> c.FileLink | None:
        """The next file; None: there is none."""
        if self._next == len(self._todo):
            return None
        index = self._todo[self._next]
        self._next += 1
        file = self._listing.files[index]
        return c.FileLink(file=file, url=self._urls.pop(file.path, "") or await self._ask(index))

    async def renew(self, path: str) -> str:
        """Another link to a file."""
        index = next(i for i in self._todo if self._listing.files[i].path == path)
        return await self._ask(index)

    async def _ask(self, index: int) -> str:
        files = self._listing.files
        path = files[index].path
        async with self._asking:
            if known := self._urls.pop(path, ""):
                return known
            found = await self._listing.links_after(files[index - 1].path if index else "")
            self._urls = {link.file.path: link.url for link in found}
        url = self._urls.pop(path, "")
        if not url:
            raise AlvearyError(f"{path} is not there any more", "NOT_FOUND")
        return url


class _Span:
    """A part of a file, which must have all of its bytes."""

    def __init__(self, path: Path, file: BufferedReader, offset: int, size: int) -> None:
        self._path, self._file, self._left = path, file, size
        file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        if not data and self._left:
            raise _changed(self._path)
        self._left -= len(data)
        return data


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise AlvearyError(f"{path} vanished while it was uploaded: nothing was registered", "FAILED_PRECONDITION") from error
    except OSError as error:
        raise AlvearyError(f"{path} cannot be read: {error.strerror or error}", "FAILED_PRECONDITION") from error


def _changed(path: Path) -> AlvearyError:
    return AlvearyError(
        f"{path} changed while it was uploaded: nothing was registered; upload again when it stands still", "FAILED_PRECONDITION"
    )


def _check(path: Path, file: c.FileEntry) -> None:
    """Refuse a file that is not what it was."""
    with _opened(path) as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            raise _changed(path)


async def gather(work: Iterable[Awaitable[None]]) -> None:
    """All of them; the first failure stops the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)  # type: ignore[arg-type]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from group_error
