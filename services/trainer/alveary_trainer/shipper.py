"""Log lines and metric points on their way to the bus: batched, acknowledged, in order, bounded.

What the bus refuses never stops a run: a message that is too large is refused by itself, and while a stream takes nothing (it is
full) batches are lost after a while, counted, and the loss is said. A bus that cannot be reached loses nothing: the attempt's
lease ends first.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import nats.errors
from google.protobuf.message import Message
from nats.js import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError

from alveary_contracts.ids import new_id
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.runs.v1 import runs_pb2
from alveary_core import telemetry

if TYPE_CHECKING:
    from alveary_trainer.lines import Lines

# A process that prints faster than the network takes is slowed down once this much waits, bytes.
HIGH_WATER = 8 << 20
CHUNK = 192 << 10
# Largest message that is taken, bytes as it is sent: what one metric point may have.
LARGEST = 1 << 20
_LINGER = 0.005
# How long a stream may refuse what it is sent before it is lost, and how often it is tried meanwhile and after, seconds.
_REFUSING_SECONDS = 30.0
_RETRY_SECONDS = 1.0
# JetStream's error for a message beyond the stream's own limit.
_TOO_LARGE = 10054


class Publish(Protocol):
    """What a shipper needs of JetStream."""

    async def publish(
        self, subject: str, payload: bytes = ..., timeout: float | None = ..., *, headers: dict[str, str] | None = ...
    ) -> object:
        """Return once the stream has the message."""
        ...


class TooLarge(ValueError):
    """A message is larger than one may be; the text says how large, and what the limit is."""


class Shipper:
    """Publishes messages in batches, each under an id of its own, until it is acknowledged."""

    def __init__(
        self, js: JetStreamContext | Publish, subject: str, make: Callable[[list[Message]], Message], log: Callable[[str], None] = lambda _: None,
        what: str = "messages", refusing_seconds: float = _REFUSING_SECONDS,
    ) -> None:  # fmt: skip
        """`log` is told of what was lost or refused, `what` names the messages in it.

        `refusing_seconds`: how long a stream may refuse a batch before it is lost.
        """
        self._js, self._subject, self._make, self._log, self._what = js, subject, make, log, what
        self._refusing_seconds = refusing_seconds
        self._queue: deque[tuple[Message, int]] = deque()
        self._waiting = 0
        self._arrived, self._drained = asyncio.Event(), asyncio.Event()
        self._drained.set()
        self._room = asyncio.Event()
        self._room.set()
        # Messages that were lost, ever and since it was said last.
        self.lost = self._unsaid = 0
        # When the stream took something last, and was tried last, while it refuses (time.monotonic()); 0: it does not.
        self._refusing, self._tried = 0.0, 0.0
        self._acknowledged = time.monotonic()
        self._given_up = False
        self._task = asyncio.create_task(self._run())

    def add(self, message: Message) -> None:
        """Take one; look at `room` before taking many.

        Raises:
            TooLarge: it has more than LARGEST bytes.
        """
        size = message.ByteSize()
        if size > LARGEST:
            raise TooLarge(f"it has {size:,} bytes, and one may have {LARGEST:,}")
        if self._given_up:
            self._lose(1)
            return
        self._queue.append((message, size))
        self._waiting += size
        self._drained.clear()
        self._arrived.set()
        if self._waiting >= HIGH_WATER:
            self._room.clear()

    async def room(self) -> None:
        """Return when more may be added."""
        await self._room.wait()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(_LINGER)
            batch: list[Message] = []
            size = 0
            while self._queue and (not batch or size + self._queue[0][1] <= CHUNK):
                message, one = self._queue.popleft()
                batch.append(message)
                size += one
            if batch:
                await self._ship(batch)
            self._waiting -= size
            if self._waiting < HIGH_WATER // 2:
                self._room.set()
            if not self._queue:
                self._arrived.clear()
                self._drained.set()

    async def _ship(self, batch: list[Message]) -> None:
        """Send a batch, or lose it; never raises."""
        if self._refusing and time.monotonic() - self._refusing > self._refusing_seconds:
            if time.monotonic() - self._tried < _RETRY_SECONDS:
                self._lose(len(batch))
                return
            timeout = 0.0
        else:
            timeout = self._refusing_seconds
        try:
            await self._publish(self._make(batch).SerializeToString(), timeout)
            self._acknowledged, self._refusing = time.monotonic(), 0.0
            if self._unsaid:
                lost, self._unsaid = self._unsaid, 0
                self._log(f"{lost:,} {self._what} were lost: the stream {self._subject.partition('.')[0]} took nothing, it was full")
        except TooLarge as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await self._ship(batch[:half])
                await self._ship(batch[half:])
                return
            self._lose(1, said=True)
            self._log(f"one of the {self._what} was refused by the message bus: {error}")
        except Exception as error:  # the stream refuses, or something that nobody foresaw: the next batch may do better
            self._lose(len(batch))
            telemetry.logger().warning("ship.lost", subject=self._subject, messages=len(batch), error=str(error) or type(error).__name__)

    async def _publish(self, data: bytes, timeout: float) -> None:
        # One at a time keeps the order; an id that stays the same makes repeating harmless.
        headers = {"Nats-Msg-Id": new_id()}
        pause = 0.05
        while True:
            self._tried = time.monotonic()
            try:
                await self._js.publish(self._subject, data, timeout=5, headers=headers)
                return
            except nats.errors.MaxPayloadError as error:
                raise TooLarge(f"{len(data):,} bytes are more than it takes") from error
            except (APIError, NoStreamResponseError) as error:
                if isinstance(error, APIError) and error.err_code == _TOO_LARGE:
                    raise TooLarge(f"{len(data):,} bytes are more than its stream takes") from error
                self._refusing = self._refusing or time.monotonic()
                if time.monotonic() >= self._refusing + timeout or self._given_up:
                    raise
                telemetry.logger().info("ship.refused", subject=self._subject, error=str(error) or type(error).__name__)
            except (nats.errors.Error, TimeoutError, OSError) as error:
                # Nobody answers: for as long as the attempt has its lease.
                if self._given_up:
                    raise
                telemetry.logger().info("ship.retry", subject=self._subject, error=str(error) or type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _lose(self, count: int, *, said: bool = False) -> None:
        self.lost += count
        self._unsaid += 0 if said else count
        telemetry.LOST.labels(self._what).inc(count)

    async def flush(self, timeout: float | None = None) -> None:
        """Return when all that was added is acknowledged, or lost.

        Raises:
            TimeoutError: not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            await self._drained.wait()

    async def finish(self, stalled_seconds: float) -> None:
        """Flush; what waits when nothing was acknowledged for so long is lost, and so is what comes after."""
        start = time.monotonic()
        while not self._drained.is_set():
            left = max(self._acknowledged, start) + stalled_seconds - time.monotonic()
            if left <= 0:
                self._given_up = True
                self._lose(len(self._queue))
                self._queue.clear()
                return
            try:
                await self.flush(min(left, 1.0))
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Stop; what was not acknowledged is lost, so flush first."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def log_chunk(lines: list[Message]) -> Message:
    """Lines as one message of the stream of logs."""
    return logs_pb2.LogChunk(lines=lines)  # type: ignore[arg-type]


def metric_batch(attempt: int) -> Callable[[list[Message]], Message]:
    """Makes one message of the stream of metrics of points that an attempt logged."""
    return lambda points: runs_pb2.MetricBatch(points=points, attempt=attempt)  # type: ignore[arg-type]


async def pump(fd: int, lines: Lines, shipper: Shipper, over: asyncio.Event | None = None) -> None:
    """Read a pipe to its end. While the shipper has no room nothing is read, and the writer is slowed down.

    `over`: set once all writers are dead; then what the pipe holds is read, and its end is not waited for, as somebody else
    may hold it open.
    """
    over = over or asyncio.Event()
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(over.wait())
    try:
        while True:
            await shipper.room()
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                if over.is_set():
                    return
                ready = loop.create_future()
                loop.add_reader(fd, lambda ready=ready: ready.done() or ready.set_result(None))  # type: ignore[misc]
                try:
                    await asyncio.wait({ready, waiting}, timeout=lines.due, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    loop.remove_reader(fd)
                lines.show()
                continue
            if not data:
                return
            lines.feed(data)
    finally:
        waiting.cancel()
        lines.end()
        os.close(fd)
