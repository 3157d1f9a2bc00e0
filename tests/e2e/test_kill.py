"""kill -9 of every process, one at a time, with services as processes of their own: nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import FINAL, Embedded, embedded, finished, halt, launch, lines, recorded, submit, tail, until, wait_for_state

from alveary import Environment, Run, Workspace

# Prints numbered lines, waits in the middle until it is told to go on, and leaves an output.
SCRIPT = """
    import os, sys, time
    from alveary import Run
    run = Run.get_context()
    for i in range(200):
        print(i, flush=True)
        run.log("i", i, step=i)
    deadline = time.time() + 120
    while not os.path.exists(sys.argv[1]) and time.time() < deadline:
        time.sleep(0.05)
    for i in range(200, 400):
        print(i, flush=True)
        run.log("i", i, step=i)
    open("outputs/done.txt", "w").write("done")
    """


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("kill"), separate=True) as running:
        yield running


def kill(stack: Embedded, name: str) -> None:
    """kill -9, and wait until the supervisor has started it again."""
    before = stack.pids()[name]
    os.kill(before, signal.SIGKILL)
    until(lambda: stack.pids()[name] != before, f"{name} is started again")


def whole(run: Run, attempts: int | None = 1) -> None:
    """Everything that the script did is there, once; `attempts` None: however many it took."""
    details = finished(run)
    assert attempts in (None, details["attempt"])
    attempts = details["attempt"]
    until(lambda: len(lines(run)) >= 400, "all lines are there")
    mine = [int(one.line.data) for one in tail(run, streams=("stdout",)) if one.line.attempt == attempts]
    assert mine == list(range(400))
    assert "outputs/done.txt" in run.get_file_names()
    ends = [e.type for e in recorded(run) if e.subject == run.id and e.type in FINAL]
    assert ends == ["run.completed"]


@pytest.mark.parametrize("victim", ["runs", "images", "scheduler", "logs", "registry", "nats", "objects"])
def test_killed_while_a_run_is_running(separate: Embedded, source: Path, tmp_path: Path, victim: str) -> None:
    workspace = separate.workspace()
    go = tmp_path / "go"
    run = submit(workspace, source, SCRIPT, go)
    wait_for_state(run, "Running")
    kill(separate, victim)
    go.touch()
    whole(run)
    values = run.get_metrics()["i"]
    assert values == list(range(400))


@pytest.mark.parametrize("victim", ["runs", "images", "scheduler", "logs", "registry", "nats", "objects"])
def test_killed_while_outputs_are_being_stored(separate: Embedded, source: Path, tmp_path: Path, victim: str) -> None:
    workspace = separate.workspace()
    go = tmp_path / "go"
    code = SCRIPT + 'open("outputs/big.bin", "wb").write(os.urandom(1 << 20) * 150)\n'
    run = submit(workspace, source, code, go)
    wait_for_state(run, "Running")
    go.touch()
    until(lambda: run.get_status() in ("Finalizing", "Completed"), "the run is storing its outputs")
    kill(separate, victim)
    whole(run)
    sizes = {x.file.path: x.file.size for x in workspace._call(workspace._client.runs.file_links(run.id))}
    assert sizes["outputs/big.bin"] == 150 << 20


@pytest.mark.parametrize("victim", ["runs", "images", "scheduler", "logs", "registry", "nats", "objects", "trainer"])
def test_killed_while_a_run_is_preparing(separate: Embedded, source: Path, tmp_path: Path, victim: str) -> None:
    workspace = separate.workspace()
    go = tmp_path / "go"
    go.touch()
    environment = Environment("e", [slow_package(tmp_path, victim)])
    run = submit(workspace, source, SCRIPT, go, environment=environment)
    until(lambda: "building a wheel" in "".join(lines(run, "prepare")), "the build is under way")
    assert run.get_status() == "Preparing"
    if victim == "trainer":
        os.kill(separate.trainer_pids()[0], signal.SIGKILL)
    else:
        kill(separate, victim)
    whole(run, attempts=run.get_details()["attempt"] or None)


def slow_package(folder: Path, name: str, seconds: float = 3.0) -> str:
    """A requirement that takes some seconds to build: a source distribution on this disk."""
    root = folder / f"slow-{name}"
    root.mkdir()
    (root / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n')
    (root / "setup.py").write_text(
        f"import sys, time\nif 'bdist_wheel' in sys.argv:\n    time.sleep({seconds})\n"
        f"from setuptools import setup\nsetup(name='slow-{name}', version='1.0', py_modules=[])\n"
    )
    archive = folder / f"slow_{name}-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(root, f"slow_{name}-1.0")
    return f"slow-{name} @ file://{archive}"


def test_a_killed_trainer_leads_to_the_next_attempt(separate: Embedded, source: Path, tmp_path: Path) -> None:
    workspace = separate.workspace()
    go = tmp_path / "go"
    run = submit(workspace, source, SCRIPT, go)
    wait_for_state(run, "Running")
    until(lambda: "199" in lines(run), "the first half is printed")
    (trainer,) = separate.trainer_pids()
    os.kill(trainer, signal.SIGKILL)
    until(lambda: run.get_details()["attempt"] == 2 and run.get_status() == "Running", "the second attempt runs")
    go.touch()
    whole(run, attempts=2)
    assert [int(x.line.data) for x in tail(run, streams=("stdout",)) if x.line.attempt == 1] == list(range(200))


def test_a_trainer_killed_while_it_stores_outputs_leads_to_the_next_attempt(separate: Embedded, source: Path, tmp_path: Path) -> None:
    workspace = separate.workspace()
    go = tmp_path / "go"
    code = SCRIPT + """open("outputs/big.bin", "wb").write(b"x" * (30 << 20))\n"""
    run = submit(workspace, source, code, go)
    wait_for_state(run, "Running")
    objects = separate.pids()["objects"]
    os.kill(objects, signal.SIGSTOP)  # so that the upload cannot be through before the kill
    try:
        go.touch()
        until(lambda: run.get_status() == "Finalizing", "the first attempt is storing its outputs")
        (trainer,) = separate.trainer_pids()
        os.kill(trainer, signal.SIGKILL)
    finally:
        os.kill(objects, signal.SIGCONT)
    whole(run, attempts=2)
    sizes = {x.file.path: x.file.size for x in workspace._call(workspace._client.runs.file_links(run.id))}
    assert sizes["outputs/big.bin"] == 30 << 20


def test_a_run_whose_attempts_are_used_up_fails_and_says_so(separate: Embedded, source: Path, tmp_path: Path) -> None:
    run = submit(separate.workspace(), source, SCRIPT, tmp_path / "never", max_attempts=1)
    wait_for_state(run, "Running")
    (trainer,) = separate.trainer_pids()
    os.kill(trainer, signal.SIGKILL)
    details = finished(run, "Failed")
    assert details["exit"]["reason"] == "trainer_lost" and "all 1 attempts were used" in details["reason"]


def test_everything_killed_at_once_and_started_again_carries_on(tmp_path: Path, source: Path) -> None:
    first = launch(tmp_path / "stack")
    workspace = first.workspace()
    go = tmp_path / "go"
    done = submit(workspace, source, "print('done')")
    finished(done)
    run = submit(workspace, source, SCRIPT, go)
    queued = submit(workspace, source, "print('later')", cpus=workspace.compute_targets["local"].node_resources.cpus)
    wait_for_state(run, "Running")
    victims = [*first.trainer_pids(), *first.pids().values()]
    first.process.kill()
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it went with the supervisor
    first.process.wait(30)
    go.touch()
    second = launch(tmp_path / "stack", port=None)
    try:
        assert json.loads(second.config.read_text())["endpoint"] == workspace._config.endpoint
        again: Workspace = second.workspace()
        whole(again.get_run(run.id), attempts=2)
        finished(again.get_run(queued.id))
        assert lines(again.get_run(done.id)) == ["done"]
    finally:
        halt(second)
