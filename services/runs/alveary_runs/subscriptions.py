"""EventService: the event log for automations that would rather not speak NATS."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import APIError, NotFoundError

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import AGGREGATES, event_name, token, untoken
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc as rpc
from alveary_core import auth, telemetry
from alveary_core.errors import InvalidArgument
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM

_DURABLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Events that a subscriber has and did not acknowledge yet: no more are sent, however slow it is.
_WINDOW = 16
# What a subscriber has is handed to another one when its stream is gone for so long, seconds.
_ACK_SECONDS = 30.0
# All types of events, "run.completed".
EVENTS = sorted(".".join(kind) for name in ev.DESCRIPTOR.message_types_by_name if (kind := event_name(name)) is not None)


def check_pattern(pattern: str) -> tuple[str, str]:
    """(aggregate, event) of a pattern; each may be *.

    Raises:
        InvalidArgument: no event can match it; says which is meant, perhaps.
    """
    aggregate, dot, name = pattern.partition(".")
    if any(aggregate in ("*", known.partition(".")[0]) and name in ("*", known.partition(".")[2]) for known in EVENTS):
        return aggregate, name
    wanted = pattern[:80]
    if not dot or not aggregate or not name:
        why = "use '<aggregate>.<event>', * for either"
    elif aggregate != "*" and aggregate not in AGGREGATES:
        why = f"there is no aggregate {aggregate[:40]!r}; there are {', '.join(AGGREGATES)}"
    else:
        known = [e for e in EVENTS if aggregate in ("*", e.partition(".")[0])]
        names = sorted({e.partition(".")[2] for e in known})
        why = f"there is no event {wanted!r}; " + (f"{aggregate} has {', '.join(names)}" if aggregate != "*" else "see docs/events.md")
    every = {*EVENTS, *(f"{a}.*" for a in AGGREGATES), *("*." + e.partition(".")[2] for e in EVENTS)}
    near = difflib.get_close_matches(wanted, sorted(every), n=1)
    raise InvalidArgument(("start.pattern", f"{wanted!r}: {why}" + (f". Did you mean {near[0]!r}?" if near else "")))


class EventService(rpc.EventServiceServicer):
    """alveary.runs.v1.EventService."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def Subscribe(self, request_iterator: AsyncIterator[pb.SubscribeRequest], context: Any) -> AsyncIterator[pb.SubscribeResponse]:
        who = auth.require("reader")
        requests = aiter(request_iterator)
        first = await anext(requests, pb.SubscribeRequest())
        if first.WhichOneof("kind") != "start":
            raise InvalidArgument(("start", "the first message says what to subscribe to"))
        start = first.start
        aggregate, event = check_pattern(start.pattern)
        if start.durable and not _DURABLE.fullmatch(start.durable):
            raise InvalidArgument(("start.durable", f"{start.durable[:80]!r}: 1 to 64 letters, digits, '_' or '-'"))
        subject = f"alveary.{token(who.workspace)}.{aggregate}.*.{event}"
        name = f"sub-{token(who.workspace)}-{start.durable}" if start.durable else ""
        inbox = f"alveary-sub.{name}" if name else self._log.connection.new_inbox()
        config = ConsumerConfig(
            durable_name=name or None, deliver_subject=inbox, deliver_group="subscriber", ack_policy=AckPolicy.EXPLICIT,
            ack_wait=_ACK_SECONDS, max_ack_pending=_WINDOW, filter_subject=subject,
            inactive_threshold=None if name else 60, deliver_policy=DeliverPolicy.NEW,
        )  # fmt: skip
        if start.HasField("from_sequence"):
            config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, max(1, start.from_sequence)
        elif start.HasField("from_time"):
            config.deliver_policy = DeliverPolicy.BY_START_TIME
            config.opt_start_time = start.from_time.ToJsonString()  # type: ignore[assignment]
        # By sequence: what the subscriber has, or is about to get, and did not acknowledge. The server sends no more than the window.
        held: dict[int, Msg] = {}
        fresh: asyncio.Queue[Msg] = asyncio.Queue()

        async def receive(message: Msg) -> None:
            sequence = message.metadata.sequence.stream
            if sequence not in held:
                fresh.put_nowait(message)
            held[sequence] = message  # one that is held already came again: the newer delivery is answered

        subscription = await self._log.connection.subscribe(inbox, queue="subscriber", cb=receive)
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._ensure(config, name, subject)
            acks = asyncio.create_task(self._acknowledge(requests, held))
            tasks = [acks, asyncio.create_task(self._keep(held))]
            while not acks.done():
                arrival = asyncio.ensure_future(fresh.get())
                try:
                    await asyncio.wait({arrival, acks}, return_when=asyncio.FIRST_COMPLETED)
                    if arrival.done():
                        yield pb.SubscribeResponse(event=_shown(arrival.result()))
                finally:
                    arrival.cancel()
            acks.result()  # what was wrong with the stream of acknowledgements, if anything was
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(NatsError):  # the connection may be gone, and the subscription with it
                await subscription.unsubscribe()
                for message in held.values():  # for the next subscriber, now rather than after ack_wait
                    await message.nak()

    async def _ensure(self, config: ConsumerConfig, name: str, subject: str) -> None:
        if name:
            try:
                present = await self._log.js.consumer_info(STREAM, name)
            except NotFoundError:
                pass
            else:
                if present.config.filter_subject != subject:
                    raise InvalidArgument(
                        ("start.durable", f"{name!r} exists with another pattern ({present.config.filter_subject}): choose another name")
                    )
                if present.config.max_ack_pending != _WINDOW:  # of an earlier version
                    present.config.max_ack_pending = _WINDOW
                    try:
                        await self._log.js.add_consumer(STREAM, present.config)
                    except APIError as error:
                        telemetry.logger().warning("subscribe.update", durable=name, error=str(error))
                return
        await self._log.js.add_consumer(STREAM, config)

    @staticmethod
    async def _keep(held: dict[int, Msg]) -> None:
        """While the stream lives, say of what its subscriber has that it is at work: it does not come again, however long that takes."""
        while True:
            await asyncio.sleep(_ACK_SECONDS / 3)
            with contextlib.suppress(NatsError):
                for message in list(held.values()):
                    await message.in_progress()

    @staticmethod
    async def _acknowledge(requests: AsyncIterator[pb.SubscribeRequest], held: dict[int, Msg]) -> None:
        async for request in requests:
            for sequence in request.ack.sequences:
                message = held.pop(sequence, None)
                if message is not None:
                    with contextlib.suppress(NatsError):  # a lost acknowledgement means that it comes again
                        await message.ack()


def _shown(message: Msg) -> pb.Event:
    """An event as subscribers get it. Its body is passed on as it is: it may be of a newer version than this service."""
    headers = message.headers or {}
    _, _, aggregate, ident, name = message.subject.split(".")
    shown = pb.Event(
        id=headers.get("ce-id", ""), type=f"{aggregate}.{name}", subject=untoken(ident), sequence=message.metadata.sequence.stream,
        data_json=message.data.decode(errors="replace"),
    )  # fmt: skip
    with contextlib.suppress(ValueError):  # without a time that can be read it has none
        at = datetime.fromisoformat(headers.get("ce-time", "").replace("Z", "+00:00"))
        shown.time.FromMicroseconds(int(at.timestamp() * 1e6))
    return shown
