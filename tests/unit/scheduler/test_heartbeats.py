"""Heartbeats: what is answered, and what the watch survives."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as tr
from alveary_core.events import Event, Key, name_of
from alveary_scheduler.heartbeats import Heartbeats
from alveary_scheduler.state import State, evolve


class World:
    """Heartbeats of a state, without a log."""

    def __init__(self, fleet: Any) -> None:
        self.state = State()
        self.projection = SimpleNamespace(state=self.state, caught_up=asyncio.Event())
        self.projection.caught_up.set()
        self.sequence = 0
        settings = SimpleNamespace(lease_seconds=1.0, beat_seconds=0.01)
        self.heartbeats = Heartbeats(settings, self.projection, self, fleet, lambda: None)  # type: ignore[arg-type]

    async def append(self, key: Key, message: Message) -> int:
        self.sequence += 1
        evolve(self.state, Event("", key, name_of(message)[1], message, self.sequence, 0.0))
        return self.sequence


class FullDisk:
    """A fleet that can save nothing."""

    leaving: set[str] = set()

    def __init__(self) -> None:
        self.tended = 0
        self.silent: list[str] = []

    async def tend(self) -> None:
        self.tended += 1
        raise OSError("no space left on device")

    def lost(self, node: str) -> None:
        self.silent.append(node)
        raise OSError("no space left on device")


async def test_the_watch_goes_on_where_a_provider_cannot_save() -> None:
    fleet = FullDisk()
    world = World(fleet)
    await world.append(Key("w", "target", "t"), ev.TargetCreated(spec=ev.ComputeSpec(kind=c.TARGET_KIND_RAY, max_nodes=1)))
    for node in ("n0", "n1"):
        await world.append(Key("w", "node", node), ev.NodeJoined(target="t", incarnation="1", resources=c.Resources(cpus=1)))
    world.heartbeats._started -= 60.0
    watch = asyncio.create_task(world.heartbeats.watch())
    async with asyncio.timeout(10):
        while fleet.tended < 3:
            assert not watch.done(), watch.exception()
            await asyncio.sleep(0.01)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert fleet.silent == ["n0", "n1"] and not world.state.nodes


async def world_of(kind: c.TargetKind.ValueType) -> World:
    """A world with a target and no providers."""
    world = World(SimpleNamespace(leaving=set()))
    await world.append(Key("w", "target", "t"), ev.TargetCreated(spec=ev.ComputeSpec(kind=kind, max_nodes=1)))
    return world


async def leaves(world: World) -> bool:
    """Whether the node is told to leave."""
    heartbeat = tr.Heartbeat(node="n", target="t", incarnation="1", cpus=4, memory_total_bytes=1 << 30)
    return (await world.heartbeats._respond(heartbeat, "w")).leave


async def test_a_node_of_a_target_that_was_created_again_leaves() -> None:
    world = await world_of(c.TARGET_KIND_LOCAL)
    assert not await leaves(world) and not await leaves(world)
    spec = world.state.targets["w", "t"].spec
    await world.append(Key("w", "target", "t"), ev.TargetDeleted())
    await world.append(Key("w", "target", "t"), ev.TargetCreated(spec=spec))
    assert await leaves(world)
    await world.append(Key("w", "node", "n"), ev.NodeLeft(incarnation="1"))
    assert not await leaves(world), "it joins the new one"


@pytest.mark.parametrize(("kind", "left"), [(c.TARGET_KIND_LOCAL, True), (c.TARGET_KIND_RAY, True), (c.TARGET_KIND_NODES, False)])
async def test_a_drained_node_leaves_once_it_is_empty_where_another_can_be_started(kind: c.TargetKind.ValueType, left: bool) -> None:
    world = await world_of(kind)
    assert not await leaves(world)
    made = ev.PlacementMade(attempt=1, target="t", nodes=[ev.AllocatedNode(node="n", incarnation="1")], spec=c.RunSpec())
    await world.append(Key("w", "placement", "r"), made)
    await world.append(Key("w", "node", "n"), ev.NodeDraining(reason="for repair"))
    assert not await leaves(world), "what runs there runs to its end"
    await world.append(Key("w", "run", "r"), ev.RunCompleted(attempt=1))
    assert await leaves(world) is left
