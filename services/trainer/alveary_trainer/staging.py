"""Snapshots and datasets on the node: digests verified, cached by content."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_from_json
from alveary_contracts.names import path_problem
from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_trainer.adapters.environments import StagingFailed


class ContentCache:
    """Folders by manifest digest, from blobs of one bucket."""

    def __init__(self, folder: Path, bucket: str, store: ObjectStore, limit: int, *, read_only: bool) -> None:
        self._folder, self._bucket, self._store, self._limit, self._read_only = folder, bucket, store, limit, read_only
        folder.mkdir(parents=True, exist_ok=True)
        self._locks: dict[str, asyncio.Lock] = {}

    async def folder(self, digest: str) -> Path:
        """The folder with the manifest's files, fetched where it is not there.

        Raises:
            StagingFailed: the manifest is unknown, damaged, or would leave the folder.
            DigestMismatch: a blob is not what its name says.
        """
        final = self._folder / digest
        async with self._locks.setdefault(digest, asyncio.Lock()):
            if not final.exists():
                await self._fetch(digest, final)
        os.utime(final)
        return final

    async def _fetch(self, digest: str, final: Path) -> None:
        try:
            data = await self._store.get(self._bucket, f"manifests/{digest}.json")
        except NotFound as error:
            raise StagingFailed(f"{self._bucket}: there is no manifest {digest}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StagingFailed(f"{self._bucket}: the manifest {digest} is damaged: its digest is another")
        manifest = manifest_from_json(data)
        part = self._folder / f".{digest[:16]}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            slots = asyncio.Semaphore(16)
            async with asyncio.TaskGroup() as group:
                for file in manifest.files:
                    if problem := path_problem(file.path):
                        raise StagingFailed(f"{self._bucket}/{digest}: {problem}")
                    group.create_task(self._one(file, part / file.path, slots))
            if self._read_only:
                for root, folders, _ in os.walk(part):
                    for name in folders:
                        os.chmod(os.path.join(root, name), 0o555)
            try:
                part.rename(final)
            except OSError:  # another trainer of this machine was faster
                if not final.exists():
                    raise
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from group_error
        finally:
            await asyncio.to_thread(remove_tree, part)
        await asyncio.to_thread(self._evict, final)

    async def _one(self, file: c.FileEntry, path: Path, slots: asyncio.Semaphore) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        async with slots:
            await self._store.get_file(self._bucket, f"blobs/{file.sha256}", path, file.sha256)
        mode = 0o555 if file.executable else 0o444
        path.chmod(mode if self._read_only else mode | 0o200)

    def _evict(self, keep: Path) -> None:
        folders = [f for f in self._folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
        sizes = {f: sum(os.lstat(os.path.join(r, n)).st_size for r, _, ns in os.walk(f) for n in ns) for f in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=lambda f: f.stat().st_mtime):
            if total <= self._limit or folder == keep:
                return
            remove_tree(folder)
            total -= sizes[folder]


def remove_tree(folder: Path) -> None:
    """Remove a folder with read-only parts; nothing where there is none."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(root, name)):
                os.chmod(os.path.join(root, name), 0o755)
    shutil.rmtree(folder, ignore_errors=True)
