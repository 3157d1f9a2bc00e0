"""Log lines and metric points on their way to the bus: batched, acknowledged, in order, bounded."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

import nats.errors
from google.protobuf.message import Message
from nats.js import JetStreamContext
from nats.js.errors import APIError

from alveary_contracts.ids import new_id
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.runs.v1 import runs_pb2
from alveary_core import telemetry
from alveary_trainer.adapters.runtime import opened

# A process that prints faster than the network takes is slowed down once this much waits, bytes.
HIGH_WATER = 8 << 20
CHUNK = 192 << 10
LINE = 256 << 10
_LINGER = 0.005
_IN_FLIGHT = 8


class Shipper:
    """Publishes messages in batches, each under an id of its own, until it is acknowledged."""

    def __init__(self, js: JetStreamContext, subject: str, make: Callable[[list[Message]], Message]) -> None:
        self._js, self._subject, self._make = js, subject, make
        self._queue: deque[tuple[Message, int]] = deque()
        self._waiting = 0
        self._arrived, self._drained = asyncio.Event(), asyncio.Event()
        self._drained.set()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._task = asyncio.create_task(self._run())

    def add(self, message: Message) -> None:
        """Take one; look at `room` before taking many."""
        size = message.ByteSize()
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
                await self._publish(self._make(batch).SerializeToString())
            self._waiting -= size
            if self._waiting < HIGH_WATER // 2:
                self._room.set()
            if not self._queue:
                self._arrived.clear()
                self._drained.set()

    async def _publish(self, data: bytes) -> None:
        # One at a time keeps the order; an id that stays the same makes repeating harmless. There is no limit to
        # the number of tries: the attempt ends when its lease does, and this task with it.
        headers = {"Nats-Msg-Id": new_id()}
        pause = 0.05
        while True:
            try:
                await self._js.publish(self._subject, data, headers=headers, timeout=5)
                return
            except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
                telemetry.logger().info("ship.retry", subject=self._subject, error=str(error) or type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)

    async def flush(self, patience: float | None = None) -> None:
        """Return when all that was added is acknowledged.

        Raises:
            TimeoutError: not within `patience` seconds.
        """
        async with asyncio.timeout(patience):
            await self._drained.wait()

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


class Lines:
    """Bytes in, lines out to the shipper: any length, any bytes, each with the time it was read."""

    def __init__(self, shipper: Shipper, stream: str, rank: int, attempt: int, tail: deque[str] | None = None) -> None:
        self._shipper, self._tail = shipper, tail
        self._stream, self._rank, self._attempt = stream, rank, attempt
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            while len(line) > LINE:
                self._add(line[:LINE], partial=True)
                line = line[LINE:]
            self._add(line)
        while len(self._rest) > LINE:
            self._add(self._rest[:LINE], partial=True)
            self._rest = self._rest[LINE:]

    def end(self) -> None:
        """No more comes: a last line without an end counts too."""
        if self._rest:
            self._add(self._rest)
        self._rest = b""

    def _add(self, data: bytes, partial: bool = False) -> None:
        line = logs_pb2.LogLine(stream=self._stream, rank=self._rank, attempt=self._attempt, data=data, partial=partial)
        line.time.GetCurrentTime()
        self._shipper.add(line)
        if self._tail is not None:
            self._tail.append(data[:2000].decode(errors="replace"))


async def pump(fd: int, lines: Lines, shipper: Shipper) -> None:
    """Read a pipe to its end. While the shipper has no room nothing is read, and the writer is slowed down."""
    loop = asyncio.get_running_loop()
    try:
        while True:
            await shipper.room()
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                ready = loop.create_future()
                loop.add_reader(fd, lambda ready=ready: ready.done() or ready.set_result(None))  # type: ignore[misc]
                try:
                    await ready
                finally:
                    loop.remove_reader(fd)
                continue
            if not data:
                return
            lines.feed(data)
    finally:
        lines.end()
        os.close(fd)


class FolderTail:
    """Streams what is appended to the files of a folder (./logs), each file a stream of its own."""

    MAX_FILES = 200

    def __init__(self, folder: Path, shipper: Shipper, attempt: int, below: Path, rank: int = 0) -> None:
        self._folder, self._shipper, self._attempt, self._below, self._rank = folder, shipper, attempt, below, rank
        self._known: dict[Path, tuple[int, Lines]] = {}

    async def run(self) -> None:
        """Look every half second, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(0.5)

    async def look(self) -> None:
        """Ship what is new."""
        for path in sorted(self._folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            if path not in self._known:
                if len(self._known) >= self.MAX_FILES:
                    continue  # they are stored at the end all the same
                name = f"logs/{path.relative_to(self._folder)}"
                self._known[path] = (0, Lines(self._shipper, name, self._rank, self._attempt))
            position, lines = self._known[path]
            try:
                with opened(path, self._below) as readable, readable.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < position:
                        position = 0  # truncated: it begins anew
                    file.seek(position)
                    while data := file.read(1 << 16):
                        await self._shipper.room()
                        lines.feed(data)
                        position += len(data)
            except (FileNotFoundError, ValueError):
                continue  # it went, or became something else, meanwhile
            self._known[path] = (position, lines)

    async def finish(self) -> None:
        """Ship the rest."""
        await self.look()
        for _, lines in self._known.values():
            lines.end()
