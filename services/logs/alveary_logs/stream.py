"""What of the logs is still on the stream: read in pages that followers of one run share, and told of when more arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import nats.errors
from nats.js.errors import NotFoundError

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import token
from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.eventlog import LOGS, EventLog
from alveary_core.events import STREAM, Key, decode
from alveary_logs.archive import last_of
from alveary_logs.wire import Filter, encode, provisional, select, sequence_of

T = TypeVar("T")
# Bytes of a page, and of all pages that are kept for who comes next.
PAGE_BYTES = 1 << 20
CACHE_BYTES = 32 << 20
_PAGE_MESSAGES = 512
_ANSWER_SECONDS = 5.0
_TRIES = 6
_PAUSE_SECONDS = 0.005
# Replies to different wishes that are kept with a chunk.
_SELECTIONS = 8


def subject_of(key: Key) -> str:
    """Where the lines of a log are published."""
    return f"alveary-logs.{token(key.workspace)}.{token(key.id)}"


@dataclass(slots=True)
class Chunk:
    """One message of the stream: its lines as a serialized TailResponse, and what of them different callers want.

    `payload` has what stays, `momentary` the provisional lines as well.
    """

    sequence: int
    payload: bytes
    momentary: bytes
    selected: dict[Filter, bytes] = field(default_factory=dict)

    def whole(self, by: Filter) -> bytes:
        """All lines, with provisional ones if the filter takes them."""
        return self.momentary if by.provisional else self.payload

    def wanted(self, by: Filter) -> bytes | None:
        """The lines that pass a filter, where that was asked for before."""
        return self.whole(by) if by.everything else self.selected.get(by)

    def select(self, by: Filter) -> bytes:
        """The lines that pass a filter. Takes a while: not on the event loop."""
        known = self.wanted(by)
        if known is None:
            if len(self.selected) >= _SELECTIONS:
                self.selected.clear()
            known = self.selected[by] = select(self.whole(by), by)
        return known


class Overtaken(Exception):
    """What comes next was archived meanwhile, by the event at `sequence`."""

    def __init__(self, sequence: int) -> None:
        super().__init__(f"archived by event {sequence}")
        self.sequence = sequence


class LogStream:
    """Reads the stream of logs. A log is named by its aggregate's key."""

    def __init__(self, log: EventLog, executor: Executor) -> None:
        self._log, self._executor = log, executor
        # What follows chunk N of a subject, newest used last. Chunks never change, so neither does this.
        self._cache: OrderedDict[tuple[str, int], Chunk] = OrderedDict()
        self._cached = 0
        self._readings: dict[str, _Reading] = {}
        self._watched: dict[str, Watch] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def run_aside(self, work: Callable[[], T]) -> T:
        """The result of `work`, done on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def messages(self, subject: str, start: int, most: int = PAGE_BYTES) -> list[tuple[int, bytes]]:
        """Messages of a subject from sequence `start` on, about `most` bytes of them; none: there are none now.

        Raises:
            Unavailable: the stream did not answer.
        """
        pause = 0.05
        for attempt in range(1, _TRIES + 1):
            try:
                return await self._messages(subject, start, most)
            except (nats.errors.Error, _Incomplete, TimeoutError, OSError) as error:
                if attempt == _TRIES or self._log.connection.is_closed:
                    raise Unavailable(f"the stream of logs does not answer: {error or type(error).__name__}; try again") from error
                telemetry.logger().info("logs.read.retry", subject=subject, error=str(error) or type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 3, 2.0)
        raise AssertionError("unreachable")

    async def _messages(self, subject: str, start: int, most: int) -> list[tuple[int, bytes]]:
        # A batched direct get: it needs no consumer, and what was not asked for is not sent.
        connection = self._log.connection
        inbox = connection.new_inbox()
        subscription = await connection.subscribe(inbox, pending_msgs_limit=-1, pending_bytes_limit=-1)
        request = {"seq": max(start, 1), "batch": _PAGE_MESSAGES, "max_bytes": most, "next_by_subj": subject}
        found: list[tuple[int, bytes]] = []
        try:
            await connection.publish(f"$JS.API.DIRECT.GET.{LOGS}", json.dumps(request).encode(), reply=inbox)
            while True:
                message = await subscription.next_msg(timeout=_ANSWER_SECONDS)
                headers = message.headers or {}
                status, before = headers.get("Status"), int(headers.get("Nats-Last-Sequence", 0))
                if status == "404":
                    return []
                if status not in (None, "204"):
                    raise _Incomplete(f"status {status} {headers.get('Description', '')}")
                if before != (found[-1][0] if found else 0):
                    raise _Incomplete(f"message {before} did not arrive")
                if status == "204":
                    return found
                found.append((int(headers["Nats-Sequence"]), message.data))
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def newest(self, subject: str) -> int:
        """Sequence of the newest message of a subject, as the stream's leader has it; 0: there is none."""
        try:
            return (await self._log.js.get_last_msg(LOGS, subject)).seq or 0
        except NotFoundError:
            return 0
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise Unavailable(f"the stream of logs does not answer: {error or type(error).__name__}; try again") from error

    async def archived_to(self, key: Key) -> tuple[int, int]:
        """The last cursor of a log that is archived, and the event that says so, from the event log itself; (0, 0): nothing is.

        Raises:
            Unavailable: the event log did not answer.
        """
        try:
            raw = await self._log.js.get_last_msg(STREAM, key.subject("archived"))
        except NotFoundError:
            return 0, 0
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise Unavailable(f"the event log does not answer: {error or type(error).__name__}; try again") from error
        assert raw.subject is not None and raw.seq is not None
        event = decode(raw.subject, dict(raw.headers or {}), raw.data or b"", raw.seq)
        assert isinstance(event.message, ev.LogArchived)
        return last_of(event.message), event.sequence

    async def page(self, key: Key, position: int, wanted: Filter) -> list[Chunk]:
        """Chunks with lines behind the cursor `position`, about a page of them, with what of them is wanted; none: there are none now.

        Raises:
            Overtaken: what follows is in the archive by now.
            Unavailable: the stream did not answer.
        """
        subject = subject_of(key)
        after = sequence_of(position + 1) - 1  # a cursor may be in the middle of a chunk
        chunks = self._known(subject, after)
        if chunks and all(chunk.wanted(wanted) is not None for chunk in chunks):
            return chunks
        async with self._locked(subject) as last:
            chunks = self._known(subject, after)
            if not chunks:
                await asyncio.sleep(last.pause())
                messages = await self.messages(subject, after + 1)
                # Asked after the messages were: what was purged before they came was archived before this answer.
                cursor, event = await self.archived_to(key)
                if cursor > position:
                    raise Overtaken(event)
                last.came(sum(len(data) for _, data in messages))
                chunks = await self.run_aside(partial(_chunks, messages))
                after = max(after, sequence_of(cursor))
                for chunk in chunks:
                    self._remember(subject, after, chunk)
                    after = chunk.sequence
            if not all(chunk.wanted(wanted) is not None for chunk in chunks):
                await self.run_aside(lambda: [chunk.select(wanted) for chunk in chunks])
        return chunks

    def _known(self, subject: str, after: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        size = 0
        while size < PAGE_BYTES and (chunk := self._cache.get((subject, after))) is not None:
            self._cache.move_to_end((subject, after))
            chunks.append(chunk)
            size += len(chunk.payload)
            after = chunk.sequence
        return chunks

    def _remember(self, subject: str, after: int, chunk: Chunk) -> None:
        if (subject, after) not in self._cache:
            self._cached += len(chunk.payload)
        self._cache[subject, after] = chunk
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached -= len(oldest.payload)

    @contextlib.asynccontextmanager
    async def _locked(self, subject: str) -> AsyncGenerator[_Reading]:
        reading = self._readings.setdefault(subject, _Reading())
        reading.users += 1
        try:
            async with reading.lock:
                yield reading
        finally:
            reading.users -= 1
            if not reading.users and reading.idle():
                self._readings.pop(subject, None)
                for other in [s for s, r in self._readings.items() if not r.users and r.idle()]:
                    del self._readings[other]

    @contextlib.contextmanager
    def watch(self, key: Key) -> Iterator[Watch]:
        """Tells when a run's log grows; all that follow one run share it."""
        subject = subject_of(key)
        watch = self._watched.get(subject)
        if watch is None:
            watch = self._watched[subject] = Watch(self._log, subject)
        watch.users += 1
        try:
            yield watch
        finally:
            watch.users -= 1
            if not watch.users:
                del self._watched[subject]
                ending = asyncio.create_task(watch.close())
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    def nudge(self, key: Key) -> None:
        """Let the followers of a run look again: it is final, or a part of its log was archived."""
        if (watch := self._watched.get(subject_of(key))) is not None:
            watch.nudge()


class Watch:
    """The arrivals of one subject: a consumer that gets their headers alone."""

    def __init__(self, log: EventLog, subject: str) -> None:
        self.users = 0
        self._log, self._subject = log, subject
        self._changed, self._ready = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"logs.watch.{subject}")

    async def _run(self) -> None:
        start = (await self._log.js.stream_info(LOGS)).state.last_seq + 1
        async with contextlib.aclosing(self._log.follow([self._subject], start, LOGS, headers_only=True)) as stream:
            async for _ in stream:
                self._ready.set()
                self.nudge()

    def nudge(self) -> None:
        """Wake who waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    def ticket(self) -> asyncio.Event:
        """Take it before looking whether there is more: it is set by whatever comes after."""
        return self._changed

    async def wait(self, ticket: asyncio.Event, patience: float) -> None:
        """Return when something came since the ticket was taken, or after `patience` seconds, which cover a lost sign.

        Raises:
            Unavailable: the stream cannot be watched.
        """
        waiting = asyncio.create_task(ticket.wait())
        try:
            await asyncio.wait({waiting, self._task}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self._task.done() and not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise Unavailable(f"the stream of logs cannot be watched: {error or type(error).__name__}; try again") from error

    async def close(self) -> None:
        """Stop watching."""
        # Repeatedly: a cancellation that coincides with the end of a wait may be lost (cpython issue 86296).
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.2)


class _Reading:
    """The reader of the stream for one subject, and when it was read last."""

    def __init__(self) -> None:
        self.lock, self.users = asyncio.Lock(), 0
        self._at, self._full = 0.0, True

    def came(self, size: int) -> None:
        """Note that so many bytes came."""
        self._at, self._full = time.monotonic(), size >= PAGE_BYTES // 2

    def pause(self) -> float:
        """How long to wait, seconds: a chatty run is read some times a second, not once for each of its messages."""
        return 0.0 if self._full else max(self._at + _PAUSE_SECONDS - time.monotonic(), 0.0)

    def idle(self) -> bool:
        """Whether nothing is left to remember."""
        return time.monotonic() > self._at + _PAUSE_SECONDS


class _Incomplete(Exception):
    """A page did not come whole."""


def _chunks(messages: list[tuple[int, bytes]]) -> list[Chunk]:
    chunks = []
    for sequence, data in messages:
        momentary = encode(sequence, data)
        passing = provisional(data)
        chunks.append(Chunk(sequence, encode(sequence, data, passing) if passing else momentary, momentary))
    return chunks
