"""The scheduler's decisions as users meet them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support import Embedded, embedded, finished, lines, recorded, submit, until, wait_for_state

from alveary import Quota, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary.errors import AlvearyError, ComputeTargetException
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

HOLD = """
    import signal, sys, time
    def leave(*_):
        print("saving", flush=True)
        open("outputs/checkpoint", "w").write("x")
        sys.exit(0)
    signal.signal(signal.SIGTERM, leave)
    print("begun", flush=True)
    for _ in range(int(sys.argv[1]) * 10):
        time.sleep(0.1)
    """


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A stack whose one node can hold one run at a time."""
    os.environ["ALVEARY_TRAINER_NODE_LABELS"] = json.dumps({"zone": "a"})
    try:
        with embedded(tmp_path_factory.mktemp("own")) as stack:
            yield stack
    finally:
        del os.environ["ALVEARY_TRAINER_NODE_LABELS"]


@pytest.fixture
def workspace(own: Embedded) -> Workspace:
    return own.workspace()


def target(workspace: Workspace, name: str, **options: object) -> str:
    spec = AmlCompute.provisioning_configuration(min_nodes=0, max_nodes=1, idle_seconds_before_scaledown=60, cpus=1, **options)  # type: ignore[arg-type]
    ComputeTarget.create(workspace, name, spec)
    return name


def test_a_higher_tier_makes_a_lower_one_go_which_is_stored_and_comes_back(workspace: Workspace, source: Path) -> None:
    name = target(workspace, "tiers")
    low = submit(workspace, source, HOLD, 4, compute_target=name, priority=-1, max_attempts=1)
    until(lambda: "begun" in lines(low), "it runs")
    high = submit(workspace, source, "print('first')", compute_target=name)
    finished(high)
    details = finished(low)
    assert details["attempt"] == 2, "it has one attempt, and making room costs none"
    assert lines(low).count("begun") == 2 and lines(low).count("saving") == 1
    told = [e for e in recorded(low) if (e.type, e.subject) == ("placement.preempting", low.id)]
    assert [e.data["beneficiary"] for e in told] == [high.id]
    assert high.get_details()["ended_at"] < details["ended_at"]


def test_a_run_at_zero_is_never_stopped_for_another(workspace: Workspace, source: Path) -> None:
    name = target(workspace, "zero")
    first = submit(workspace, source, HOLD, 2, compute_target=name)
    until(lambda: "begun" in lines(first), "it runs")
    urgent = submit(workspace, source, "print('second')", compute_target=name, priority=1000)
    finished(urgent)
    assert finished(first)["attempt"] == 1 and lines(first) == ["begun"]


def test_why_is_it_queued_and_when_will_it_begin(own: Embedded, workspace: Workspace, source: Path) -> None:
    name = target(workspace, "why")
    running = submit(workspace, source, HOLD, 60, compute_target=name, max_run_duration_seconds=300)
    until(lambda: "begun" in lines(running), "it runs")
    before = time.time()
    first, second = (submit(workspace, source, "print()", compute_target=name) for _ in range(2))
    for run, position in ((first, 1), (second, 2)):
        until(lambda run=run: "maximum of 1" in run.get_details()["reason"], "it is told why")  # type: ignore[misc]
        why = run.why_queued()
        assert why["position"] == position and why["waits_for"] == "1 CPU" and "raise max_nodes" in why["would_help"]
    assert 0 < first.why_queued()["expected_start"] - before < 330
    shown = own.cli("run", "why", first.id).stdout
    assert "position" in shown and "raise max_nodes" in shown
    running.cancel()
    for run in (first, second):
        finished(run)
    with pytest.raises(AlvearyError, match="does not wait"):
        first.why_queued()


def test_quotas_hold_whoever_asks(workspace: Workspace, source: Path) -> None:
    spec = AmlCompute.provisioning_configuration(max_nodes=1, cpus=2, quotas=[Quota("owner", maximum={"cpus": 1})])
    ComputeTarget.create(workspace, "quotas", spec)
    one = submit(workspace, source, HOLD, 60, compute_target="quotas")
    until(lambda: "begun" in lines(one), "it runs")
    two = submit(workspace, source, "print()", compute_target="quotas")
    until(lambda: "quota of 1 CPU" in two.get_details()["reason"], "the quota is named")
    held = ComputeTarget(workspace, "quotas")
    with pytest.raises(ComputeTargetException, match="max_nodes"):
        held.update(max_nodes=-1)
    held.update(quotas=[Quota("owner", maximum={"cpus": 2})], idle_seconds_before_scaledown=5)
    finished(two)
    assert ComputeTarget(workspace, "quotas")._found.spec.idle_seconds_before_scaledown == 5
    one.cancel()
    finished(two)


def test_labels_and_parts_of_gpus_are_asked_for_and_refused_with_a_reason(workspace: Workspace, source: Path) -> None:
    name = target(workspace, "labels")
    finished(submit(workspace, source, "print()", compute_target=name, node_labels={"zone": "a"}))
    elsewhere = submit(workspace, source, "print()", compute_target=name, node_labels={"zone": "b"})
    until(lambda: "zone=b" in elsewhere.get_details()["reason"], "the label is named")
    elsewhere.cancel()
    finished(elsewhere, "Canceled")
    with pytest.raises(AlvearyError, match="gpu_sharing"):
        submit(workspace, source, "print()", compute_target=name, gpus=0.5)
    with pytest.raises(AlvearyError, match="a whole number"):
        submit(workspace, source, "print()", compute_target=name, gpus=1.5)
    with pytest.raises(AlvearyError, match="best-fit"):
        target(workspace, "odd", placement_policy="worst")


def test_a_drained_node_takes_nothing_more(own: Embedded, workspace: Workspace, source: Path) -> None:
    name = target(workspace, "drained")
    running = submit(workspace, source, HOLD, 3, compute_target=name)
    until(lambda: "begun" in lines(running), "it runs")
    (node,) = ComputeTarget(workspace, name).list_nodes()
    assert node.state == pb.NODE_STATE_READY and dict(node.labels) == {"zone": "a"}
    own.cli("compute", "drain", node.id)
    assert "draining" in own.cli("compute", "nodes", "--target", name).stdout
    finished(running)
    with pytest.raises(AlvearyError) as refused:
        client = workspace._client
        workspace._call(client.call(client.stubs.nodes.DrainNode, pb.DrainNodeRequest(node="nobody")))
    assert refused.value.code == grpc.StatusCode.NOT_FOUND.name
    wait_for_state(running, "Completed")


def test_a_packed_gang_takes_as_few_nodes_as_will_do(workspace: Workspace, source: Path) -> None:
    ComputeTarget.create(workspace, "packed", AmlCompute.provisioning_configuration(max_nodes=1, cpus=2))
    code = """
        import os
        print(os.environ["NODE_RANK"], os.environ["NODE_COUNT"], flush=True)
        open("outputs/" + os.environ["NODE_RANK"], "w").write("x")
        """
    run = submit(workspace, source, code, compute_target="packed", node_count=2, pack_nodes=True)
    details = finished(run)
    assert sorted(lines(run)) == ["0 2", "1 2"] and set(details["nodes"]) == {"packed-0"}
    assert run.get_file_names() == ["outputs/0", "outputs/1"]
    with pytest.raises(AlvearyError, match="at most 1"):
        submit(workspace, source, code, compute_target="packed", node_count=2)
