"""The scheduler's parts, wired together."""

from __future__ import annotations

import asyncio

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.events import Event, Key
from alveary_core.service import Service
from alveary_scheduler.decision_loop import DecisionLoop
from alveary_scheduler.event_writer import EventWriter
from alveary_scheduler.fleet import Fleet
from alveary_scheduler.heartbeats import Heartbeats
from alveary_scheduler.joining import Joining
from alveary_scheduler.leadership import Leadership
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.providers.local import LocalNodes
from alveary_scheduler.providers.ray import RayNodes
from alveary_scheduler.state import State


class Scheduler:
    """One replica of the scheduler."""

    def __init__(self, service: Service, projection: SchedulerProjection, local: LocalNodes, joining: Joining) -> None:
        self.view = projection
        self.disk = service.disk
        self.joining = joining
        self._wake = asyncio.Event()
        self.leadership = Leadership(service.connection)
        self._writer = EventWriter(service.log, projection, self.leadership)
        ray = RayNodes(service.settings.state_dir, joining.admit, self._wake.set)
        self.fleet = Fleet(projection, self._writer, {c.TARGET_KIND_LOCAL: local, c.TARGET_KIND_RAY: ray})
        self.heartbeats = Heartbeats(service.settings, projection, self._writer, self.fleet, self._wake.set)
        self.loop = DecisionLoop(service.settings, service.disk, projection, self._writer, self.fleet, self.heartbeats, self._wake)
        service.on_close(self.fleet.close)
        projection.on_event(self._on_event)

    @property
    def state(self) -> State:
        """The live state."""
        return self.view.state

    def _on_event(self, event: Event) -> None:
        self._writer.observe(event)
        self._wake.set()

    async def append(self, key: Key, message: Message) -> int:
        """Append one event of the scheduler's and wait until the state includes it; see `EventWriter.append`."""
        return await self._writer.append(key, message)
