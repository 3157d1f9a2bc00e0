"""Files by content, on a real object store: what is under a digest is what the digest says, whoever wrote it and however."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import urllib3

from alveary.errors import AlvearyError
from alveary.local.layout import Layout
from alveary.transfer import Prepare, Transfers
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import new_id
from alveary_core import blobs as module
from alveary_core.blobs import Blobs, sizes
from alveary_core.errors import InvalidArgument
from alveary_core.objectstore import FileChanged, ObjectStore

BUCKET = "datasets"
HTTP = urllib3.PoolManager(retries=False)


@pytest.fixture
async def store(bare_servers: Layout) -> AsyncIterator[ObjectStore]:
    opened = ObjectStore(f"127.0.0.1:{bare_servers.ports.s3}", bare_servers.secrets["s3_access"], bare_servers.secrets["s3_secret"])
    await opened.ensure_buckets()
    yield opened
    opened.close()


@pytest.fixture
def blobs(store: ObjectStore) -> Blobs:
    return Blobs(store, BUCKET)


def file(data: bytes, path: str = "f") -> c.FileEntry:
    return c.FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def put(slot: c.UploadSlot, data: bytes, **headers: str) -> int:
    sent = {**slot.headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
    return HTTP.request("PUT", slot.url, body=data, headers={k: v for k, v in sent.items() if v}).status


def preparing(blobs: Blobs, asked: list[int] | None = None) -> Prepare:
    async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
        if asked is not None:
            asked.append(len(files))
        found = await blobs.prepare(files)
        return found.slots, found.pending

    return prepare


async def test_a_link_takes_the_very_content_it_was_made_for_and_once(blobs: Blobs, store: ObjectStore) -> None:
    data, other = os.urandom(1000), os.urandom(1000)
    (slot,) = (await blobs.prepare([file(data)])).slots
    assert put(slot, other) == 400
    assert put(slot, data[:500], content_length="500") in (400, 403)
    assert put(slot, data, x_amz_checksum_sha256="") == 403
    assert put(slot, data, if_none_match="") == 403
    assert await store.size(BUCKET, f"blobs/{slot.sha256}") is None
    assert put(slot, data) == 200
    assert put(slot, data) == 412
    assert put(slot, other) in (400, 412)
    assert await store.get(BUCKET, f"blobs/{slot.sha256}") == data
    assert (await blobs.prepare([file(data)])).slots == []


async def test_large_files_come_in_parts_which_count_after_they_were_read(
    blobs: Blobs, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PARTS_FROM", 1 << 20)
    monkeypatch.setattr(module, "_PART", 5 << 20)
    (tmp_path / "big").write_bytes(data := os.urandom((12 << 20) + 7))
    entry = file(data, "big")
    (slot,) = (await blobs.prepare([entry])).slots
    assert [(p.offset, p.size) for p in slot.parts] == [(0, 5 << 20), (5 << 20, 5 << 20), (10 << 20, (2 << 20) + 7)]
    # One part came before the upload was cut: only the others are asked for, also of a process that knows nothing of it.
    first = slot.parts[0]
    assert HTTP.request("PUT", first.url, body=data[: first.size]).status == 200
    again = Blobs(store, BUCKET)
    (slot,) = (await again.prepare([entry])).slots
    assert [p.offset for p in slot.parts] == [5 << 20, 10 << 20]
    seen: list[tuple[int, int]] = []
    await Transfers().upload(preparing(again), c.Manifest(files=[entry]), {"big": tmp_path / "big"}, lambda *n: seen.append(n))
    assert await store.digest(BUCKET, f"blobs/{entry.sha256}") == entry.sha256
    assert seen[-1] == (entry.size, entry.size)
    assert await store.keys(BUCKET, f"incoming/{entry.sha256}") == []
    assert await store.uploads(BUCKET, f"incoming/{entry.sha256}") == []


async def test_parts_that_make_something_else_do_not_count(blobs: Blobs, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARTS_FROM", 1000)
    data = os.urandom(5000)
    entry = file(data)
    for content in (os.urandom(5000), data):
        (slot,) = (await blobs.prepare([entry])).slots
        assert HTTP.request("PUT", slot.parts[0].url, body=content).status == 200
        async with asyncio.timeout(60):
            while (found := await blobs.prepare([entry])).pending:
                pass
        assert bool(found.slots) == (content != data)
    assert await store.get(BUCKET, f"blobs/{entry.sha256}") == data


async def test_where_the_store_does_not_check_what_came_is_read_first(blobs: Blobs, store: ObjectStore, tmp_path: Path) -> None:
    blobs._enforced = False
    (tmp_path / "a").write_bytes(b"small")
    entry = file(b"small", "a")
    (slot,) = (await blobs.prepare([entry])).slots
    assert len(slot.parts) == 1 and not slot.url
    await Transfers().upload(preparing(blobs), c.Manifest(files=[entry]), {"a": tmp_path / "a"})
    assert await store.get(BUCKET, f"blobs/{entry.sha256}") == b"small"


async def test_a_blob_that_is_wrong_is_set_aside_and_the_right_one_takes_its_place(blobs: Blobs, store: ObjectStore) -> None:
    right = os.urandom(100)
    entry = file(right)
    for wrong, doubted in ((right[:50], ()), (os.urandom(100), (entry.sha256,))):
        await store.put(BUCKET, f"blobs/{entry.sha256}", wrong)
        async with asyncio.timeout(60):
            found = await blobs.prepare([entry], doubted)
            while not found.slots:
                found = await blobs.prepare([entry])
        assert put(found.slots[0], right) == 200
        assert await store.get(BUCKET, f"blobs/{entry.sha256}") == right
    assert len(await store.keys(BUCKET, f"damaged/{entry.sha256}-")) == 2
    # What is right stays, whoever doubts it.
    assert (await blobs.prepare([entry], [entry.sha256])).slots == []
    assert len(await store.keys(BUCKET, f"damaged/{entry.sha256}-")) == 2


@pytest.mark.parametrize("change", ["content", "shorter", "longer", "gone"])
@pytest.mark.parametrize("size", [1000, 9 << 20])
async def test_a_file_that_changes_while_it_is_uploaded_is_named(
    blobs: Blobs, store: ObjectStore, tmp_path: Path, size: int, change: str
) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(data := os.urandom(size))
    entry = file(data, "weights.pt")
    match change:
        case "content":
            path.write_bytes(os.urandom(size))
        case "shorter":
            path.write_bytes(data[: size // 2])
        case "longer":
            path.write_bytes(os.urandom(3) + data)
        case "gone":
            path.unlink()
    with pytest.raises(AlvearyError, match=r"weights\.pt (changed|vanished) while it was uploaded"):
        await Transfers().upload(preparing(blobs), c.Manifest(files=[entry]), {"weights.pt": path})
    assert await store.size(BUCKET, f"blobs/{entry.sha256}") is None
    # The right content can be stored afterwards.
    path.write_bytes(data)
    await Transfers().upload(preparing(blobs), c.Manifest(files=[entry]), {"weights.pt": path})
    assert await store.digest(BUCKET, f"blobs/{entry.sha256}") == entry.sha256


async def test_links_that_expired_are_asked_for_again(blobs: Blobs, store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data := os.urandom(100))
    entry, asked = file(data, "a"), list[int]()
    fresh = preparing(blobs, asked)

    async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
        slots, pending = await fresh(files)
        if len(asked) == 1:
            slots[0].url = slots[0].url.replace("X-Amz-Expires=3600", "X-Amz-Expires=1")  # the signature does not fit any more: 403
        return slots, pending

    await Transfers().upload(prepare, c.Manifest(files=[entry]), {"a": tmp_path / "a"})
    assert len(asked) == 2
    assert await store.get(BUCKET, f"blobs/{entry.sha256}") == data


async def test_a_link_that_is_refused_for_ever_is_given_up_with_the_file(blobs: Blobs, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data := os.urandom(100))
    entry = file(data, "a")
    fresh = preparing(blobs)

    async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
        slots, pending = await fresh(files)
        slots[0].url += "0"
        return slots, pending

    with pytest.raises(AlvearyError, match=r"/a was uploaded 4 times, and is not there"):
        await Transfers().upload(prepare, c.Manifest(files=[entry]), {"a": tmp_path / "a"})


async def test_questions_are_bounded_and_contradictions_refused(blobs: Blobs) -> None:
    with pytest.raises(InvalidArgument, match="at most 10000 at once"):
        await blobs.prepare([file(b"x")] * 10_001)
    with pytest.raises(InvalidArgument, match="another size"):
        await blobs.prepare([file(b"x"), c.FileEntry(path="g", size=2, sha256=file(b"x").sha256)])


async def test_empty_files_need_no_upload(blobs: Blobs) -> None:
    assert (await blobs.prepare([file(b"")])).slots == []


async def test_many_blobs_are_found_in_listings(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DENSE", 3)
    there = [file(f"{new_id()}".encode()) for _ in range(300)]
    await module.each(lambda f: store.put(BUCKET, f"blobs/{f.sha256}", b"x" * 26), there)
    absent = [hashlib.sha256(new_id().encode()).hexdigest() for _ in range(300)]
    calls = 0
    bare = store.page

    async def counted(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        return await bare(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "page", counted)
    found = await sizes(store, BUCKET, [*(f.sha256 for f in there), *absent])
    assert {d: s for d, s in found.items() if s == 26} == {f.sha256: 26 for f in there}
    assert not set(found) & set(absent)
    assert calls <= 32


async def test_blobs_are_copied_for_as_long_as_a_call_may_take(blobs: Blobs, store: ObjectStore) -> None:
    data = [os.urandom(20) for _ in range(30)]
    files = [file(d, f"{n}") for n, d in enumerate(data)]
    prefix = f"t/{new_id()}/"
    for entry, content in zip(files, data, strict=True):
        await store.put("runs", prefix + entry.path, content)
    sources = {f.sha256: prefix + f.path for f in files}
    assert await blobs.take(files, "runs", sources, patience=0.0) == 30
    assert await blobs.take(files, "runs", sources) == 0
    assert await blobs.missing(files) == []


async def test_a_file_that_changes_while_the_trainer_stores_it_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(40 << 20))
    wrong = "0" * 64
    for name, size in (("a", 40 << 20), ("b", 10)):
        (tmp_path / name).write_bytes(os.urandom(size))
        with pytest.raises(FileChanged, match=f"/{name} changed while it was stored"):
            await store.put_file(BUCKET, f"blobs/{wrong}", tmp_path / name, sha256=wrong)
        assert await store.size(BUCKET, f"blobs/{wrong}") is None
    assert await store.uploads(BUCKET, f"blobs/{wrong}") == []
    with pytest.raises(FileChanged, match=r"/none vanished while it was stored"):
        await store.put_file(BUCKET, "x", tmp_path / "none")


async def test_a_large_file_that_shrinks_while_it_is_stored_is_named(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(os.urandom(40 << 20))
    begun = threading.Event()
    bare = store._send

    def send(*arguments: object) -> str:
        if not begun.is_set():
            os.truncate(tmp_path / "a", 1000)
            begun.set()
        return bare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_send", send)
    monkeypatch.setattr("alveary_core.objectstore._PART", 5 << 20)
    store._buffers = threading.BoundedSemaphore(1)  # the second part is read after the first was sent
    with pytest.raises(FileChanged, match=r"/a shrank from 41943040 to \d+ bytes"):
        await store.put_file("runs", f"t/{new_id()}", tmp_path / "a")
