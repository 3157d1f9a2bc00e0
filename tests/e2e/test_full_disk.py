"""A disk that is full: who fills it is ended, everybody else waits and goes on, and nothing has to be restarted by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Embedded, embedded, fill, finished, let_go, lines, processes_of, small_disk, submit, until, wait_for_state

from alveary.errors import AlvearyError

WAITS = """
    import pathlib, time
    pathlib.Path("outputs/before.txt").write_text("before")
    print("waiting", flush=True)
    while not pathlib.Path("go").exists(): time.sleep(0.05)
    pathlib.Path("outputs/after.txt").write_text("after")
    print("done", flush=True)
"""
# Goes on when it is told that there is no space, as a data loader or a cache does.
FILLS = """
    import time
    file = open("outputs/big", "ab", buffering=0)
    for size in (1 << 20, 1 << 12):
        try:
            while True: file.write(b"x" * size)
        except OSError as error: print(error, flush=True)
    while True: time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A stack on a disk of its own, of 400 MiB, of which 20 are the reserve."""
    folder = tmp_path_factory.mktemp("tight") / "disk"
    with small_disk(folder, 400), embedded(folder / "state", lease=20.0) as stack:
        yield stack


@pytest.fixture(autouse=True)
def emptied(tight: Embedded) -> Iterator[None]:
    """One test's ballast never weighs on the next."""
    yield
    (tight.state_dir.parent / "ballast").unlink(missing_ok=True)


def test_the_run_that_fills_the_disk_is_ended_and_its_neighbour_goes_on(tight: Embedded, source: Path, tmp_path: Path) -> None:
    workspace = tight.workspace()
    neighbour = submit(workspace, source, WAITS, experiment="neighbour", cpus=0.1)
    wait_for_state(neighbour, "Running")
    supervisor = tight.process.pid
    greedy = tmp_path / "greedy"
    greedy.mkdir()
    filling = submit(workspace, greedy, FILLS, experiment="greedy", cpus=0.1)
    details = finished(filling, "Failed")
    assert details["exit"]["reason"] == "disk_full", details
    assert "it filled the disk of node local-0: its folder grew by" in details["exit"]["message"]
    assert "its outputs are not stored" in details["exit"]["message"]
    assert neighbour.get_status() == "Running"
    let_go(tight, neighbour)
    finished(neighbour)
    assert lines(neighbour) == ["waiting", "done"]
    assert {"outputs/before.txt", "outputs/after.txt"} <= set(neighbour.get_file_names())
    assert tight.process.poll() is None and tight.process.pid == supervisor


def test_what_is_full_recovers_by_itself(tight: Embedded, source: Path, tmp_path: Path) -> None:
    workspace = tight.workspace()
    neighbour = submit(workspace, source, WAITS.replace("after.txt", "before.txt"), experiment="neighbour", cpus=0.1)
    wait_for_state(neighbour, "Running")
    ballast = fill(tight.state_dir.parent)
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.bin").write_bytes(os.urandom(100_000))

    def refused() -> bool:
        try:
            submit(workspace, other, "print('new')", experiment="refused")
        except AlvearyError as error:
            assert error.code == "RESOURCE_EXHAUSTED" and "are free on the disk of" in str(error), error
            return True
        return False

    until(refused, "uploads are refused")
    told = tight.cli("status", "--json").stdout
    assert "are free on the disk of" in told
    shown = tight.cli("status").stdout
    assert "trouble: less than" in shown and "version " in shown and "nodes: 1" in shown
    nodes = tight.cli("compute", "nodes", "--json").stdout
    until(lambda: '"cordoned"' in tight.cli("compute", "nodes", "--json").stdout, f"the node is cordoned: {nodes}")
    let_go(tight, neighbour)
    until(lambda: not processes_of(neighbour), "the neighbour has ended, and its output has nowhere to go")
    ballast.unlink()
    finished(neighbour)
    assert "outputs/before.txt" in neighbour.get_file_names()
    assert lines(neighbour) == ["waiting", "done"]
    new = submit(workspace, other, "print('new')", experiment="new")
    finished(new)
    assert lines(new) == ["new"]
    assert '"cordoned"' not in tight.cli("compute", "nodes", "--json").stdout


def test_with_less_than_the_reserve_new_runs_wait_and_say_why(tight: Embedded, source: Path) -> None:
    workspace = tight.workspace()
    finished(submit(workspace, source, "print(1)"))  # its source is there from now on: no upload is needed
    ballast = fill(tight.state_dir.parent, leave=15 << 20)
    until(lambda: '"cordoned"' in tight.cli("compute", "nodes", "--json").stdout, "the node is cordoned")
    waiting = submit(workspace, source, "print(1)")
    until(lambda: "are free on the disk of" in tight.cli("run", "why", waiting.id).stdout, "the run says why it waits")
    assert waiting.get_status() == "Queued"
    ballast.unlink()
    finished(waiting)


def test_a_start_on_a_full_disk_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        fill(disk)
        stack = Embedded(disk / "state", None)  # type: ignore[arg-type]
        for detached in ([], ["--detach"]):
            done = stack.cli("up", "--state-dir", str(disk / "state"), "--port", "0", *detached, check=False)
            assert done.returncode == 1 and "cannot be" in done.stderr and "No space left on device" in done.stderr, done
            assert "Traceback" not in done.stderr
