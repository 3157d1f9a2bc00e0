"""EventService: the event log for automations that would rather not speak NATS."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError

from alveary_contracts.names import AGGREGATES, token
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.errors import InvalidArgument
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM, decode

_PATTERN = re.compile(r"(\*|[a-z]+)\.(\*|[a-z_]+)")
_DURABLE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNACKED = 256


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
        found = _PATTERN.fullmatch(start.pattern)
        if not found or found[1] not in {"*", *AGGREGATES}:
            raise InvalidArgument(
                ("start.pattern", f"{start.pattern!r}: use '<aggregate>.<event>', * for either; aggregates: {', '.join(AGGREGATES)}")
            )
        if start.durable and not _DURABLE.fullmatch(start.durable):
            raise InvalidArgument(("start.durable", f"{start.durable[:80]!r}: 1 to 64 letters, digits, '_' or '-'"))
        subject = f"alveary.{token(who.workspace)}.{found[1]}.*.{found[2]}"
        name = f"sub-{token(who.workspace)}-{start.durable}" if start.durable else ""
        inbox = f"alveary-sub.{name}" if name else self._log.connection.new_inbox()
        config = ConsumerConfig(
            durable_name=name or None, deliver_subject=inbox, deliver_group="subscriber", ack_policy=AckPolicy.EXPLICIT,
            ack_wait=30, max_ack_pending=_UNACKED, filter_subject=subject,
            inactive_threshold=None if name else 60, deliver_policy=DeliverPolicy.NEW,
        )  # fmt: skip
        if start.HasField("from_sequence"):
            config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, max(1, start.from_sequence)
        elif start.HasField("from_time"):
            config.deliver_policy = DeliverPolicy.BY_START_TIME
            config.opt_start_time = start.from_time.ToJsonString()  # type: ignore[assignment]
        subscription = await self._log.connection.subscribe(inbox, queue="subscriber", pending_msgs_limit=-1)
        waiting: dict[int, Msg] = {}
        acks: asyncio.Task[None] | None = None
        try:
            await self._ensure(config, name, subject)
            acks = asyncio.create_task(self._acknowledge(requests, waiting))
            while not acks.done():
                try:
                    message = await subscription.next_msg(timeout=1)
                except TimeoutError:
                    continue
                event = decode(message.subject, dict(message.headers or {}), message.data, message.metadata.sequence.stream)
                waiting[event.sequence] = message
                reply = pb.Event(
                    id=event.id, type=event.type, subject=event.key.id, sequence=event.sequence,
                    data_json=message.data.decode(),
                )  # fmt: skip
                reply.time.FromNanoseconds(int(event.time * 1e6) * 1000)
                yield pb.SubscribeResponse(event=reply)
        finally:
            if acks:
                acks.cancel()
            with contextlib.suppress(NatsError):  # the connection may be gone, and the subscription with it
                await subscription.unsubscribe()
                for message in waiting.values():  # for whoever comes next, now rather than after ack_wait
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
                return
        await self._log.js.add_consumer(STREAM, config)

    @staticmethod
    async def _acknowledge(requests: AsyncIterator[pb.SubscribeRequest], waiting: dict[int, Msg]) -> None:
        async for request in requests:
            for sequence in request.ack.sequences:
                message = waiting.pop(sequence, None)
                if message is not None:
                    await message.ack()
