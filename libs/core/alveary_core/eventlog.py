"""The event log: one JetStream stream that is the only truth. Append, read, follow."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats.errors
import stamina
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    StreamInfo,
)
from nats.js.errors import APIError, BadRequestError, NotFoundError

from alveary_contracts import rules
from alveary_contracts.ids import new_id
from alveary_core import deadletters, telemetry, tls
from alveary_core.consumer import Consumer
from alveary_core.deadletters import DeadLetters
from alveary_core.errors import FailedPrecondition, InvalidArgument, Unavailable
from alveary_core.events import STREAM, Event, Key, MalformedEvent, UnknownEvent, body, decode, envelope, name_of

LOGS, METRICS = "ALVEARY_LOGS", "ALVEARY_METRICS"
# Of subjects, envelopes and bodies. Raise it with any change that a reader of before would misread, and write the migration.
LOG_FORMAT = 1
_FORMAT_KEY = "alveary.format"
# JetStream's error for a missed Nats-Expected-Last-Subject-Sequence.
_WRONG_LAST_SEQUENCE = (10071, 10164)
_HEARTBEAT = 2.0
# Room that subject and headers of an event take, at most.
_ENVELOPE_BYTES = 8 << 10
_TRANSIENT = (nats.errors.Error, asyncio.TimeoutError, ConnectionError, OSError)


class Conflict(Exception):
    """Another writer appended to the aggregate since it was read."""


@dataclass(frozen=True)
class Appended:
    """Where an append ended."""

    sequence: int


async def connect(url: str, user: str, password: str, name: str, patience: float = 30.0, ca: Path | None = None) -> Client:
    """A connection that comes back by itself, for as long as it takes.

    `tls://` is encrypted from its first byte (nats-server: `handshake_first`): nats-py would send the password unencrypted to
    a server that does not insist on TLS. `ca`: authorities that are believed beside the public ones, PEM.

    Raises:
        Unavailable: no server answered within `patience` seconds at first, or it is not the one that `ca` knows.
    """
    log, stranger, last = telemetry.logger(), asyncio.Event(), "is it started?"

    async def on_error(error: Exception) -> None:
        nonlocal last
        last = str(error) or type(error).__name__
        log.warning("nats", error=last)
        if isinstance(error, ssl.SSLCertVerificationError):
            stranger.set()

    client = Client()
    options: dict[str, Any] = {"tls": tls.context(ca), "tls_handshake_first": True} if url.startswith("tls://") else {}
    options["reconnect_time_wait"] = 0.2
    # It tries for ever, at first as well: the deadline is ours.
    connecting = asyncio.create_task(
        client.connect(
            url, user=user or None, password=password or None, name=name, error_cb=on_error, max_reconnect_attempts=-1,
            connect_timeout=3, ping_interval=5, max_outstanding_pings=2, pending_size=64 * 1024 * 1024,
            **options,
        )
    )  # fmt: skip
    refused = asyncio.create_task(stranger.wait())
    try:
        await asyncio.wait({connecting, refused}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done():
            connecting.result()
            return client
    finally:
        for task in (connecting, refused):
            task.cancel()
        await asyncio.gather(connecting, refused, return_exceptions=True)
    await client.close()
    if stranger.is_set():
        raise Unavailable(f"the message bus at {url} cannot show that it is the one ({last}): is ALVEARY_CA its authority?")
    raise Unavailable(f"the message bus at {url} does not answer within {patience:g} s: {last}")


def stream_configs() -> list[StreamConfig]:
    """All streams of the platform, as `ensure_streams` creates them."""
    day = 24 * 3600.0
    return [
        StreamConfig(
            name=STREAM,
            subjects=["alveary.>"],
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            duplicate_window=120,
            allow_direct=True,
            metadata={_FORMAT_KEY: str(LOG_FORMAT)},
            description="Every fact of Alveary. Nothing else is a source of truth.",
        ),
        StreamConfig(
            name=LOGS,
            subjects=["alveary-logs.>"],
            storage=StorageType.FILE,
            duplicate_window=120,
            discard=DiscardPolicy.NEW,
            max_bytes=20 * 2**30,
            allow_direct=True,
            description="Log lines of runs that are not archived yet.",
        ),
        StreamConfig(
            name=METRICS,
            subjects=["alveary-metrics.>"],
            storage=StorageType.FILE,
            duplicate_window=120,
            max_age=3650 * day,
            allow_direct=True,
            description="Metric points of runs.",
        ),
        deadletters.STREAM_CONFIG,
    ]


def _check_format(config: StreamConfig) -> None:
    """Refuse an event log of another format.

    Raises:
        FailedPrecondition: an earlier or a later version of Alveary wrote it.
    """
    found = (config.metadata or {}).get(_FORMAT_KEY, "0")
    if config.name != STREAM or found == str(LOG_FORMAT):
        return
    later = found.isdecimal() and int(found) > LOG_FORMAT
    raise FailedPrecondition(
        f"the event log has format {found}, and this version of Alveary reads format {LOG_FORMAT}: "
        + (
            "install the later version that wrote it"
            if later
            else "an earlier version wrote it; run that version, or begin with an empty log"
        ),
        STREAM,
    )


async def ensure_streams(connection: Client, patience: float = 30.0) -> None:
    """Create the streams where they are missing. Idempotent and safe to race.

    Raises:
        FailedPrecondition: the event log has another format.
    """
    js = connection.jetstream(timeout=5)
    async for attempt in stamina.retry_context(on=_TRANSIENT, attempts=None, timeout=patience, wait_max=1.0):
        with attempt:
            for config in stream_configs():
                try:
                    _check_format((await js.stream_info(str(config.name))).config)
                except NotFoundError:
                    with contextlib.suppress(BadRequestError):  # another service was faster
                        await js.add_stream(config)


class EventLog:
    """The log through one connection. `source` is the service that writes."""

    def __init__(self, connection: Client, source: str) -> None:
        self.connection = connection
        self.js: JetStreamContext = connection.jetstream(timeout=5)
        # For what may take long on a large stream.
        self._patient_js: JetStreamContext = connection.jetstream(timeout=60)
        self.source = source
        self.dead_letters = DeadLetters(connection, source)

    async def append(self, key: Key, messages: Sequence[Message], expected: int) -> Appended:
        """Append events to an aggregate whose newest event is `expected` (0: it has none).

        Each event is durable when this returns. A lost acknowledgement is retried under the same id, which the
        server deduplicates.

        Raises:
            Conflict: the aggregate has a newer event. Reload and decide again.
            InvalidArgument: an event is larger than a message of the log may be, or holds a number that no fold could take.
            Unavailable: the log did not answer in time; what was appended of `messages` is a prefix of them.
        """
        for message in messages:
            aggregate, name = name_of(message)
            if aggregate != key.aggregate:
                raise ValueError(f"{message.DESCRIPTOR.name} does not belong to {key}")
            if found := rules.problems(message, texts=False):
                raise InvalidArgument(*((f"{aggregate}.{name}: {path}", text) for path, text in found))
            headers = envelope(key, message, new_id(), self.source, telemetry.traceparent.get())
            headers["Nats-Expected-Last-Subject-Sequence"] = str(expected)
            headers["Nats-Expected-Last-Subject-Sequence-Subject"] = key.subject()
            data = body(message)
            if len(data) > (most := self.connection.max_payload - _ENVELOPE_BYTES):
                raise InvalidArgument(
                    (
                        f"{aggregate}.{name}",
                        f"the event of {aggregate} {key.id} would have {len(data)} bytes, and the event log takes {most}",
                    )
                )
            expected = await self._publish(key.subject(name), data, headers, aggregate)
            telemetry.APPENDS.labels(f"{aggregate}.{name}").inc()
        return Appended(expected)

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str], aggregate: str) -> int:
        try:
            async for attempt in stamina.retry_context(on=_retriable, attempts=20, timeout=60, wait_max=5.0):
                with attempt:
                    return (await self.js.publish(subject, data, headers=headers)).seq
        except BadRequestError as error:
            if error.err_code in _WRONG_LAST_SEQUENCE:
                telemetry.CONFLICTS.labels(aggregate).inc()
                raise Conflict(subject) from error
            raise
        except _TRANSIENT as error:
            raise Unavailable(f"the event log does not take {subject}: {error or type(error).__name__}") from error
        raise AssertionError("unreachable")

    async def read(self, key: Key) -> list[Event]:
        """All events of one aggregate, from the server itself: never stale. The message of one that cannot be read is Empty.

        Raises:
            Unavailable: the log did not answer in time.
        """
        events: list[Event] = []
        start = 1
        try:
            while True:
                # Direct gets, one event after another: an aggregate has few, and this needs no consumer.
                try:
                    raw = await self.js.get_msg(STREAM, seq=start, subject=key.subject(), next=True)
                except NotFoundError:
                    return events
                assert raw.subject is not None and raw.seq is not None
                start = raw.seq + 1
                try:
                    events.append(decode(raw.subject, dict(raw.headers or {}), raw.data or b"", raw.seq))
                    continue
                except UnknownEvent as error:
                    telemetry.logger().warning("event.unknown", error=str(error))
                except MalformedEvent as error:
                    await self.dead_letters.put(f"aggregate-{key.aggregate}", raw.subject, raw.seq, error)
                # It changes nothing, but who appends must know that it is there.
                events.append(Event("", key, raw.subject.rpartition(".")[2], Empty(), raw.seq, 0.0))
        except _TRANSIENT as error:
            raise Unavailable(f"the event log does not answer: {error or type(error).__name__}") from error

    async def purge(self, key: Key, before: int) -> None:
        """Remove the events of an aggregate that are older than sequence `before`, once a newer one says it all.

        Raises:
            Unavailable: the log did not answer in time.
        """
        await self.purge_subject(key.subject(), before)

    async def purge_subject(self, subject: str, before: int | None, stream: str = STREAM) -> None:
        """Remove the messages of a subject, which may have wildcards, that are older than sequence `before`; None: all.

        Raises:
            Unavailable: the log did not answer in time.
        """
        try:
            await self._patient_js.purge_stream(stream, seq=before, subject=subject)
        except _TRANSIENT as error:
            raise Unavailable(f"the event log does not purge {subject}: {error or type(error).__name__}") from error

    async def info(self, stream: str = STREAM) -> StreamInfo:
        """What the server knows of a stream; asked again, for up to a minute, while it does not answer.

        Raises:
            nats.js.errors.NotFoundError: there is no such stream.
            Unavailable: it did not answer.
        """
        try:
            async for attempt in stamina.retry_context(on=_retriable, attempts=None, timeout=60, wait_max=5.0):
                with attempt:
                    return await self.js.stream_info(stream)
        except NotFoundError:
            raise
        except _TRANSIENT as error:
            raise Unavailable(f"the message bus does not tell of its stream {stream}: {error or type(error).__name__}") from error
        raise AssertionError("unreachable")

    async def last_sequence(self) -> int:
        """Sequence of the newest event of all.

        Raises:
            Unavailable: the log did not answer within a minute.
        """
        return (await self.info()).state.last_seq

    async def follow(
        self, subjects: Sequence[str], start: int, stream: str = STREAM, *, headers_only: bool = False
    ) -> AsyncGenerator[tuple[Msg, int] | None, None]:
        """Every message from sequence `start` on, in order and without gaps, for ever; None when caught up.

        With `headers_only` the messages come without their data.

        Survives reconnects and a lost consumer: it is created again after the last message that was yielded.
        """
        log = telemetry.logger()
        position = start - 1
        pause = 0.1
        while True:
            inbox, arrived = self.connection.new_inbox(), _Inbox()
            subscription = None
            name = ""
            try:
                subscription = await self.connection.subscribe(inbox, cb=arrived.put, pending_msgs_limit=-1, pending_bytes_limit=-1)
                info = await self.js.add_consumer(
                    stream,
                    ConsumerConfig(
                        deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=position + 1,
                        ack_policy=AckPolicy.NONE, filter_subjects=list(subjects), deliver_subject=inbox,
                        idle_heartbeat=_HEARTBEAT, flow_control=True, inactive_threshold=30, mem_storage=True,
                        num_replicas=1, headers_only=headers_only,
                    ),
                )  # fmt: skip
                name = info.name
                delivered = 0
                behind = bool(info.num_pending)
                if not behind:
                    yield None
                while True:
                    message = await arrived.next(3 * _HEARTBEAT)
                    if message.headers and message.headers.get("Status") == "100":
                        if message.reply:  # flow control: the answer opens the window
                            await self.connection.publish(message.reply)
                        last = message.headers.get("Nats-Last-Consumer")
                        if last is not None and int(last) != delivered:
                            raise _Gap(f"consumer is at {last}, {delivered} arrived")
                        # What was still to come may have been purged: then no message says that it is the last.
                        if behind and not message.reply and "Nats-Consumer-Stalled" not in message.headers:
                            behind = False
                            yield None
                        continue
                    meta = message.metadata
                    if meta.sequence.consumer != delivered + 1:
                        raise _Gap(f"message {meta.sequence.consumer} after {delivered}")
                    delivered += 1
                    position = meta.sequence.stream
                    pause = 0.1
                    behind = meta.num_pending > 0
                    yield message, position
                    if not behind:
                        yield None
            except (_Gap, *_TRANSIENT) as error:
                if self.connection.is_closed:
                    raise Unavailable("the connection to the message bus was closed") from error
                log.info("follow.restart", stream=stream, after=position, error=str(error) or type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 2.0)
            finally:
                with contextlib.suppress(*_TRANSIENT):
                    if subscription is not None:
                        await subscription.unsubscribe()
                    if name and self.connection.is_connected:
                        await self.js.delete_consumer(stream, name)

    async def consume(
        self, durable: str, subjects: Sequence[str], handler: Callable[[Event], Awaitable[None]], *, start: int = 1, at_once: int = 1
    ) -> None:
        """Hand each event to `handler`, at least once, in order; replicas of a service share one `durable`.

        An event whose handler raised comes again, later and later (up to 30 s); others are not held up by it. After a
        bounded number of tries it is set aside as a dead letter. With `at_once` more than 1, so many are handled at the same
        time, which has no order then. Runs until cancelled.
        """
        await Consumer(self, durable, subjects, handler, start, at_once).run()


class _Inbox:
    """Messages of a subscription in their order.

    `Subscription.next_msg` makes two tasks for each message, which is most of what following a long stream costs.
    """

    # So many messages are handed out before others have their turn on the event loop.
    _TURN = 100

    def __init__(self) -> None:
        self._messages: deque[Msg] = deque()
        self._arrived = asyncio.Event()
        self._taken = 0

    async def put(self, message: Msg) -> None:
        """Take one: the callback of the subscription."""
        self._messages.append(message)
        self._arrived.set()

    async def next(self, timeout: float) -> Msg:
        """The next message.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        self._taken += 1
        if self._taken % self._TURN == 0:
            await asyncio.sleep(0)
        if not self._messages:
            self._arrived.clear()
            async with asyncio.timeout(timeout):
                await self._arrived.wait()
        return self._messages.popleft()


class _Gap(Exception):
    """A message is missing between two."""


def _retriable(error: Exception) -> bool:
    if isinstance(error, APIError):
        return (error.code or 0) >= 500 or isinstance(error, nats.js.errors.ServiceUnavailableError)
    return isinstance(error, _TRANSIENT)
