"""Read models of runs on real servers: copies in the object store, answers during a replay, and purges that spare what lives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support import servers as bare

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore
from alveary_core.server import Server
from alveary_runs import domain
from alveary_runs.api import RunService
from alveary_runs.compaction import Compaction
from alveary_runs.copies import BUCKET, Copies
from alveary_runs.metrics import MetricsProjection
from alveary_runs.projection import RunsProjection


class Servers:
    """The log and the store, as the services runs and scheduler see them."""

    def __init__(self, log: EventLog, scheduler: EventLog, store: ObjectStore) -> None:
        self.log, self.scheduler, self.store = log, scheduler, store

    async def run(self, *, final: bool = True, experiment: str = "e") -> str:
        """A run of some events, with a placement."""
        run_id = new_id()
        first = await self.log.append(Key("w", "run", run_id), [ev.RunSubmitted(spec=c.RunSpec(experiment=experiment))], 0)
        await self.scheduler.append(Key("w", "placement", run_id), [ev.PlacementMade(attempt=1)], 0)
        more: list[Any] = [ev.RunStarted(attempt=1), ev.RunTagged(set={"a": "b"})]
        more += [ev.RunCompleted(attempt=1)] if final else []
        await self.log.append(Key("w", "run", run_id), more, first.sequence)
        return run_id

    async def names(self, run_id: str) -> list[str]:
        found = [e.name for e in await self.log.read(Key("w", "run", run_id))]
        return found + [f"placement.{e.name}" for e in await self.log.read(Key("w", "placement", run_id))]


@pytest.fixture
async def servers(bare_servers: Layout) -> AsyncIterator[Servers]:
    async with opened(bare_servers) as found:
        yield found


@contextlib.asynccontextmanager
async def opened(layout: Layout) -> AsyncIterator[Servers]:
    logs = []
    for user in ("runs", "scheduler"):
        connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", user, layout.secrets[user], user)
        await ensure_streams(connection)
        logs.append(EventLog(connection, user))
    store = ObjectStore(f"127.0.0.1:{layout.ports.s3}", layout.secrets["s3_access"], layout.secrets["s3_secret"])
    await store.ensure_buckets()
    yield Servers(logs[0], logs[1], store)
    for log in logs:
        await log.connection.close()
    store.close()


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[Servers]:
    """Servers of its own: a run of another test that is not final would hold up purging."""
    with bare(tmp_path / "own") as layout:
        async with opened(layout) as found:
            yield found


@contextlib.asynccontextmanager
async def view_of(servers: Servers, folder: Path) -> AsyncIterator[RunsProjection]:
    metrics = MetricsProjection(str(folder / "metrics.sqlite"))
    view = RunsProjection(str(folder / "runs.sqlite"), metrics)
    task = asyncio.create_task(view.run(servers.log))
    await asyncio.wait_for(view.caught_up.wait(), 60)
    try:
        yield view
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        view.close()
        metrics.close()


async def test_a_lost_view_goes_on_from_its_copy_and_a_copy_that_is_not_whole_is_left_alone(servers: Servers, tmp_path: Path) -> None:
    ids = [await servers.run() for _ in range(3)]
    copies = Copies(servers.log, servers.store, f"test-{new_id()}", 1)
    (tmp_path / "a").mkdir()
    async with view_of(servers, tmp_path / "a") as view:
        await view.wait_for(await servers.log.last_sequence())
        copied = await copies.make(view)
        assert copied == view.position
        rows = [tuple(r) for r in await view.rows("SELECT * FROM runs ORDER BY id")]
    later = await servers.run(final=False)
    for folder in ("b", "c", "d"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "b" / "runs.sqlite"
    assert await copies.restore(path, RunsProjection) and not await copies.restore(path, RunsProjection)
    assert [p.name for p in path.parent.iterdir()] == ["runs.sqlite"]
    async with view_of(servers, tmp_path / "b") as view:
        assert [tuple(r) for r in await view.rows("SELECT * FROM runs WHERE id != ? ORDER BY id", (later,))] == rows
        assert {r["id"] for r in await view.rows("SELECT id FROM runs")} >= {*ids, later}
        await copies.make(view)
    objects = await servers.store.keys(BUCKET, f"runs/{copies._name}/")
    assert len(objects) == 1 and not objects[0].endswith(f"/{copied}.sqlite.zst"), "the older copy is still there"
    head = json.loads(await servers.store.get(BUCKET, copies._head))
    for change in ({"version": -1}, {"log": "another"}, {"sequence": 10**12}, {"sha256": "0" * 64}, {"key": "runs/none"}):
        await servers.store.put(BUCKET, copies._head, json.dumps(head | change).encode())
        assert not await copies.restore(tmp_path / "c" / "runs.sqlite", RunsProjection), change
    await servers.store.put(BUCKET, copies._head, b"no JSON")
    assert not await copies.restore(tmp_path / "c" / "runs.sqlite", RunsProjection)
    assert list((tmp_path / "c").iterdir()) == []
    assert not await Copies(servers.log, servers.store, "never-made", 1).restore(tmp_path / "d" / "runs.sqlite", RunsProjection)


async def test_one_purge_for_all_compacted_runs_spares_what_lives_and_what_came_later(own: Servers, tmp_path: Path) -> None:
    servers = own
    before = [await servers.run() for _ in range(3)]
    living = await servers.run(final=False)
    after = await servers.run()
    async with view_of(servers, tmp_path) as view:
        compaction = Compaction(servers.log, view, after=0.0, interval=1.0)
        now = time.time() + 1
        while await compaction.compact(now):
            pass
        late = (await servers.log.read(Key("w", "run", before[0])))[-1].sequence
        tagged = await servers.log.append(Key("w", "run", before[0]), [ev.RunTagged(set={"late": "1"})], late)
        await view.wait_for(tagged.sequence)
        while await compaction.purge(now):
            compaction._purge_again = 0.0
        assert await servers.names(before[0]) == ["compacted", "tagged"]
        assert [await servers.names(x) for x in before[1:]] == [["compacted"]] * 2
        assert await servers.names(living) == ["submitted", "started", "tagged", "placement.made"]
        assert await servers.names(after) == ["submitted", "started", "tagged", "completed", "compacted", "placement.made"], "too early"
        # A run that lasts does not keep the others' events for ever.
        compaction._purge_again = 0.0
        await compaction.purge(now + 2 * 86400)
        assert await servers.names(after) == ["compacted"] and await servers.names(living) == [
            "submitted",
            "started",
            "tagged",
            "placement.made",
        ]
        await servers.log.append(
            Key("w", "run", living), [ev.RunCompleted(attempt=1)], (await servers.log.read(Key("w", "run", living)))[-1].sequence
        )
        await view.wait_for(await servers.log.last_sequence())
        await compaction.compact(time.time() + 1)
        compaction._purge_again = 0.0
        await compaction.purge(time.time() + 1)
        assert await servers.names(living) == ["compacted"]
        shown = await view.get("w", before[0])
        assert shown is not None and dict(shown.tags) == {"a": "b", "late": "1"}
    for name in ("runs.sqlite", "runs.sqlite-wal", "runs.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    async with view_of(servers, tmp_path) as view:
        again = await view.get("w", before[0])
        assert again is not None and dict(again.tags) == {"a": "b", "late": "1"} and again.state == c.RUN_STATE_COMPLETED


async def test_what_is_asked_during_a_replay_is_answered_and_marked_and_nothing_is_decided_on_it(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await servers.run(final=False)
    metrics = MetricsProjection(str(tmp_path / "m"))
    view = RunsProjection(str(tmp_path / "r"), metrics)
    view.goal = 1000
    runs = Aggregates(servers.log, "run", domain.Run, lambda run, event: domain.evolve(run, event.message))
    server = Server("secret" * 5)
    runs_pb2_grpc.add_RunServiceServicer_to_server(RunService(servers.log, servers.store, runs, view), server.server)
    server.behind.append(view.behind)
    port = await server.start("127.0.0.1:0")
    token = auth.issue("secret" * 5, auth.Principal("me", "w", "writer"))
    monkeypatch.setattr(RunsProjection.ready, "__defaults__", (0.05,))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = runs_pb2_grpc.RunServiceStub(channel)
        options: dict[str, Any] = {"metadata": (("authorization", f"Bearer {token}"),), "timeout": 30}
        call = stub.GetRun(pb.GetRunRequest(run_id=run_id), **options)
        assert (await call).run.state == c.RUN_STATE_RUNNING
        assert dict(await call.trailing_metadata())["alveary-behind"] == "RunsProjection at 0 of 1000"
        assert not (await stub.ListRuns(pb.ListRunsRequest(), **options)).runs
        for doomed in (stub.SubmitRun(pb.SubmitRunRequest(), **options), stub.GetRun(pb.GetRunRequest(run_id=new_id()), **options)):
            with pytest.raises(grpc.aio.AioRpcError, match="still reading its history") as caught:
                await doomed
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        task = asyncio.create_task(view.run(servers.log))
        await asyncio.wait_for(view.caught_up.wait(), 60)
        listing = stub.ListRuns(pb.ListRunsRequest(), **options)
        assert run_id in [r.id for r in (await listing).runs] and "alveary-behind" not in dict(await listing.trailing_metadata())
    await server.stop(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    view.close()
    metrics.close()
