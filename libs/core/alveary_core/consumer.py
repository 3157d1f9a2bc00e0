"""Durable consumers of the event log: each event is handled at least once, in order, or set aside as a dead letter."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import nats.errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from alveary_core import telemetry
from alveary_core.errors import Aborted, DeadlineExceeded, ResourceExhausted, Unavailable
from alveary_core.events import STREAM, Event, MalformedEvent, UnknownEvent, decode

if TYPE_CHECKING:
    from alveary_core.eventlog import EventLog

Handler = Callable[[Event], Awaitable[None]]
# After so many failures in this process an event is set aside. Errors that pass by themselves (a store or the bus that does
# not answer) count against a bound of their own, about eight hours of retries.
TRIES, TRIES_TRANSIENT = 8, 1000
# Deliveries after which an event is set aside at its next failure, or untried: it may be what ended the processes before.
_DELIVERIES_SUSPECT, _DELIVERIES_MOST = 40, 200
# An event that this consumer holds comes to another replica when nothing is heard of it for so long, seconds.
_ACK_SECONDS = 30.0
# Events that the server hands out ahead; those that wait their turn are kept by in-progress acknowledgements.
_WINDOW = 64
# A handler that takes longer than this is given up and tried again, seconds.
_HANDLER_SECONDS = 3600.0
_LONGEST_PAUSE_SECONDS = 30.0
_TRANSIENT = (nats.errors.Error, asyncio.TimeoutError, ConnectionError, OSError)
_PASSING = (*_TRANSIENT, Unavailable, Aborted, DeadlineExceeded, ResourceExhausted)


class Consumer:
    """One durable consumer; replicas of a service share it by its name."""

    def __init__(self, log: EventLog, durable: str, subjects: Sequence[str], handler: Handler, start: int = 1, at_once: int = 1) -> None:
        self._log, self._durable, self._handler, self._at_once = log, durable, handler, at_once
        group = f"alveary-deliver-{durable}"
        self._group = group
        self._config = ConsumerConfig(
            durable_name=durable, deliver_group=group, deliver_subject=group, ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_SECONDS, max_ack_pending=_WINDOW, filter_subjects=list(subjects), idle_heartbeat=None,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=start,
        )  # fmt: skip
        # By sequence, in the order of arrival: what was delivered and is not acknowledged, the event at work included.
        self._held: OrderedDict[int, Msg] = OrderedDict()
        self._working: set[int] = set()
        self._arrived = asyncio.Event()
        self._failures: dict[int, int] = {}

    async def run(self) -> None:
        """Handle events until cancelled.

        Raises:
            Unavailable: the connection was closed.
        """
        async with self._log.dead_letters.serving(self._durable, self._retry):
            subscription = await self._log.connection.subscribe(
                self._group, queue=self._group, cb=self._receive, pending_msgs_limit=-1, pending_bytes_limit=-1
            )
            tasks = [asyncio.create_task(work) for work in (self._keep(), self._tend(), *(self._work() for _ in range(self._at_once)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                with contextlib.suppress(*_TRANSIENT):  # the connection may be gone, and the subscription with it
                    await subscription.unsubscribe()
                    for message in self._held.values():  # for another replica, now rather than after ack_wait
                        await message.nak()

    async def _tend(self) -> None:
        """See to it that the consumer is there; its configuration is stored with the stream, and can be lost with it."""
        while True:
            await self._ensure()
            await asyncio.sleep(_ACK_SECONDS)

    async def _work(self) -> None:
        """Handle one event after another."""
        while True:
            sequence = next((s for s in self._held if s not in self._working), None)
            if sequence is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._working.add(sequence)
            await self._handle(sequence)
            self._working.discard(sequence)
            self._held.pop(sequence, None)

    async def _receive(self, message: Msg) -> None:
        # One that is held already came again because an acknowledgement was late: the newer one is answered.
        self._held[message.metadata.sequence.stream] = message
        self._arrived.set()

    async def _keep(self) -> None:
        """Say of everything held that it is at work, so that no other consumer gets it."""
        while True:
            await asyncio.sleep(_ACK_SECONDS / 3)
            with contextlib.suppress(*_TRANSIENT):
                for message in list(self._held.values()):
                    await message.in_progress()

    async def _ensure(self) -> None:
        pause = 0.2
        while True:
            try:
                present = await self._log.js.consumer_info(STREAM, self._durable)
                if present.config.max_ack_pending == _WINDOW:
                    return
                try:  # of an earlier version
                    await self._log.js.add_consumer(STREAM, self._config)
                except APIError as error:
                    telemetry.logger().warning("consume.update", durable=self._durable, error=str(error))
                return
            except NotFoundError:
                with contextlib.suppress(*_TRANSIENT):
                    await self._log.js.add_consumer(STREAM, self._config)
                    return
            except _TRANSIENT as error:
                if self._log.connection.is_closed:
                    raise Unavailable("the connection to the message bus was closed") from error
                telemetry.logger().info("consume.retry", durable=self._durable, error=str(error) or type(error).__name__)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)

    async def _handle(self, sequence: int) -> None:
        message = self._held[sequence]
        deliveries = message.metadata.num_delivered or 1
        try:
            event = decode(message.subject, dict(message.headers or {}), message.data, sequence)
        except UnknownEvent as error:
            telemetry.logger().warning("event.unknown", error=str(error))
            await self._end(sequence, handled=False)
            return
        except MalformedEvent as error:
            await self._set_aside(sequence, error, 1)
            return
        if deliveries > _DELIVERIES_MOST:
            await self._set_aside(sequence, f"it was delivered {deliveries} times and never handled to its end", deliveries)
            return
        telemetry.start_trace(event.traceparent)
        try:
            async with asyncio.timeout(_HANDLER_SECONDS):
                await self._handler(event)
        except Exception as error:
            await self._failed(event, error, deliveries)
            return
        telemetry.HANDLED.labels(self._durable, "ok").inc()
        await self._end(sequence, handled=True)

    async def _failed(self, event: Event, error: Exception, deliveries: int) -> None:
        tries = self._failures[event.sequence] = self._failures.get(event.sequence, 0) + 1
        telemetry.HANDLED.labels(self._durable, "error").inc()
        telemetry.logger().error("handler.failed", durable=self._durable, type=event.type, id=event.key.id, tries=tries, exc_info=error)
        most = TRIES_TRANSIENT if isinstance(error, _PASSING) else TRIES
        if tries >= most or (most == TRIES and deliveries >= _DELIVERIES_SUSPECT):
            await self._set_aside(event.sequence, error, tries)
            return
        with contextlib.suppress(*_TRANSIENT):
            await self._held[event.sequence].nak(delay=min(0.2 * 2 ** min(tries, 8), _LONGEST_PAUSE_SECONDS))

    async def _set_aside(self, sequence: int, error: BaseException | str, tries: int) -> None:
        message = self._held[sequence]
        try:
            await self._log.dead_letters.put(self._durable, message.subject, sequence, error, tries)
        except Unavailable as failure:
            telemetry.logger().error("dead-letter.failed", durable=self._durable, sequence=sequence, exc_info=failure)
            with contextlib.suppress(*_TRANSIENT):  # it comes again, and is set aside then
                await message.nak(delay=_LONGEST_PAUSE_SECONDS)
            return
        telemetry.HANDLED.labels(self._durable, "dead").inc()
        await self._end(sequence, handled=False)

    async def _end(self, sequence: int, *, handled: bool) -> None:
        self._failures.pop(sequence, None)
        message = self._held[sequence]
        with contextlib.suppress(*_TRANSIENT):  # a lost answer means that it comes again: handlers are idempotent
            await (message.ack() if handled else message.term())

    async def _retry(self, sequence: int) -> tuple[str, str]:
        """Handle the event of a dead letter once more, on request."""
        try:
            raw = await self._log.js.get_msg(STREAM, seq=sequence)
        except NotFoundError:
            return "failed", "its event is not in the log any more: drop the letter"
        subject = raw.subject or ""
        try:
            event = decode(subject, dict(raw.headers or {}), raw.data or b"", sequence)
            telemetry.start_trace(event.traceparent)
            async with asyncio.timeout(_HANDLER_SECONDS):
                await self._handler(event)
        except Exception as error:
            await self._log.dead_letters.put(self._durable, subject, sequence, error)
            return "failed", f"{type(error).__name__}: {error}"
        return "handled", "its event is handled"
