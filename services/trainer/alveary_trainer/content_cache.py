"""Snapshots, datasets and models on the node: digests verified, cached by content."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_from_json
from alveary_contracts.names import path_problem
from alveary_core import telemetry
from alveary_core.errors import NotFound
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_trainer.adapters.fingerprint import Change
from alveary_trainer.adapters.runtime import ProgressCallback, StagingFailed
from alveary_trainer.adapters.shared_cache import SharedCache

_PARALLEL = 16


class ContentCache:
    """Folders by manifest digest, from blobs of one bucket."""

    def __init__(self, folder: Path, bucket: str, store: ObjectStore, limit: int, *, read_only: bool) -> None:
        self._cache = SharedCache(folder, limit)
        self._bucket, self._store, self._read_only = bucket, store, read_only

    @asynccontextmanager
    async def use(self, digest: str, progress: ProgressCallback | None = None) -> AsyncIterator[Path]:
        """The folder with the manifest's files; it stays as long as this context does.

        `progress` is told where a folder has changed on this node and is fetched again.

        Raises:
            StagingFailed: the manifest is unknown, damaged, or would leave the folder; or a blob is not what its name says.
        """

        async def changed(change: Change) -> None:
            text = f"{self._bucket}: {digest[:12]} was changed on this node since it was fetched: {change.words}; it is fetched again"
            telemetry.logger().warning("cache.changed", bucket=self._bucket, digest=digest, what=change.words)
            if progress is not None:
                await progress(text)

        async with self._cache.use(digest, lambda part, _: self._fetch(digest, part), changed) as folder:
            yield folder

    async def _fetch(self, digest: str, part: Path) -> None:
        try:
            data = await self._store.get(self._bucket, f"manifests/{digest}.json")
        except NotFound as error:
            raise StagingFailed(f"{self._bucket}: there is no manifest {digest}") from error
        if await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest()) != digest:
            raise StagingFailed(f"{self._bucket}: the manifest {digest} is damaged: its digest is another")
        manifest = await asyncio.to_thread(manifest_from_json, data)
        slots = asyncio.Semaphore(_PARALLEL)
        try:
            async with asyncio.TaskGroup() as group:
                for file in manifest.files:
                    if problem := path_problem(file.path):
                        raise StagingFailed(f"{self._bucket}/{digest}: {problem}")
                    group.create_task(self._one(file, part / file.path, slots))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from group_error
        if self._read_only:
            await asyncio.to_thread(_seal, part)

    async def _one(self, file: c.FileEntry, path: Path, slots: asyncio.Semaphore) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        async with slots:
            try:
                await self._store.get_file(self._bucket, f"blobs/{file.sha256}", path, file.sha256)
            except DigestMismatch as error:
                raise StagingFailed(
                    f"{self._bucket}: {file.path} is damaged in the object store ({error}). Upload it again with verify=True (--verify), "
                    "which replaces what is wrong there"
                ) from error
        mode = 0o555 if file.executable else 0o444
        path.chmod(mode if self._read_only else mode | 0o200)


def _seal(folder: Path) -> None:
    """Make all folders below one read-only. Blocks."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(root, name), 0o555)
