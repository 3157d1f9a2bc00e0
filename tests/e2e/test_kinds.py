"""One behaviour for all kinds of compute target: this machine, machines that join, a Ray cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import RayCluster, ray_cluster
from support import Embedded, embedded, finished, lines, processes_of, recorded, said, submit, until, wait_for_state

from alveary import AlvearyError, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary.environment import Environment
from alveary.errors import ComputeTargetException

HERE = Environment("here", user_managed=True, interpreter=sys.executable)
WAITS = """
    import os, time
    print("begun", os.environ["ALVEARY_ATTEMPT"], flush=True)
    while os.environ["ALVEARY_ATTEMPT"] == "1":
        time.sleep(0.1)
    """


@dataclass
class Kind:
    """A target of at most two nodes of one core each."""

    name: str
    stack: Embedded
    cluster: RayCluster | None = None

    @property
    def workspace(self) -> Workspace:
        return self.stack.workspace()

    @property
    def target(self) -> ComputeTarget:
        return ComputeTarget(self.workspace, "pool")

    def nodes(self) -> list[str]:
        return [n.id for n in self.target.list_nodes()]

    def trainers(self, node: str) -> list[psutil.Process]:
        """The process of a node of this test's, if it lives."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                here = str(self.stack.state_dir.parent) in environment.get("ALVEARY_STATE_DIR", "") or self.cluster is not None
                if process.cmdline()[-1:] == ["alveary_trainer"] and environment.get("ALVEARY_NODE") == node and here:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module", params=["local", "nodes", "ray"])
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    joined: list[subprocess.Popen[bytes]] = []
    with ExitStack() as held:
        cluster = held.enter_context(ray_cluster(2)) if request.param == "ray" else None
        before = dict(os.environ)
        os.environ.update(cluster.environment if cluster else {})
        held.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        stack = held.enter_context(embedded(folder / "stack", lease=4.0))
        options: dict[str, Any] = {
            "local": {"cpus": 1},
            "nodes": {"kind": "nodes"},
            "ray": {"kind": "ray", "address": cluster.address if cluster else ""},
        }
        spec = AmlCompute.provisioning_configuration(max_nodes=2, idle_seconds_before_scaledown=2, **options[request.param])
        ComputeTarget.create(stack.workspace(), "pool", spec)
        if request.param == "nodes":
            command = shlex.split(stack.cli("node", "token", "pool").stdout)
            for name in ("a", "b"):
                words = [
                    sys.executable,
                    "-m",
                    "alveary.cli",
                    *command[1:],
                    "--name",
                    name,
                    "--cpus",
                    "1",
                    "--state-dir",
                    str(folder / name),
                ]
                with (folder / f"{name}.log").open("wb") as log:
                    joined.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        try:
            yield Kind(request.param, stack, cluster)
        finally:
            for process in joined:
                process.terminate()
            for process in joined:
                process.wait(30)


def on(kind: Kind, **options: Any) -> dict[str, Any]:
    return {"compute_target": "pool", "environment": HERE, "grace_seconds": 1, **options}


def test_a_run_gets_what_it_asked_for_and_leaves_what_it_made(kind: Kind, source: Path) -> None:
    code = "import os; open('outputs/x.txt', 'w').write('x'); print(os.environ['ALVEARY_NODE_COUNT'])"
    run = submit(kind.workspace, source, code, **on(kind))
    details = finished(run)
    assert lines(run) == ["1"] and run.get_file_names() == ["outputs/x.txt"] and len(details["nodes"]) == 1


def test_a_gang_gets_all_its_nodes_at_once(kind: Kind, source: Path) -> None:
    run = submit(kind.workspace, source, "import os; print(os.environ['NODE_RANK'], os.environ['NODE_COUNT'])", **on(kind, node_count=2))
    details = finished(run)
    assert sorted(said(run)) == ["0 2", "1 2"] and len(set(details["nodes"])) == 2


def test_what_does_not_fit_waits_and_says_why(kind: Kind, source: Path) -> None:
    with (
        pytest.raises(AlvearyError, match="node_count|at most 2")
        if kind.name != "nodes"
        else pytest.raises(AlvearyError, match="at most 2")
    ):
        submit(kind.workspace, source, "print()", **on(kind, node_count=3))
    first = submit(kind.workspace, source, WAITS, **on(kind, node_count=2))
    wait_for_state(first, "Running")
    second = submit(kind.workspace, source, "print('at last')", **on(kind))
    until(lambda: second.get_status() == "Queued" and "waits for 1 CPU" in second.get_details()["reason"], "it waits, and says for what")
    assert second.why_queued()["position"] == 1
    with pytest.raises(AlvearyError, match="1 running and 1 waiting"):
        kind.target.delete()
    first.cancel()
    finished(first, "Canceled")
    finished(second)
    until(lambda: not processes_of(first), "nothing is left of it")


def test_a_lost_node_leads_to_a_new_attempt(kind: Kind, source: Path) -> None:
    run = submit(kind.workspace, source, WAITS, **on(kind))
    until(lambda: "begun 1" in lines(run), "it runs")
    (node,) = run.get_details()["nodes"]
    (trainer,) = kind.trainers(node)
    trainer.kill()
    details = finished(run)
    assert details["attempt"] == 2 and lines(run)[-1] == "begun 2"


def test_nodes_come_for_the_queue_and_go_when_idle(kind: Kind, source: Path) -> None:
    if kind.name == "nodes":
        run = submit(kind.workspace, source, "print()", **on(kind))
        finished(run)
        # One of the two may have been killed by another test: nobody but who started it starts it again.
        assert set(kind.nodes()) <= {"a", "b"} and kind.nodes()
        return
    until(lambda: not kind.nodes(), "all are idle, and go")
    if kind.cluster is not None:
        until(lambda: kind.cluster is not None and kind.cluster.nodes() == 0, "Ray's autoscaler stops its own")
    runs = [submit(kind.workspace, source, "import time; time.sleep(6)", **on(kind)) for _ in range(3)]
    until(lambda: len(kind.nodes()) == 2, "as many as it may have")
    if kind.cluster is not None:
        assert kind.cluster.nodes() == 2
    for run in runs:
        finished(run)
    if kind.cluster is not None:
        assert [e for e in recorded(*runs) if e.type == "run.provisioning" and e.subject in {r.id for r in runs}]
    until(lambda: not kind.nodes(), "all are idle, and go")
    if kind.cluster is not None:
        until(lambda: kind.cluster is not None and kind.cluster.nodes() == 0, "Ray's autoscaler stops its own")


def test_a_target_is_deleted_and_made_again(kind: Kind, source: Path) -> None:
    spec, nodes = kind.target._found.spec, kind.nodes()
    if kind.name != "nodes":
        until(lambda: not kind.nodes(), "all are idle, and go")
    kind.target.delete()
    with pytest.raises(ComputeTargetException):
        _ = kind.target
    until(lambda: not any(kind.trainers(node) for node in nodes), "its trainers have ended")
    ComputeTarget.create(kind.workspace, "pool", spec)
    run = submit(kind.workspace, source, "print()", **on(kind))
    if kind.name == "nodes":
        until(lambda: "no node has joined" in run.get_details()["reason"], "whoever started them has to start them again")
        run.cancel()
        finished(run, "Canceled")
    else:
        finished(run)


def test_of_ray_trouble_is_told(kind: Kind, source: Path) -> None:
    if kind.name != "ray":
        with pytest.raises(ComputeTargetException, match="only targets of kind 'ray'"):
            ComputeTarget.create(kind.workspace, "other", AmlCompute.provisioning_configuration(kind=kind.name, address="x:1"))
        return
    with pytest.raises(ComputeTargetException, match="host:port"):
        ComputeTarget.create(kind.workspace, "nowhere", AmlCompute.provisioning_configuration(kind="ray"))
    ComputeTarget.create(kind.workspace, "nowhere", AmlCompute.provisioning_configuration(kind="ray", address="127.0.0.1:1"))
    run = submit(kind.workspace, source, "print()", **on(kind, compute_target="nowhere"))
    until(lambda: "does not answer" in run.get_details()["reason"], "it says that the cluster is not there", 90)
    run.cancel()
    finished(run, "Canceled")
