"""What comes from outside, and is not as it should be: one stack that has to bear all of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from support import RUNTIME, Embedded, blocked, embedded, until

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core.eventlog import EventLog, connect
from alveary_core.events import Key


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A stack of this module's own: dead letters stay in it."""
    with embedded(tmp_path_factory.mktemp("edge"), runtime=RUNTIME) as running:
        yield running


def write_past_the_edge(stack: Embedded, service: str, key: Key, *messages: ev.RunSubmitted | ev.RunPrepared | ev.TargetCreated) -> int:
    """Append events as a service of an earlier version might have done, without any check; the last sequence."""
    known = json.loads((stack.state_dir / "stack.json").read_text())

    async def write() -> int:
        connection = await connect(f"nats://127.0.0.1:{known['ports']['nats']}", service, known["secrets"][service], service)
        try:
            return (await EventLog(connection, service).append(key, messages, 0)).sequence
        finally:
            await connection.close()

    return asyncio.run(write())


def test_a_log_that_is_poisoned_already_stops_nobody(edge: Embedded) -> None:
    before = edge.pids()["control"]
    spec = ev.RunSubmitted().spec
    spec.experiment, spec.compute_target = "tests", "local"
    spec.resources.cpus = float("nan")
    run = new_id()
    submitted, prepared = ev.RunSubmitted(spec=spec, number=1), ev.RunPrepared(spec=spec)
    write_past_the_edge(edge, "runs", Key("default", "run", run), submitted, prepared)
    spec.resources.cpus = float("inf")
    last = write_past_the_edge(edge, "runs", Key("default", "run", new_id()), submitted, ev.RunPrepared(spec=spec))
    workspace = edge.workspace()
    client = workspace._client

    async def seen() -> None:
        from alveary_contracts.scheduler.v1 import scheduler_pb2

        await client.compute.GetTarget(scheduler_pb2.GetTargetRequest(name="local", min_sequence=last), metadata=client.metadata)

    workspace._call(seen())
    assert edge.pids()["control"] == before
    done = edge.cli("admin", "dead-letters", "list", "--json")
    letters = json.loads(done.stdout)
    assert letters == [] or {x["type"] for x in letters} == {"run.prepared"}
    assert blocked(edge.state_dir, "control") == []


def test_dead_letters_are_listed_tried_again_and_dropped(edge: Embedded) -> None:
    known = json.loads((edge.state_dir / "stack.json").read_text())
    key = Key("default", "run", new_id())

    async def write() -> None:
        connection = await connect(f"nats://127.0.0.1:{known['ports']['nats']}", "runs", known["secrets"]["runs"], "runs")
        headers = {"ce-id": new_id(), "ce-time": "2026-01-01T00:00:00Z"}
        await connection.jetstream().publish(key.subject("submitted"), b"not json", headers=headers)
        await connection.close()

    asyncio.run(write())
    consumers = {"runs/RunsProjection", "runs/runs", "scheduler/SchedulerProjection", "images/ImagesProjection", "images/images"}

    def letters() -> list[dict[str, str]]:
        found = json.loads(edge.cli("admin", "dead-letters", "list", "--json").stdout)
        return [x for x in found if x["subject"] == key.subject("submitted")]

    until(lambda: {x["id"].rpartition("/")[0] for x in letters()} >= consumers, "every reader of run.submitted set it aside")
    plain = edge.cli("admin", "dead-letters", "list").stdout
    assert "run.submitted" in plain and "MalformedEvent" in plain and "Traceback" not in plain
    (one,) = [x["id"] for x in letters() if x["id"].startswith("runs/runs/")]
    failed = edge.cli("admin", "dead-letters", "retry", one, check=False)
    assert failed.returncode == 1 and "MalformedEvent" in failed.stderr
    (view,) = [x["id"] for x in letters() if x["id"].startswith("logs/LogsProjection/")]
    assert "folded anew when its service starts next" in edge.cli("admin", "dead-letters", "retry", view).stderr
    edge.cli("admin", "dead-letters", "drop", one)
    assert one not in [x["id"] for x in letters()]
    again = edge.cli("admin", "dead-letters", "drop", one, check=False)
    assert again.returncode == 1 and "there is no dead letter" in again.stderr
    nothing = edge.cli("admin", "dead-letters", "drop", check=False)
    assert nothing.returncode == 2 and "--all" in nothing.stderr
    edge.cli("admin", "dead-letters", "drop", "--all")
    assert letters() == []
