"""One round of the decision loop, without a log."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as tr
from alveary_core.events import Event, Key, name_of
from alveary_scheduler import decision_loop
from alveary_scheduler.decision_loop import DecisionLoop
from alveary_scheduler.heartbeats import LastHeartbeat
from alveary_scheduler.state import State, evolve

NODE = c.Resources(cpus=64, memory_bytes=64 << 30)


class World:
    """A decision loop of a state; `refused` are names of events that the log refuses."""

    def __init__(self) -> None:
        self.state = State()
        self.specs: dict[str, Any] = {}
        self.appended: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.sequence = 0
        self.last: dict[str, LastHeartbeat] = {}
        heartbeats = SimpleNamespace(last=self.last, cordoned=dict, placing=set(), of=lambda node: self.last[node])
        fleet = SimpleNamespace(starting=dict, coming=dict, troubles=dict, leaving=set(), cool=lambda key: True)
        disk = SimpleNamespace(look=self.look)
        settings = SimpleNamespace(lease_seconds=1.0)
        self.loop = DecisionLoop(settings, disk, self, self, fleet, heartbeats, asyncio.Event())  # type: ignore[arg-type]

    async def look(self) -> Any:
        return SimpleNamespace(problem="")

    async def append(self, key: Key, message: Message) -> int:
        name = type(message).__name__
        self.appended.append((name, key.id))
        if name in self.refused:
            raise ValueError(f"{name} is refused")
        self.sequence += 1
        event = Event("", key, name_of(message)[1], message, self.sequence, time.time())
        evolve(self.state, event)
        if isinstance(message, ev.RunPrepared):
            self.specs[key.id] = event
        return self.sequence

    async def submit(self, run: str) -> None:
        spec = c.RunSpec(compute_target="t", resources=c.Resources(cpus=1), priority=-1, process_count_per_node=1)
        await self.append(Key("w", "run", run), ev.RunPrepared(spec=spec))

    def checkpoints(self) -> list[str]:
        return [run for name, run in self.appended if name == "PlacementCheckpointed"]


async def world_with(runs: int) -> World:
    """A world in which runs are placed on a node that says that all of them stored a checkpoint."""
    world = World()
    await world.append(Key("w", "target", "t"), ev.TargetCreated(spec=ev.ComputeSpec(kind=c.TARGET_KIND_NODES, max_nodes=1)))
    await world.append(Key("w", "node", "n"), ev.NodeJoined(target="t", incarnation="1", resources=NODE))
    world.last["n"] = LastHeartbeat(time.monotonic())
    for number in range(runs):
        await world.submit(f"r{number:02}")
    await world.loop._decide()
    assert len(world.state.placed) == runs
    for held in world.state.pools["w", "t"].running.values():
        held.last_checkpoint -= 3600.0
    attempts = [tr.AttemptInfo(run_id=run, attempt=1, seconds_since_checkpoint=5) for run in sorted(world.state.placed)]
    world.last["n"].message = tr.Heartbeat(attempts=attempts)
    world.appended.clear()
    return world


async def test_checkpoints_that_cannot_be_recorded_hold_up_no_decision() -> None:
    world = await world_with(2)
    world.refused = {"PlacementCheckpointed"}
    await world.submit("new")
    await world.loop._decide()
    assert "new" in world.state.placed and world.checkpoints() == ["r00", "r01"]
    await world.loop._decide()
    assert world.checkpoints() == ["r00", "r01"], "each is put off"
    world.loop._put_off.clear()
    world.refused.clear()
    await world.loop._decide()
    await world.loop._decide()
    assert world.checkpoints() == ["r00", "r01"] * 2, "recorded once"


async def test_a_round_records_a_few_checkpoints_after_its_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision_loop, "_MAX_CHECKPOINTS", 2)
    world = await world_with(3)
    await world.submit("new")
    await world.loop._decide()
    assert [name for name, _ in world.appended] == ["RunPrepared", "PlacementMade", *["PlacementCheckpointed"] * 2]
    await world.loop._decide()
    assert world.checkpoints() == ["r00", "r01", "r02"]
