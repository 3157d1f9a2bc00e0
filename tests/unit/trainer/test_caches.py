"""The node's caches: verified, shared, evicted least recently used by size."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import MemoryStore

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_json
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.runtime import StagingFailed
from alveary_trainer.content_cache import ContentCache


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


async def get(datasets: ContentCache, digest: str, said: list[str] | None = None) -> Path:
    async def say(text: str) -> None:
        assert said is not None, text
        said.append(text)

    async with datasets.use(digest, say) as folder:
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


def change_in_place(folder: Path) -> None:
    (folder / "a.csv").chmod(0o644)
    (folder / "a.csv").write_bytes(b"evil")


def change_and_set_the_time_back(folder: Path) -> None:
    stamp = (folder / "a.csv").stat().st_mtime_ns
    change_in_place(folder)
    (folder / "a.csv").chmod(0o444)
    os.utime(folder / "a.csv", ns=(stamp, stamp))


def replace(folder: Path) -> None:
    (folder / "new").write_bytes(b"evil")
    (folder / "new").rename(folder / "a.csv")


def through_a_link(folder: Path) -> None:
    (folder / "deep").chmod(0o755)
    os.link(folder / "deep/b.csv", folder.parent / ".mine")
    (folder.parent / ".mine").chmod(0o644)
    (folder.parent / ".mine").write_bytes(b"good")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (change_in_place, "1 files changed (a.csv)"),
        (change_and_set_the_time_back, "1 files changed (a.csv)"),
        (replace, "1 files changed (a.csv)"),
        (lambda folder: (folder / "deep/b.csv").unlink(), "1 files are missing"),
        (lambda folder: (folder / "extra.csv").write_bytes(b"x"), "1 files changed (extra.csv)"),
        (lambda folder: (folder / "a.csv").chmod(0o777), "1 files changed (a.csv)"),
        (through_a_link, "1 files changed (deep/b.csv)"),
        (lambda folder: (folder / "link").symlink_to("/etc"), "1 files changed (link)"),
    ],
)
async def test_what_a_run_changed_of_its_inputs_is_fetched_anew_and_said(tmp_path: Path, how: Callable[[Path], object], words: str) -> None:
    store = MemoryStore()
    files = {"a.csv": b"good", "deep/b.csv": b"1234"}
    digest = await folder_of(store, files)
    datasets, said = cache(tmp_path, store), list[str]()
    folder = await get(datasets, digest)
    for root in (folder, folder / "deep"):
        root.chmod(0o755)
    assert await get(datasets, digest) == folder
    how(folder)
    assert await get(datasets, digest, said) == folder
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files
    assert len(said) == 1 and words in said[0] and digest[:12] in said[0], said
    await get(datasets, digest)
    assert not [name for name in visible(tmp_path) if name.startswith(".changed")]


async def test_byte_code_beside_modules_is_no_change(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = await folder_of(store, {"m.py": b"x = 1"})
    datasets = cache(tmp_path, store)
    folder = await get(datasets, digest)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/m.pyc").write_bytes(b"x")
    await get(datasets, digest)


async def test_a_changed_folder_that_others_use_is_replaced_under_them_and_removed_after_them(tmp_path: Path) -> None:
    store = MemoryStore()
    digest, other = await folder_of(store, {"a.csv": b"good"}), await folder_of(store, {"b": b"x"})
    datasets, neighbour, said = cache(tmp_path, store), cache(tmp_path, store), list[str]()
    async with neighbour.use(digest) as held:
        opened = (held / "a.csv").open("rb")
        change_in_place(held)
        both = await asyncio.gather(get(datasets, digest, said), get(cache(tmp_path, store), digest, said))
        assert both == [held, held] and (held / "a.csv").read_bytes() == b"good" and opened.read() == b"evil" and len(said) == 1  # type: ignore[comparison-overlap]
        assert [name for name in visible(tmp_path) if name.startswith(".changed")], "taken from under a run"
        opened.close()
    await get(datasets, other)
    assert sorted(visible(tmp_path)) == sorted([digest, other])


async def test_a_folder_without_a_record_is_not_trusted(tmp_path: Path) -> None:
    store = MemoryStore()
    digest = await folder_of(store, {"a.csv": b"good"})
    datasets, said = cache(tmp_path, store), list[str]()
    folder = await get(datasets, digest)
    (tmp_path / ".locks" / f"{digest}.record").write_text("[")
    assert await get(datasets, digest, said) == folder and "no record" in said[0]


async def test_an_environment_that_a_run_changed_is_installed_anew(tmp_path: Path) -> None:
    store, digest = MemoryStore(), "1" * 64
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lock = {"python_version": version, "requirements": "", "packages": [], "wheels": []}
    await store.put("images", f"locks/w/{digest}.json", json.dumps(lock).encode())
    said: list[str] = []

    async def say(text: str) -> None:
        said.append(text)

    environments = Environments(tmp_path, 1 << 40, store)  # type: ignore[arg-type]
    async with environments.use("w", digest, "", False, say) as python:
        site = next(python.parents[1].glob("lib/python*/site-packages"))
        # As another environment with the same packages would: uv links their files.
        os.link(python.parents[1] / "pyvenv.cfg", tmp_path / ".elsewhere")
    said.clear()
    async with environments.use("w", digest, "", False, say):
        assert said == []
        (site / "numpy.py").write_text("evil = True")
    async with environments.use("w", digest, "", False, say):
        assert not (site / "numpy.py").exists() and "numpy.py" in said[0] and "installed again" in said[0]
