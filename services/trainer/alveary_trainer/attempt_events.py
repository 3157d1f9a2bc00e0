"""The events of an attempt: appended in order, each once, without holding up the work."""

from __future__ import annotations

import asyncio
from typing import Protocol

from google.protobuf.message import Message

from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.eventlog import Conflict, EventLog
from alveary_core.events import Key
from alveary_trainer.end_signal import EndSignal

# Consecutive tries of an event that fails for a reason nobody foresaw.
_MAX_TRIES = 20
_RETRY_SECONDS = 0.5


class EventWriter(Protocol):
    """Takes what happens to an attempt."""

    def publish(self, event: Message) -> None:
        """Append `event` after those that were published before; returns at once."""
        ...

    async def finish(self) -> None:
        """Return when all published events are in the log, or the attempt is fenced."""
        ...

    async def close(self) -> None:
        """Stop; what is not in the log yet is dropped."""
        ...


class AttemptEventWriter:
    """Appends the events of an attempt for as long as it has its placement.

    A trainer is the only writer of its attempt. A conflict is therefore an append of its own whose acknowledgement was lost: the
    log is read again, and an event that is there already is not appended twice.
    """

    def __init__(self, log: EventLog, key: Key, end: EndSignal) -> None:
        self._log, self._key, self._end = log, key, end
        # Of the newest event in the log; 0: there is none.
        self._sequence = 0
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        # From the first event on.
        self._task: asyncio.Task[None] | None = None

    def publish(self, event: Message) -> None:
        """See EventWriter."""
        telemetry.logger().info("attempt", attempt=self._key.id, phase=type(event).__name__)
        self._queue.put_nowait(event)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def finish(self) -> None:
        """See EventWriter.

        Raises:
            Exception: what the append of an event failed with _MAX_TRIES times in a row.
        """
        self._queue.put_nowait(None)
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """See EventWriter."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while (event := await self._queue.get()) is not None:
            await self._append(event)

    async def _append(self, event: Message) -> None:
        tries = 0
        while not self._end.fenced:
            try:
                if await self._append_once(event):
                    return
            except AlvearyError as error:  # the log is away: keep trying for as long as the attempt has its lease
                telemetry.logger().warning("attempt.event", attempt=self._key.id, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception:
                tries += 1
                telemetry.logger().exception("attempt.event", attempt=self._key.id, tries=tries)
                if tries == _MAX_TRIES:
                    raise  # the scheduler revokes the placement once this node no longer names the attempt
                await asyncio.sleep(_RETRY_SECONDS)

    async def _append_once(self, event: Message) -> bool:
        """Whether the event is in the log now; false: the newest event was another than thought, and the next try follows it."""
        try:
            self._sequence = (await self._log.append(self._key, [event], self._sequence)).sequence
            return True
        except Conflict:
            present = await self._log.read(self._key)
            self._sequence = present[-1].sequence if present else 0
            return bool(present) and type(present[-1].message) is type(event)


class NoEventWriter:
    """Of a follower: the leader of the gang writes the attempt's events."""

    def publish(self, event: Message) -> None:
        """Drop it."""

    async def finish(self) -> None:
        """Nothing is pending."""

    async def close(self) -> None:
        """Nothing runs."""
