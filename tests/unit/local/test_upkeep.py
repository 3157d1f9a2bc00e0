"""What a supervisor looks after: servers that refuse to write, and logs that grow."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest

from alveary.local.upkeep import ServerWatch, cut, last_lines
from alveary_core.disk import Disk

MIB = 1 << 20


def disk(free: int) -> Disk:
    return Disk(Path("/d"), 1000 * MIB, free * MIB, 40 * MIB)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def complain(log: Path) -> None:
    with log.open("a") as opened:
        opened.write("[ERR] JetStream failed to store a msg on stream 'A': write 1.blk: no space left on device\n")


def test_a_server_that_complained_is_started_anew_once_there_is_space(tmp_path: Path, clock: list[float]) -> None:
    log = tmp_path / "nats.log"
    complain(log)
    watch = ServerWatch(log)
    assert not watch.look(disk(500)), "an earlier life's complaints do not count"
    complain(log)
    assert not watch.look(disk(10)), "it would refuse again"
    assert watch.look(disk(500))
    watch.restarted()
    clock[0] += 1000
    assert not watch.look(disk(500))


def test_a_server_that_could_not_even_complain_is_started_anew(tmp_path: Path, clock: list[float]) -> None:
    watch = ServerWatch(tmp_path / "none.log")
    assert not watch.look(disk(500))
    assert not watch.look(disk(0))
    assert watch.look(disk(500))


def test_a_server_that_goes_on_complaining_is_started_more_and_more_seldom(tmp_path: Path, clock: list[float]) -> None:
    log = tmp_path / "nats.log"
    watch = ServerWatch(log)
    watch.look(disk(500))
    times = []
    for _ in range(4000):
        clock[0] += 1
        complain(log)
        if watch.look(disk(500)):
            watch.restarted()
            times.append(clock[0])
    pauses = [b - a for a, b in pairwise(times)]
    assert pauses == sorted(pauses) and pauses[0] <= 10 and pauses[-1] == 300


def test_each_time_that_the_disk_was_full_the_server_is_soon_back(tmp_path: Path, clock: list[float]) -> None:
    watch = ServerWatch(tmp_path / "nats.log")
    for _ in range(5):
        assert not watch.look(disk(0))
        clock[0] += 6
        assert watch.look(disk(500))
        watch.restarted()
        clock[0] += 1


def test_a_log_is_cut_in_place_to_whole_lines_and_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with log.open("ab", buffering=0) as writer:
        for number in range(1000):
            writer.write(b"line %d\n" % number)
        assert not cut(log, limit=1 << 20)
        assert cut(log, limit=5000, kept=1000)
        writer.write(b"line 1000\n")
    lines = log.read_text().splitlines()
    assert lines[0] == "... cut by the supervisor ..." and len(lines) < 120
    assert lines[1:] == [f"line {n}" for n in range(1001 - len(lines[1:]), 1001)]
    assert not cut(tmp_path / "none.log")
    assert last_lines(log, 2) == "line 999\nline 1000" and last_lines(tmp_path / "none.log") == ""
