"""Events for automations: every fact, in order per aggregate, replayable, at least once."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from alveary import _loop
from alveary_contracts import exit_reasons

if TYPE_CHECKING:
    from alveary.session import Session
    from alveary_contracts.runs.v1 import runs_pb2 as pb


@dataclass(frozen=True)
class Event:
    """One fact. `data` is the body that docs/asyncapi.json describes; `id` tells a repeated delivery."""

    id: str
    type: str
    subject: str
    sequence: int
    time: datetime
    data: dict[str, Any]
    _done: _Once | None = field(default=None, repr=False, compare=False)

    def ack(self) -> None:
        """It is handled; without this it comes again."""
        if self._done is not None:
            self._done.set_result(None)


class Events:
    """`workspace.events`."""

    def __init__(self, workspace: Session) -> None:
        self._workspace = workspace

    def subscribe(
        self,
        pattern: str,
        *,
        durable: str = "",
        from_sequence: int | None = None,
        from_time: datetime | None = None,
        timeout: float | None = None,
    ) -> Iterator[Event]:
        """Events that match `pattern` ("model.exported", "run.*"), as they come.

        Each counts as handled when the next one is asked for, or when `ack()` is called; one that was not is
        delivered again to the next subscriber of the same `durable` name. Without from_sequence or from_time a new
        subscription begins with what comes next. Ends after `timeout` seconds without an event (None: never).

        Raises:
            AlvearyError: the pattern is not one, or the platform refused.
        """
        waiting: queue.Queue[tuple[pb.Event, asyncio.Future[None]] | BaseException] = queue.Queue(maxsize=1)
        loop = _loop.loop()

        async def handle(event: pb.Event) -> None:
            done: asyncio.Future[None] = loop.create_future()
            await asyncio.to_thread(waiting.put, (event, done))
            await done

        async def work() -> None:
            try:
                await self._workspace._client.events.subscribe(
                    pattern, handle, durable=durable, from_sequence=from_sequence, from_time=from_time
                )
            except Exception as error:
                await asyncio.to_thread(waiting.put, error)

        task = asyncio.run_coroutine_threadsafe(work(), loop)
        try:
            while True:
                try:
                    item = waiting.get(timeout=timeout)
                except queue.Empty:
                    return
                if isinstance(item, BaseException):
                    raise item
                event, done = item
                acknowledge = _Once(loop, done)
                data = exit_reasons.with_words(json.loads(event.data_json))
                yield Event(event.id, event.type, event.subject, event.sequence, event.time.ToDatetime(), data, acknowledge)
                acknowledge.set_result(None)
        finally:
            task.cancel()


class _Once:
    """A future of the loop's thread, set from another."""

    def __init__(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        self._loop, self._future = loop, future

    def done(self) -> bool:
        return self._future.done()

    def set_result(self, _: None) -> None:
        def finish() -> None:
            if not self._future.done():
                self._future.set_result(None)

        self._loop.call_soon_threadsafe(finish)
