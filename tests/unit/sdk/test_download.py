"""Downloads: resumed, renewed, verified; all of them or none, and nothing of the user's is lost."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alveary import landing
from alveary.errors import AlvearyError
from alveary.transfer import Listing, Transfers
from alveary_contracts.common.v1 import common_pb2 as c


class Store:
    """An object store that misbehaves as it is told to."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        # Bytes that an answer has before it is cut, answer by answer; afterwards they are whole.
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.token, self.ranges = "1", True
        self.asked: list[tuple[str, str]] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, _, token = self.path.lstrip("/").partition("?")
                asked = self.headers.get("Range", "")
                store.asked.append((path, asked))
                status = store.statuses.pop(0) if store.statuses else 0
                if token != store.token or status:
                    self.send_response(status or 403)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = store.files[path]
                begin = int(re.findall(r"\d+", asked)[0]) if asked and store.ranges else 0
                self.send_response(206 if begin else 200)
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                cut = store.cuts.pop(0) if store.cuts else len(data)
                self.wfile.write(data[begin : begin + cut])
                if cut < len(data) - begin:
                    self.wfile.flush()
                    self.connection.shutdown(2)
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, path: str, data: bytes, shown: bytes | None = None) -> c.FileEntry:
        name = hashlib.sha256(path.encode()).hexdigest()
        self.files[name] = data
        shown = data if shown is None else shown
        return c.FileEntry(path=path, size=len(shown), sha256=hashlib.sha256(shown).hexdigest())

    def listing(self, *files: c.FileEntry) -> Listing:
        known = sorted(files, key=lambda f: f.path)

        def link(file: c.FileEntry) -> c.FileLink:
            name = hashlib.sha256(file.path.encode()).hexdigest()
            return c.FileLink(file=file, url=f"http://127.0.0.1:{self.server.server_port}/{name}?{self.token}")

        async def after(path: str) -> Sequence[c.FileLink]:
            return [link(f) for f in known if f.path > path][:3]

        return Listing(known, after)


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.server.shutdown()
    made.server.server_close()


async def test_all_files_come_with_their_folders_and_modes(store: Store, tmp_path: Path) -> None:
    files = [store.add(f"a/{n}/f", str(n % 3).encode()) for n in range(20)]
    files[0].executable = True
    seen: list[int] = []
    await Transfers().download_all(store.listing(*files), tmp_path / "to", seen.append)
    assert {p.relative_to(tmp_path / "to").as_posix() for p in (tmp_path / "to").rglob("*") if p.is_file()} == {f.path for f in files}
    assert os.access(tmp_path / "to/a/0/f", os.X_OK) and not os.access(tmp_path / "to/a/1/f", os.X_OK)
    assert sum(seen) == 20
    assert len({(tmp_path / f"to/{f.path}").stat().st_ino for f in files}) == 20  # equal files are files of their own


async def test_a_download_that_is_cut_goes_on_where_it_was(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    store.cuts = [1 << 20, 0, 1 << 20, 1 << 19]
    seen: list[int] = []
    await Transfers().download_all(store.listing(store.add("big", data)), tmp_path, seen.append)
    assert (tmp_path / "big").read_bytes() == data
    assert sum(seen) == len(data)
    assert [r for _, r in store.asked] == ["", *(f"bytes={n}-" for n in (1 << 20, 1 << 20, 2 << 20, (2 << 20) + (1 << 19)))]


async def test_a_store_that_knows_no_ranges_is_read_from_the_beginning(store: Store, tmp_path: Path) -> None:
    store.cuts, store.ranges = [100], False
    await Transfers().download_all(store.listing(store.add("a", data := os.urandom(1000))), tmp_path)
    assert (tmp_path / "a").read_bytes() == data


async def test_links_are_renewed_when_they_expired(store: Store, tmp_path: Path) -> None:
    files = [store.add(f"f{n}", os.urandom(100)) for n in range(5)]
    listing = store.listing(*files)
    bare = listing.links_after

    async def after(path: str) -> Sequence[c.FileLink]:
        links = await bare(path)
        store.token = "2"  # what was handed out is good for nothing
        return links

    listing.links_after = after
    await Transfers().download_all(listing, tmp_path)
    assert all((tmp_path / f.path).stat().st_size == 100 for f in files)


async def test_a_link_that_is_never_good_is_given_up(store: Store, tmp_path: Path) -> None:
    listing = store.listing(store.add("a", b"x"))
    store.token = "2"
    bare = listing.links_after

    async def after(path: str) -> Sequence[c.FileLink]:
        return [c.FileLink(file=link.file, url=link.url + "0") for link in await bare(path)]

    listing.links_after = after
    with pytest.raises(AlvearyError, match="download of a failed: the object store said 403"):
        await Transfers().download_all(listing, tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_what_came_before_a_failure_is_gone_on_with(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alveary.transfer._TRIES", 2)
    monkeypatch.setattr("alveary.transfer._PAUSE_SECONDS", 0.0)
    data = os.urandom(3 << 20)
    listing = store.listing(store.add("big", data))
    store.cuts = [1 << 20, 0, 0]
    with pytest.raises(AlvearyError, match="was cut 2 times"):
        await Transfers().download_all(listing, tmp_path / "to")
    (kept,) = (tmp_path / "to").iterdir()
    assert kept.name.startswith(".alveary-")
    store.asked.clear()
    await Transfers().download_all(listing, tmp_path / "to")
    assert store.asked[0][1] == f"bytes={1 << 20}-"
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["big"]
    assert (tmp_path / "to/big").read_bytes() == data


async def test_a_damaged_file_is_read_twice_and_leaves_nothing(store: Store, tmp_path: Path) -> None:
    files = [store.add("good", b"good"), store.add("bad", b"what came", b"expected!")]
    with pytest.raises(AlvearyError, match=r"bad is damaged in the object store: .*--verify") as caught:
        await Transfers().download_all(store.listing(*files), tmp_path / "to")
    assert caught.value.code == "DATA_LOSS"
    assert not (tmp_path / "to/good").exists() and not (tmp_path / "to/bad").exists()
    assert [p for p, _ in store.asked].count(hashlib.sha256(b"bad").hexdigest()) == 2


async def test_errors_of_the_server_that_pass_are_waited_for(store: Store, tmp_path: Path) -> None:
    store.statuses = [503, 500]
    await Transfers().download_all(store.listing(store.add("a", b"x")), tmp_path)
    assert (tmp_path / "a").read_bytes() == b"x"


async def test_other_files_of_the_same_names_are_not_touched_unasked(store: Store, tmp_path: Path) -> None:
    listing = store.listing(store.add("a", b"new"), store.add("sub/b", b"new"), store.add("same", b"same"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_bytes(b"mine")
    (tmp_path / "same").write_bytes(b"same")
    with pytest.raises(AlvearyError, match=r"nothing was downloaded: other files are there already: .*/sub/b\. .*--overwrite") as caught:
        await Transfers().download_all(listing, tmp_path)
    assert caught.value.code == "ALREADY_EXISTS"
    assert (tmp_path / "sub/b").read_bytes() == b"mine" and not (tmp_path / "a").exists()
    await Transfers().download_all(listing, tmp_path, overwrite=True)
    assert (tmp_path / "sub/b").read_bytes() == (tmp_path / "a").read_bytes() == b"new"
    store.asked.clear()
    await Transfers().download_all(listing, tmp_path)  # all of it is there
    assert store.asked == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a", "same", "sub"]


@pytest.mark.parametrize("overwrite", [False, True])
async def test_folders_and_files_in_the_way_refuse_all(store: Store, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AlvearyError, match=r"/a is a folder, where a file is needed"):
        await Transfers().download_all(store.listing(store.add("a", b"1"), store.add("b", b"2")), tmp_path, overwrite=overwrite)
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(AlvearyError, match=r"/c is a file, where a folder is needed"):
        await Transfers().download_all(store.listing(store.add("b", b"2"), store.add("c/d/e", b"1")), tmp_path, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "a/../../up", "a\\..\\up", "", "a//b", "x" * 256, "\0"])
async def test_names_that_lead_elsewhere_refuse_all(store: Store, tmp_path: Path, path: str) -> None:
    with pytest.raises(AlvearyError, match="nothing was downloaded") as caught:
        await Transfers().download_all(store.listing(store.add("a", b"1"), store.add(path, b"2")), tmp_path / "to")
    assert caught.value.code == "DATA_LOSS"
    assert list(tmp_path.iterdir()) == []


async def test_names_of_the_longest_kind_come(store: Store, tmp_path: Path) -> None:
    names = ["x" * 255, "é" * 127, "-rf", "a b'\"$(c)", "é/\u0301e", "CON", "new\nline"]
    await Transfers().download_all(store.listing(*(store.add(n, n.encode()) for n in names)), tmp_path)
    assert all((tmp_path / n).read_bytes() == n.encode() for n in names)


async def test_a_file_that_is_moved_into_place_half_way_is_moved_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = store.listing(store.add("a", b"new"), store.add("b", b"new"))
    (tmp_path / "a").write_bytes(b"mine")
    bare = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if Path(target).name == "b":
            raise OSError(errno.EIO, "Input/output error", str(target))
        return bare(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(AlvearyError, match="Input/output error"):
        await Transfers().download_all(listing, tmp_path, overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"mine" and not (tmp_path / "b").exists()
    monkeypatch.undo()
    await Transfers().download_all(listing, tmp_path, overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"new"


async def test_a_full_disk_is_a_sentence(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = c.FileEntry(path="huge", size=1 << 60, sha256="0" * 64)
    with pytest.raises(AlvearyError, match="MB of space left") as caught:
        await Transfers().download_all(store.listing(huge), tmp_path / "to")
    assert caught.value.code == "RESOURCE_EXHAUSTED" and list(tmp_path.iterdir()) == []

    def full(self: object, data: bytes) -> None:
        raise landing._failed(tmp_path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(landing.Piece, "write", full)
    with pytest.raises(AlvearyError, match="has no space left"):
        await Transfers().download_all(store.listing(store.add("a", b"x")), tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


async def test_two_downloads_of_the_same_into_the_same_folder_do_not_mix(store: Store, tmp_path: Path) -> None:
    file = store.add("a", b"x")
    first = landing.Landing(tmp_path, [landing.Wanted(file, "a")], False)
    first.open()
    with pytest.raises(AlvearyError, match="another download of the same files"):
        await Transfers().download_all(store.listing(file), tmp_path)
    first.close()
    await Transfers().download_all(store.listing(file), tmp_path)


async def test_names_that_differ_in_case_alone_are_refused_where_they_are_one_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = store.listing(store.add("Model.pt", b"1"), store.add("model.pt", b"2"))
    await Transfers().download_all(listing, tmp_path / "linux")
    assert (tmp_path / "linux/Model.pt").read_bytes() == b"1"
    bare = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.name == "cASE" or bare(self))
    with pytest.raises(AlvearyError, match=r"'Model.pt' and 'model.pt' are the same file"):
        await Transfers().download_all(listing, tmp_path / "mac")
    assert not (tmp_path / "mac").exists()
