"""Nodes that stand still, come back too late, or run full: what becomes of their runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import Embedded, embedded, finished, lines, recorded, submit, until, wait_for_state

from alveary import Run, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary.local.stack import trainers

# The first attempt works for a minute, the second is quick.
CODE = """
    import os, time
    attempt = os.environ["ALVEARY_ATTEMPT"]
    open("outputs/attempt.txt", "w").write(attempt)
    print("begun", attempt, flush=True)
    for _ in range(600 if attempt == "1" else 1):
        time.sleep(0.1)
        open("outputs/attempt.txt", "w").write(attempt)
    """


@pytest.fixture(scope="module")
def frail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("frail"), lease=3.0) as stack:
        yield stack


@pytest.fixture
def workspace(frail: Embedded) -> Workspace:
    return frail.workspace()


def tree(root: psutil.Process) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)]


def everything(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def moved(run: Run, tmp_path: Path) -> None:
    """It ended once, by its second attempt, and the first wrote nothing of what it has."""
    details = finished(run)
    assert details["attempt"] == 2 and "begun 2" in lines(run)
    assert Path(run.download_file("outputs/attempt.txt", str(tmp_path / "attempt.txt"))).read_text() == "2"
    events = recorded(run)
    assert [e.type for e in events if e.subject == run.id].count("run.completed") == 1
    assert not [e for e in events if e.subject == f"{run.id}-1" and e.type in ("attempt.finalizing", "attempt.finished")]


def test_a_local_node_that_stands_still_is_started_anew(frail: Embedded, workspace: Workspace, source: Path, tmp_path: Path) -> None:
    spec = AmlCompute.provisioning_configuration(max_nodes=1, cpus=1, idle_seconds_before_scaledown=2)
    ComputeTarget.create(workspace, "still", spec)
    run = submit(workspace, source, CODE, compute_target="still")
    until(lambda: "begun 1" in lines(run), "it runs")
    (trainer,) = [p for p in trainers(frail.state_dir) if p.environ()["ALVEARY_TARGET"] == "still"]
    stopped = tree(trainer)
    everything(stopped, signal.SIGSTOP)
    moved(run, tmp_path)
    everything(stopped[1:], signal.SIGCONT)
    until(lambda: not [p for p in stopped if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "nothing of it is left")


def test_a_paused_node_comes_back_too_late_and_cannot_write(frail: Embedded, workspace: Workspace, source: Path, tmp_path: Path) -> None:
    ComputeTarget.create(workspace, "two", AmlCompute.provisioning_configuration(kind="nodes"))
    like = trainers(frail.state_dir)[0].environ()
    started: dict[str, subprocess.Popen[bytes]] = {}

    def join(name: str) -> None:
        env = like | {"ALVEARY_TARGET": "two", "ALVEARY_NODE": name, "ALVEARY_STATE_DIR": str(tmp_path / name), "ALVEARY_NODE_CPUS": "1"}
        with (tmp_path / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen([sys.executable, "-m", "alveary_trainer"], env=env, stdout=log, stderr=log)

    try:
        join("a")
        run = submit(workspace, source, CODE, compute_target="two")
        until(lambda: "begun 1" in lines(run), "it runs on a")
        paused = tree(psutil.Process(started["a"].pid))
        everything(paused, signal.SIGSTOP)
        join("b")
        moved(run, tmp_path)
        everything(paused, signal.SIGCONT)
        until(lambda: not [p for p in paused[1:] if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "its processes are ended")
        moved(run, tmp_path)
        # It is welcome again.
        until(lambda: {n.id for n in ComputeTarget(workspace, "two").list_nodes()} == {"a", "b"}, "both are there")
    finally:
        for process in started.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in started.values():
            process.wait(30)


# Python reads it before anything else: a trainer that fails once in a place where nobody expects it.
WAITING = """
import os, time
while not os.path.exists({go!r}):
    time.sleep(0.05)
"""
BROKEN = """
import os, sys
marker = {marker!r}
if "alveary_trainer" in sys.orig_argv:
    from alveary_trainer import outputs
    original = outputs.OutputStore.store_all
    async def store_all(self, names):
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise LookupError("a bug")
        return await original(self, names)
    outputs.OutputStore.store_all = store_all
"""


def test_a_trainer_that_fails_on_one_run_goes_on_with_the_others(
    frail: Embedded, workspace: Workspace, source: Path, tmp_path: Path
) -> None:
    ComputeTarget.create(workspace, "alone", AmlCompute.provisioning_configuration(kind="nodes"))
    command = frail.cli("node", "token", "alone").stdout.split()
    (tmp_path / "sitecustomize.py").write_text(BROKEN.format(marker=str(tmp_path / "marker")))
    joining = [
        sys.executable,
        "-m",
        "alveary.cli",
        *command[1:],
        "--name",
        "alone-1",
        "--state-dir",
        str(tmp_path / "state"),
        "--cpus",
        "2",
    ]
    with (tmp_path / "log").open("wb") as log:
        node = subprocess.Popen(joining, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        neighbour = submit(workspace, source, WAITING.format(go=str(tmp_path / "go")), compute_target="alone", cpus=1)
        wait_for_state(neighbour, "Running")
        failing = submit(workspace, source, "print('here')", compute_target="alone", cpus=1)
        details = finished(failing, "Failed")
        assert details["attempt"] == 1 and details["exit"]["reason"] == "internal_error" and "a bug" in details["reason"]
        system = lines(failing, "system")
        assert "Traceback (most recent call last):" in system and any("LookupError: a bug" in line for line in system)
        finished(submit(workspace, source, "print('the next one')", compute_target="alone", cpus=1))
        (tmp_path / "go").touch()
        assert finished(neighbour)["attempt"] == 1 and node.poll() is None
    finally:
        node.terminate()
        assert node.wait(60) == 0
    until(lambda: ComputeTarget(workspace, "alone").list_nodes() == [], "it has left")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: only root can mount a small disk")
def test_a_full_disk_fails_the_run_with_a_reason_and_the_node_goes_on(tmp_path: Path, source: Path) -> None:
    small = tmp_path / "stack/trainer"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], check=True)
    try:
        with embedded(tmp_path / "stack") as stack:
            workspace = stack.workspace()
            run = submit(workspace, source, "open('outputs/big', 'wb').write(b'x' * (100 << 20))")
            details = finished(run, "Failed")
            assert "No space left on device" in "\n".join(details["exit"]["last_lines"])
            finished(submit(workspace, source, "print('room again')"))
    finally:
        subprocess.run(["umount", str(small)], check=True)
