"""Short names for folders with long ones."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveary_trainer import short_paths
from alveary_trainer.short_paths import LONGEST, ShortLinks, sockets


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In place of /tmp: a short folder of the test's own."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as folder:
        monkeypatch.setattr(short_paths, "folders", lambda: iter([Path(folder)]))
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_short_name_leads_to_the_folder_until_it_is_removed(base: Path, tmp_path: Path) -> None:
    runs = tmp_path / ("a-long-name-" * 12)
    (runs / "r-1/tmp").mkdir(parents=True)
    links = ShortLinks(runs)
    short = links.make(runs / "r-1/tmp")
    assert short == links.make(runs / "r-1/tmp") and short.parent == base and short.resolve() == (runs / "r-1/tmp").resolve()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")
    assert (runs / "r-1/tmp/s").exists()
    links.remove(runs / "r-1/tmp")
    links.remove(runs / "r-1/tmp")
    assert list(base.iterdir()) == []


def test_a_folder_with_a_short_name_keeps_it_and_one_without_a_place_has_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ShortLinks(base).make(base / "t") == base / "t"
    monkeypatch.setattr(short_paths, "folders", lambda: iter([tmp_path / "nowhere"]))
    assert ShortLinks(tmp_path).make(tmp_path / ("x" * 100)) == tmp_path / ("x" * 100)


def test_what_a_killed_node_left_goes_and_nothing_of_others(base: Path, tmp_path: Path) -> None:
    mine, other = tmp_path / ("mine" * 20), tmp_path / ("other" * 20)
    for folder in (mine / "tmp", other / "tmp", other / "gone"):
        folder.mkdir(parents=True)
    left, kept, dead = ShortLinks(mine).make(mine / "tmp"), ShortLinks(other).make(other / "tmp"), ShortLinks(other).make(other / "gone")
    (other / "gone").rmdir()
    (base / "alv-file").write_text("not a link")
    ShortLinks(mine).sweep()
    assert not left.is_symlink() and kept.is_symlink() and not dead.is_symlink() and (base / "alv-file").exists()


def test_sockets_lie_where_their_paths_are_short_enough(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 20)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = sockets(tmp_path)
    assert folder.is_relative_to(base) and len(str(folder)) < LONGEST and not long.exists()
    (folder / "left").touch()
    assert sockets(tmp_path) == folder and list(folder.iterdir()) == []
    with pytest.raises(RuntimeError, match=r"too long a path for sockets; set ALVEARY_SOCKETS_DIR"):
        sockets(tmp_path, long)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files of other users")
def test_a_folder_of_another_user_is_not_used(base: Path, tmp_path: Path) -> None:
    theirs = base / f"alveary-{os.getuid()}"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(RuntimeError, match="belongs to another user"):
        sockets(tmp_path)


def test_usual_folders_are_short() -> None:
    found = list(short_paths.folders())
    assert found and all(len(str(folder)) < 40 for folder in found)
