"""The node's caches: verified, shared, evicted least recently used by size."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from fakes import MemoryStore

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_json
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.runtime import StagingFailed
from alveary_trainer.staging import ContentCache


async def folder_of(store: MemoryStore, files: dict[str, bytes], bucket: str = "datasets") -> str:
    manifest = c.Manifest()
    for path, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        await store.put(bucket, f"blobs/{digest}", data)
        manifest.files.append(c.FileEntry(path=path, size=len(data), sha256=digest))
    digest = manifest_digest(manifest)
    await store.put(bucket, f"manifests/{digest}.json", manifest_json(manifest))
    return digest


def cache(folder: Path, store: MemoryStore, limit: int = 1 << 30, read_only: bool = True) -> ContentCache:
    return ContentCache(folder, "datasets", store, limit, read_only=read_only)  # type: ignore[arg-type]


def age(root: Path, folder: Path, seconds: float) -> None:
    mark = root / ".locks" / folder.name
    stamp = mark.stat().st_mtime - seconds
    os.utime(mark, (stamp, stamp))


async def get(datasets: ContentCache, digest: str) -> Path:
    async with datasets.use(digest) as folder:
        return folder


def visible(root: Path) -> list[str]:
    return [f.name for f in root.iterdir() if f.name != ".locks"]


async def test_folders_are_whole_read_only_and_fetched_once(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = await folder_of(store, {"a.txt": b"1", "deep/er/b.txt": b"22"})
    datasets, neighbour = cache(tmp_path, store), cache(tmp_path, store)
    one, two = await asyncio.gather(get(datasets, digest), get(neighbour, digest))
    assert one == two and (one / "deep/er/b.txt").read_bytes() == b"22"
    assert not (one / "a.txt").stat().st_mode & 0o222
    store.objects.clear()
    assert await get(datasets, digest) == one


async def test_the_least_recently_used_go_when_there_is_too_much_but_never_under_a_run(tmp_path: Path) -> None:
    store = MemoryStore()
    digests = [await folder_of(store, {"f": bytes([n]) * 1000}) for n in range(4)]
    datasets, neighbour = cache(tmp_path, store, limit=2500), cache(tmp_path, store, limit=2500)
    first, second = [await get(datasets, d) for d in digests[:2]]
    age(tmp_path, first, 200)
    age(tmp_path, second, 100)
    await get(datasets, digests[0])  # used again: now the newest
    await get(datasets, digests[2])
    assert not second.exists() and first.exists()
    age(tmp_path, first, 300)
    async with neighbour.use(digests[0]):  # a run of another trainer reads it
        await get(datasets, digests[3])
        assert first.exists(), "a folder that a run reads was taken from it"
    assert (await get(datasets, digests[1]) / "f").exists()
    assert not first.exists()


async def test_damage_and_escapes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = await folder_of(store, {"f": b"good"})
    store.objects["datasets", f"blobs/{hashlib.sha256(b'good').hexdigest()}"] = b"evil"
    datasets = cache(tmp_path, store)
    with pytest.raises(StagingFailed, match="f is damaged in the object store"):
        await get(datasets, digest)
    escape = manifest_json(c.Manifest(files=[c.FileEntry(path="../x", size=1, sha256="0" * 64)]))
    evil = hashlib.sha256(escape).hexdigest()
    await store.put("datasets", f"manifests/{evil}.json", escape)
    with pytest.raises(StagingFailed):
        await get(datasets, evil)
    with pytest.raises(StagingFailed, match="no manifest"):
        await get(datasets, "0" * 64)
    assert visible(tmp_path) == []


async def test_what_a_killed_trainer_left_half_made_is_made_anew(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = await folder_of(store, {"f": b"good"})
    half = tmp_path / f".part-{digest}"
    half.mkdir()
    (half / "f").write_bytes(b"ha")
    assert (await get(cache(tmp_path, store), digest) / "f").read_bytes() == b"good"
    assert visible(tmp_path) == [digest]


async def test_environments_are_evicted_by_size_but_never_under_a_run(tmp_path: Path) -> None:
    store = MemoryStore()
    digests = [f"{n}" * 64 for n in range(3)]
    for digest in digests:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        lock = {"python_version": version, "requirements": "", "packages": [], "wheels": []}
        await store.put("images", f"locks/w/{digest}.json", json.dumps(lock).encode())

    async def say(_: str) -> None:
        return None

    environments = Environments(tmp_path, 1, store)  # type: ignore[arg-type]
    async with environments.use("w", digests[0], "", False, say) as held:
        async with environments.use("w", digests[1], "", False, say) as other:
            assert held.exists() and other.exists()
        async with environments.use("w", digests[2], "", False, say):
            assert held.exists() and not other.exists()
    async with environments.use("w", digests[1], "", False, say) as other:
        assert not held.exists() and other.exists()
    with pytest.raises(StagingFailed, match="is gone"):
        async with environments.use("w", "f" * 64, "", False, say):
            pass
