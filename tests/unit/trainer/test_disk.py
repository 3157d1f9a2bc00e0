"""Who fills a disk, and how much a folder holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alveary_core import disk as core
from alveary_trainer import disk
from alveary_trainer.disk import DiskWatch, Occupant, usage

MIB = 1 << 20


def test_usage_counts_what_files_occupy_and_hard_links_once(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/f").write_bytes(os.urandom(MIB))
    os.link(tmp_path / "deep/er/f", tmp_path / "again")
    with (tmp_path / "sparse").open("wb") as opened:
        opened.truncate(100 * MIB)
    (tmp_path / "away").symlink_to("/usr")
    assert MIB <= usage(tmp_path) < 2 * MIB
    assert usage(tmp_path / "nothing") == 0


class Node:
    """A node of which the disk and the folders are what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.free, self.sizes, self.ended, self.live = 10_000 * MIB, dict[str, int](), dict[str, str](), set[str]()
        self.watch = DiskWatch("n", [folder], MIB, 1.0, self.occupants)
        monkeypatch.setattr(disk, "look", lambda path, *_: core.Disk(path, 20_000 * MIB, self.free, 1000 * MIB))
        monkeypatch.setattr(disk, "usage", lambda path: self.sizes[path.name] * MIB)
        monkeypatch.setattr(disk, "_SHARE", 1e9)

    def occupants(self) -> list[Occupant]:
        return [Occupant(n, Path(n), lambda text, n=n: self.ended.update({n: text}), n in self.live) for n in self.sizes]  # type: ignore[misc]

    async def step(self, free: int, **sizes: int) -> None:
        self.free, self.sizes = free * MIB, sizes
        self.live = set(sizes) - set(self.ended)
        self.watch._measure_at = 0.0
        await self.watch.step()


async def test_the_one_whose_folder_grew_is_ended_not_the_largest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = Node(monkeypatch, tmp_path)
    await node.step(9000, large=5000, small=10)
    assert node.watch.problem == "" and not node.watch.fault()
    await node.step(900, large=5000, small=8110)
    assert "less than 1000.0 MiB" in node.watch.problem and not node.ended, "nothing new is taken, and nobody is ended yet"
    await node.step(400, large=5000, small=8610)
    assert list(node.ended) == ["small"]
    assert node.ended["small"] == (
        "it filled the disk of node n: its folder grew by 8.4 GiB to 8.4 GiB, and 400.0 MiB of 19.5 GiB were left"
    )
    assert node.watch.fault() == "the disk of node n was full"
    await node.step(9000, large=5000)
    assert node.watch.problem == "" and node.watch.fault(), "servers may still be starting anew"
    node.watch._critical_at -= 30
    assert not node.watch.fault()


async def test_nobody_is_ended_for_what_others_than_runs_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = Node(monkeypatch, tmp_path)
    await node.step(9000, one=5000)
    await node.step(100, one=5000)
    assert node.watch.problem and not node.ended
    await node.step(0)
    assert node.watch.problem and not node.ended


async def test_they_are_ended_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node = Node(monkeypatch, tmp_path)
    await node.step(9000, one=10, two=10)
    await node.step(100, one=6000, two=3000)
    await node.step(90, one=6000, two=3010)
    assert list(node.ended) == ["one"], "its folder goes first"
    await node.step(80, two=3020)
    assert list(node.ended) == ["one", "two"]


async def test_a_disk_that_cannot_be_looked_at_takes_no_runs(tmp_path: Path) -> None:
    watch = DiskWatch("n", [tmp_path / "gone"], MIB, 1.0, list)
    await watch.step()
    assert "cannot be looked at" in watch.problem
