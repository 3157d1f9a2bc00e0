"""Appends of the scheduler's own events, each with the sequence that its aggregate is expected at."""

from __future__ import annotations

import asyncio

from google.protobuf.message import Message

from alveary_core.errors import Aborted
from alveary_core.eventlog import Conflict, EventLog
from alveary_core.events import Event, Key
from alveary_scheduler.leadership import Leadership
from alveary_scheduler.projection import SchedulerProjection

_TRIES = 5
_CONFLICT_PAUSE_SECONDS = 0.05
_ALONE_TIMEOUT_SECONDS = 1.0


class EventWriter:
    """The only writer of targets, nodes and placements."""

    def __init__(self, log: EventLog, projection: SchedulerProjection, leadership: Leadership) -> None:
        self._log = log
        self._projection = projection
        self._leadership = leadership
        self._sequences: dict[Key, int] = {}

    def observe(self, event: Event) -> None:
        """Take an event that the projection has folded: its sequence is the newest of its aggregate."""
        if event.key.aggregate in ("target", "node", "placement"):
            self._sequences[event.key] = event.sequence
        elif event.name in ("completed", "failed", "canceled"):
            self._sequences.pop(Key(event.key.workspace, "placement", event.key.id), None)

    async def append(self, key: Key, message: Message) -> int:
        """Append one event and wait until the state includes it; returns its sequence.

        Raises:
            FailedPrecondition: another scheduler is active.
            Aborted: another writer appends to the same aggregate again and again.
        """
        for _ in range(_TRIES):
            if key not in self._sequences:
                events = await self._log.read(key)
                self._sequences[key] = events[-1].sequence if events else 0
            try:
                done = await self._log.append(key, [message], self._sequences[key])
            except Conflict:
                # An append of ours whose acknowledgement never came, or a second active scheduler, which is a fatal error.
                await self._leadership.require_alone(_ALONE_TIMEOUT_SECONDS)
                self._sequences.pop(key, None)
                await asyncio.sleep(_CONFLICT_PAUSE_SECONDS)
                continue
            self._sequences[key] = done.sequence
            await self._projection.wait_for(done.sequence)
            return done.sequence
        raise Aborted(f"{key.subject()}: another writer appends to it: is a second scheduler running?")
