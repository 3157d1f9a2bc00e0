"""The object store port on a real S3 server."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import AsyncIterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import urllib3

from alveary.local.layout import Layout
from alveary.transfer import Transfers
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import new_id
from alveary_core.blobs import Blobs
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable
from alveary_core.objectstore import DigestMismatch, ObjectStore


@pytest.fixture
async def store(bare_servers: Layout) -> AsyncIterator[ObjectStore]:
    opened = ObjectStore(f"127.0.0.1:{bare_servers.ports.s3}", bare_servers.secrets["s3_access"], bare_servers.secrets["s3_secret"])
    await opened.ensure_buckets()
    yield opened
    opened.close()


async def test_large_files_go_up_in_parts_and_come_down_verified(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(40 << 20)
    (tmp_path / "a").write_bytes(data)
    seen: list[int] = []
    entry = await store.put_file("runs", key := f"t/{new_id()}", tmp_path / "a", seen.append)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert entry.size == len(data) == sum(seen)
    await store.get_file("runs", key, tmp_path / "b", entry.sha256)
    assert (tmp_path / "b").read_bytes() == data
    assert await store.get("runs", key, offset=10, length=5) == data[10:15]


async def test_a_wrong_digest_leaves_nothing_behind(store: ObjectStore, tmp_path: Path) -> None:
    await store.put("runs", key := f"t/{new_id()}", b"x")
    with pytest.raises(DigestMismatch):
        await store.get_file("runs", key, tmp_path / "b", "0" * 64)
    assert list(tmp_path.iterdir()) == []


async def test_missing_objects_are_not_found(store: ObjectStore) -> None:
    with pytest.raises(NotFound):
        await store.get("runs", "nothing/here")
    assert await store.size("runs", "nothing/here") is None
    await store.delete("runs", ["nothing/here"])


async def test_copies_listings_and_unicode_keys(store: ObjectStore) -> None:
    prefix = f"t/{new_id()}/"
    await store.put("runs", prefix + "ümläut ☃.txt", b"x")
    await store.copy("models", prefix + "copy", "runs", prefix + "ümläut ☃.txt")
    assert await store.keys("runs", prefix) == [prefix + "ümläut ☃.txt"]
    assert await store.get("models", prefix + "copy") == b"x"


async def test_presigned_links_work_and_expire_by_signature(store: ObjectStore) -> None:
    http = urllib3.PoolManager()
    key = f"t/{new_id()}"
    assert http.request("PUT", store.put_url("runs", key), body=b"abc").status == 200
    url = store.get_url("runs", key)
    assert http.request("GET", url).data == b"abc"
    assert http.request("GET", url.replace(key, f"{key}x")).status == 403
    assert http.request("GET", url.split("?")[0]).status == 403


async def test_blobs_that_are_missing_are_named(store: ObjectStore) -> None:
    data = os.urandom(10)
    digest = hashlib.sha256(data).hexdigest()
    files = [c.FileEntry(path="there", size=10, sha256=digest), c.FileEntry(path="gone", size=1, sha256="1" * 64)]
    await store.put("datasets", f"blobs/{digest}", data)
    blobs = Blobs(store, "datasets")
    assert [f.path for f in await blobs.missing(files)] == ["gone"]
    with pytest.raises(FailedPrecondition, match="'gone' first"):
        await blobs.require(files)


async def test_wrong_credentials_are_an_error_with_the_servers_words(bare_servers: Layout) -> None:
    wrong = ObjectStore(f"127.0.0.1:{bare_servers.ports.s3}", "nobody", "wrong")
    with pytest.raises(Unavailable, match="InvalidAccessKeyId|AccessDenied|SignatureDoesNotMatch"):
        await wrong.put("runs", "x", b"")
    wrong.close()


class Away(BaseHTTPRequestHandler):
    """A proxy whose object store is away twice, and then takes what it gets."""

    asked = 0

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Away.asked += 1
        self.send_response(502 if Away.asked % 3 else 200)
        self.send_header("Content-Length", "0")
        if Away.asked % 3 == 0:
            self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


async def test_a_proxy_that_does_not_reach_the_store_is_asked_again(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Away)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store = ObjectStore(f"127.0.0.1:{server.server_port}", "a", "b")
    try:
        await store.put("runs", "x", b"hello")
        assert Away.asked == 3
        (tmp_path / "x").write_bytes(b"hello")
        digest = hashlib.sha256(b"hello").hexdigest()
        entry = c.FileEntry(path="x", size=5, sha256=digest)
        slot = c.UploadSlot(sha256=digest, url=f"http://127.0.0.1:{server.server_port}/x")

        async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
            return [slot], 0

        await Transfers().upload(prepare, c.Manifest(files=[entry]), {"x": tmp_path / "x"})
        assert Away.asked == 6
    finally:
        store.close()
        server.shutdown()
        server.server_close()
