"""A node in the test's own process: the real agent, runtime, event log and object store, no scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import SecretStr

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import token
from alveary_contracts.runs.v1 import runs_pb2
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core.eventlog import LOGS, METRICS, EventLog, connect, ensure_streams
from alveary_core.events import Event, Key
from alveary_core.objectstore import ObjectStore
from alveary_trainer.__main__ import library
from alveary_trainer.adapters import process
from alveary_trainer.adapters.cgroups import Groups
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.process import ProcessRuntime
from alveary_trainer.agent import Agent
from alveary_trainer.attempt import Attempt
from alveary_trainer.content_cache import ContentCache
from alveary_trainer.node import NodeContext
from alveary_trainer.settings import TrainerSettings
from alveary_trainer.short_paths import ShortLinks

WORKSPACE = "default"


class Node:
    """One node, whose placements the test makes."""

    def __init__(self, agent: Agent, context: NodeContext) -> None:
        self.agent, self.context = agent, context
        self._sequence = 0

    def heed(self, run: str, message: Any) -> None:
        """Let the node see an event."""
        aggregate = "run" if isinstance(message, ev.RunCancelRequested) else "placement"
        self._sequence += 1
        self.agent._handle_event(Event(new_id(), Key(WORKSPACE, aggregate, run), "", message, self._sequence, time.time()))

    def place(self, code: str, *, run: str = "", attempt: int = 1, **spec: Any) -> Attempt:
        """Place a run of `code` here."""
        run = run or new_id()
        spec.setdefault("grace_seconds", 1.0)
        made = ev.PlacementMade(
            attempt=attempt, nodes=[ev.AllocatedNode(node=self.context.settings.node, incarnation=self.context.incarnation)],
            spec=c.RunSpec(
                command=[sys.executable, "-u", "-c", textwrap.dedent(code)], environment=c.Environment(user_managed=True), experiment="e", **spec
            ),
        )  # fmt: skip
        self.heed(run, made)
        return self.agent.attempts[f"{run}-{attempt}"]

    async def over(self, attempt: Attempt, seconds: float = 60.0) -> ev.AttemptFinished:
        """How an attempt ended, once nothing is left of it."""
        async with asyncio.timeout(seconds):
            while attempt.assignment.name in self.agent.attempts:
                await asyncio.sleep(0.02)
        events = await self.context.log.read(Key(WORKSPACE, "attempt", attempt.assignment.attempt_id))
        assert events and isinstance(events[-1].message, ev.AttemptFinished), [type(e.message).__name__ for e in events]
        return events[-1].message

    async def phase(self, attempt: Attempt, phase: pb.AttemptPhase.ValueType, seconds: float = 60.0) -> None:
        """Return once an attempt is in a phase."""
        async with asyncio.timeout(seconds):
            while attempt.progress.phase != phase:
                assert attempt.assignment.name in self.agent.attempts, "it is over"
                await asyncio.sleep(0.01)

    async def _messages(self, stream: str, prefix: str, run: str) -> list[bytes]:
        found: list[bytes] = []
        subject = f"{prefix}.{token(WORKSPACE)}.{token(run)}"
        async with contextlib.aclosing(self.context.log.follow([subject], 1, stream)) as messages:
            async for item in messages:
                if item is None:
                    return found
                found.append(item[0].data)
        return found

    async def lines(self, run: str, stream: str = "system", *, provisional: bool = False) -> list[str]:
        """Lines of a run's log."""
        chunks = [logs_pb2.LogChunk.FromString(data) for data in await self._messages(LOGS, "alveary-logs", run)]
        wanted = [x for chunk in chunks for x in chunk.lines if x.stream == stream and x.provisional == provisional]
        return [x.data.decode(errors="backslashreplace") for x in wanted]

    async def batches(self, run: str) -> list[runs_pb2.MetricBatch]:
        """Batches of a run's metric points."""
        return [runs_pb2.MetricBatch.FromString(data) for data in await self._messages(METRICS, "alveary-metrics", run)]

    async def files(self, attempt: Attempt) -> dict[str, bytes]:
        """What an attempt stored, by name."""
        prefix = f"{attempt.assignment.run_id}/{attempt.assignment.number}/"
        store = self.context.store
        return {k.removeprefix(prefix): await store.get("runs", k) for k in await store.keys("runs", prefix)}


@contextlib.asynccontextmanager
async def running(layout: Layout, folder: Path, name: str = "n") -> AsyncIterator[Node]:
    """A node for the duration."""
    settings = TrainerSettings(
        node=f"{name}-{new_id()[-6:]}", nats_url=f"nats://127.0.0.1:{layout.ports.nats}", nats_user="trainer",
        nats_password=SecretStr(layout.secrets["trainer"]), s3_endpoint=f"127.0.0.1:{layout.ports.s3}", state_dir=folder,
    )  # fmt: skip
    connection = await connect(settings.nats_url, "trainer", layout.secrets["trainer"], "test-trainer")
    await ensure_streams(connection)
    store = ObjectStore(settings.s3_endpoint, layout.secrets["s3_access"], layout.secrets["s3_secret"])
    await store.ensure_buckets()
    snapshots, datasets, models = (
        ContentCache(folder / name, name, store, 1 << 30, read_only=name != "snapshots") for name in ("snapshots", "datasets", "models")
    )
    with tempfile.TemporaryDirectory(prefix="alv-") as sockets:
        (folder / "work").mkdir(parents=True)
        work = folder / "work"
        runtime = ProcessRuntime(Environments(folder / "env", 1 << 30, store), Groups(work), ShortLinks(work))
        context = NodeContext(
            settings, new_id(), EventLog(connection, "trainer"), store, runtime,
            snapshots, datasets, models, folder / "work", Path(sockets), library(folder),
        )  # fmt: skip
        agent = Agent(context)
        # A trainer ends the children that it did not start: here these are the test's servers.
        with mock.patch.object(process, "end_orphans", lambda shims, starting: []):
            try:
                yield Node(agent, context)
            finally:
                agent.end_all()
                if agent._tasks:
                    await asyncio.wait(agent._tasks, timeout=30)
                await context.close()
                await connection.close()
                store.close()
