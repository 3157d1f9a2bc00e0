"""Bytes to and from the object store through presigned links: parallel, verified, whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import urllib3

from alveary.errors import AlvearyError
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import path_problem

_PARALLEL = 8
_CHUNK = 1 << 20


class Transfers:
    """At most eight transfers at once."""

    def __init__(self, ca: str = "") -> None:
        self._http = urllib3.PoolManager(
            ssl_context=ssl.create_default_context(cadata=ca) if ca else None,
            maxsize=_PARALLEL,
            # 5xx: also what a proxy in front of the object store says while that is away.
            retries=urllib3.Retry(5, backoff_factor=0.2, status_forcelist=(500, 502, 503, 504), raise_on_status=False),
            timeout=urllib3.Timeout(10, read=120),
        )
        self._slots = asyncio.Semaphore(_PARALLEL)

    async def upload(
        self, slots: Iterable[c.UploadSlot], manifest: c.Manifest, paths: Mapping[str, Path], progress: Callable[[int, int], None] | None
    ) -> None:
        """PUT what the object store asked for; `progress` is called with bytes done and bytes in all.

        Raises:
            AlvearyError: the object store refused, or did not answer again and again.
        """
        by_digest = {f.sha256: f for f in manifest.files}
        todo = list(slots)
        total = sum(by_digest[s.sha256].size for s in todo)
        done = 0

        async def one(slot: c.UploadSlot) -> None:
            nonlocal done
            file = by_digest[slot.sha256]
            async with self._slots:
                await asyncio.to_thread(self._put, slot.url, paths[file.path], file)
            done += file.size
            if progress:
                progress(done, total)

        await _all(one(slot) for slot in todo)

    def _put(self, url: str, path: Path, file: c.FileEntry) -> None:
        with path.open("rb") as opened:
            reply = self._http.request("PUT", url, body=opened, headers={"Content-Length": str(file.size)})
        if reply.status >= 300:
            raise AlvearyError(f"upload of {path} failed: the object store said {reply.status}: {reply.data[:200]!r}", "UNAVAILABLE")

    async def download(self, link: c.FileLink, path: Path, progress: Callable[[int], None] | None = None) -> None:
        """Store a file here: whole and verified, or not at all."""
        async with self._slots:
            await asyncio.to_thread(self._fetch, link, path, progress)

    def _fetch(self, link: c.FileLink, path: Path, progress: Callable[[int], None] | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part{os.getpid()}")
        digest = hashlib.sha256()
        reply = self._http.request("GET", link.url, preload_content=False)
        try:
            if reply.status >= 300:
                raise AlvearyError(f"download of {link.file.path} failed: the object store said {reply.status}", "UNAVAILABLE")
            with part.open("wb") as file:
                for chunk in reply.stream(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    if progress:
                        progress(len(chunk))
            if link.file.sha256 and digest.hexdigest() != link.file.sha256:
                raise AlvearyError(f"{link.file.path} is damaged: its sha256 is {digest.hexdigest()}, not {link.file.sha256}", "DATA_LOSS")
            if link.file.executable:
                part.chmod(part.stat().st_mode | 0o111)
            part.rename(path)
        finally:
            reply.release_conn()
            part.unlink(missing_ok=True)

    async def download_all(self, links: Iterable[c.FileLink], folder: Path, progress: Callable[[int], None] | None = None) -> None:
        """Store files here with their folders; a path that would leave `folder` is refused."""
        todo = list(links)
        for link in todo:
            if problem := path_problem(link.file.path):
                raise AlvearyError(problem, "DATA_LOSS")
        await _all(self.download(link, folder / link.file.path, progress) for link in todo)


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """All of them; the first failure stops the rest and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)  # type: ignore[arg-type]
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from group_error
