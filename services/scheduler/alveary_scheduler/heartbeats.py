"""Heartbeats of nodes: joining, leaving, leases, and nodes that are lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as tr
from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.events import Key
from alveary_core.settings import CoreSettings
from alveary_scheduler.event_writer import EventWriter
from alveary_scheduler.fleet import Fleet
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.state import State

_WATCH_SECONDS = 0.5
# A trainer gives up when a lease has passed without an answer; the margin covers its SIGKILLs.
_MIN_MARGIN_SECONDS = 2.0


@dataclass
class LastHeartbeat:
    """What is known of a node's last heartbeat; never stored. Times are of the monotonic clock."""

    at: float
    message: tr.Heartbeat = field(default_factory=tr.Heartbeat)
    # Since when nothing runs on the node; 0: something does.
    idle_since: float = 0.0


class Heartbeats:
    """Answers heartbeats, and declares nodes lost that send none."""

    def __init__(
        self, settings: CoreSettings, projection: SchedulerProjection, writer: EventWriter, fleet: Fleet, wake: Callable[[], None]
    ) -> None:
        """`wake` has the decision loop look at the state."""
        self._settings = settings
        self._projection = projection
        self._writer = writer
        self._fleet = fleet
        self._wake = wake
        self._started = time.monotonic()
        self._answering: dict[str, asyncio.Lock] = {}
        # (run, attempt, node): since when the node's heartbeats have not named an attempt that is placed on it.
        self._missing: dict[tuple[str, int, str], float] = {}
        self.last: dict[str, LastHeartbeat] = {}
        # (run, attempt) of placements that are in the log, or about to be, and perhaps not in the state yet.
        self.placing: set[tuple[str, int]] = set()

    @property
    def _state(self) -> State:
        return self._projection.state

    def of(self, node: str) -> LastHeartbeat:
        """A node's last heartbeat; a new record where there is none."""
        return self.last.setdefault(node, LastHeartbeat(time.monotonic()))

    def cordoned(self) -> dict[str, str]:
        """Nodes that take no new runs for now, and why."""
        return {node: last.message.cordon_reason for node, last in self.last.items() if last.message.cordon_reason}

    async def on_heartbeat(self, message: Msg) -> None:
        """Renew a node's leases, and tell it what must stop."""
        try:
            heartbeat = tr.Heartbeat.FromString(message.data)
        except DecodeError as error:
            telemetry.logger().warning("heartbeat.malformed", error=str(error))
            return
        lock = self._answering.setdefault(heartbeat.node, asyncio.Lock())
        if lock.locked() or not self._projection.caught_up.is_set():
            return  # without an answer the trainer asks again
        async with lock:
            response = await self._respond(heartbeat, message.subject.split(".")[1])
        await message.respond(response.SerializeToString())

    async def _respond(self, heartbeat: tr.Heartbeat, workspace: str) -> tr.HeartbeatResponse:
        if heartbeat.leaving:
            await self._leave(heartbeat, workspace)
            return tr.HeartbeatResponse()
        if (workspace, heartbeat.target) not in self._state.targets:
            return tr.HeartbeatResponse(leave=True)
        await self._join(heartbeat, workspace)
        last = self.of(heartbeat.node)
        last.at = time.monotonic()
        last.message = heartbeat
        stop = [f"{a.run_id}-{a.attempt}" for a in heartbeat.attempts if not self._may_run(heartbeat, a)]
        await self._revoke_missing(heartbeat)
        if self._is_drained(heartbeat.node):
            self._fleet.leaving.add(heartbeat.node)
        return tr.HeartbeatResponse(stop=stop, leave=heartbeat.node in self._fleet.leaving or self._is_stale(heartbeat, workspace))

    def _is_stale(self, heartbeat: tr.Heartbeat, workspace: str) -> bool:
        """Whether a node joined a target that was deleted and created again since: the new one does not have it."""
        pool = self._state.pools.get((workspace, heartbeat.target))
        return pool is not None and heartbeat.node in self._state.nodes and heartbeat.node not in pool.nodes

    def _is_drained(self, name: str) -> bool:
        """Whether a drained node is empty and makes room for another; machines that joined by themselves stay."""
        node = self._state.nodes.get(name)
        if node is None or not node.draining:
            return False
        target = self._state.targets.get((node.workspace, node.target))
        if target is None or target.spec.kind == c.TARGET_KIND_NODES:
            return False
        return not any(placed.on(name) for placed in self._state.placed.values())

    async def _leave(self, heartbeat: tr.Heartbeat, workspace: str) -> None:
        node = self._state.nodes.get(heartbeat.node)
        if node is not None and node.incarnation == heartbeat.incarnation:
            await self._writer.append(Key(workspace, "node", heartbeat.node), ev.NodeLeft(incarnation=heartbeat.incarnation))
        self._fleet.left(heartbeat.node)

    async def _join(self, heartbeat: tr.Heartbeat, workspace: str) -> None:
        node = self._state.nodes.get(heartbeat.node)
        if node is not None and node.incarnation == heartbeat.incarnation:
            return
        joined = ev.NodeJoined(
            target=heartbeat.target,
            incarnation=heartbeat.incarnation,
            resources=c.Resources(cpus=heartbeat.cpus, memory_bytes=heartbeat.memory_total_bytes, gpus=heartbeat.gpus),
            gpu_models=heartbeat.gpu_models,
            hostname=heartbeat.hostname,
            labels=heartbeat.labels,
        )
        await self._writer.append(Key(workspace, "node", heartbeat.node), joined)

    def _may_run(self, heartbeat: tr.Heartbeat, attempt: tr.AttemptInfo) -> bool:
        if (attempt.run_id, attempt.attempt) in self.placing:
            return True
        held = self._state.placed.get(attempt.run_id)
        return held is not None and held.attempt == attempt.attempt and (heartbeat.node, heartbeat.incarnation) in held.nodes

    async def _revoke_missing(self, heartbeat: tr.Heartbeat) -> None:
        """Revoke what is placed on a node whose heartbeats have not named it for a whole lease.

        The node gave the attempt up (a lease of its own ran out), or never heard of it. A finished attempt is never
        taken for lost: its end is in the log before its node forgets it, and runs read the log in order.
        """
        now = time.monotonic()
        named = {(attempt.run_id, attempt.attempt) for attempt in heartbeat.attempts}
        for placed in [p for p in self._state.placed.values() if (heartbeat.node, heartbeat.incarnation) in p.nodes]:
            key = (placed.run, placed.attempt, heartbeat.node)
            if key[:2] in named:
                self._missing.pop(key, None)
            elif now - self._missing.setdefault(key, now) > self._settings.lease_seconds:
                revoked = ev.PlacementRevoked(attempt=placed.attempt, reason=f"node {heartbeat.node} no longer runs it")
                await self._writer.append(Key(placed.workspace, "placement", placed.run), revoked)
        live = {(p.run, p.attempt, node) for p in self._state.placed.values() for node, _ in p.nodes}
        self._missing = {key: since for key, since in self._missing.items() if key in live}

    async def watch(self) -> None:
        """Declare nodes lost that are silent for longer than their trainers' leases, and tend the providers."""
        await self._projection.caught_up.wait()
        limit = self._settings.lease_seconds + max(_MIN_MARGIN_SECONDS, 2 * self._settings.beat_seconds)
        while True:
            try:
                await self._declare_lost(limit)
            except Unavailable as error:
                telemetry.logger().warning("lost.unavailable", error=str(error))
            except OSError as error:  # a provider could not save its nodes, as on a full disk
                telemetry.logger().warning("tend.failed", error=str(error))
            try:
                await self._fleet.tend()
            except OSError as error:
                telemetry.logger().warning("tend.failed", error=str(error))
            await asyncio.sleep(min(_WATCH_SECONDS, self._settings.beat_seconds))

    async def _declare_lost(self, limit: float) -> None:
        now = time.monotonic()
        for node in list(self._state.nodes.values()):
            last = self.last.get(node.id)
            silent = now - max(last.at if last is not None else 0.0, self._started)
            if silent > limit:
                lost = ev.NodeLost(incarnation=node.incarnation, reason=f"no heartbeat for {silent:.0f} s")
                await self._writer.append(Key(node.workspace, "node", node.id), lost)
                self._fleet.lost(node.id)
                self._wake()
