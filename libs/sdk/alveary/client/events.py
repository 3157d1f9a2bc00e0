"""Events as they happen, and those that a service could not handle."""

from __future__ import annotations

import builtins
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime

import grpc.aio

from alveary.client.connection import Connection
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb

# Retried dead letters are handled while the call waits.
_RETRY_TIMEOUT_SECONDS = 600.0
_PAGE_SIZE = 1000


class Events:
    """`client.events`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.events

    async def subscribe(
        self,
        pattern: str,
        handler: Callable[[pb.Event], Awaitable[None]],
        *,
        durable: str = "",
        from_sequence: int | None = None,
        from_time: datetime | None = None,
    ) -> None:
        """Hand events to `handler`, for ever; each is acknowledged when the handler returns, else it comes again.

        Args:
            pattern: like "run.completed" or "model.*".
            durable: name under which the platform remembers the position.
            from_sequence, from_time: where to begin; with neither, at what comes next.

        Raises:
            AlvearyError: the pattern is not one, or the platform refuses.
        """
        start = pb.SubscribeStart(pattern=pattern, durable=durable, from_sequence=from_sequence)
        if from_time is not None:
            start.from_time.FromDatetime(from_time)
        reconnect = self._connection.reconnect()
        while True:
            stream = self._connection.open_stream(self._stub.Subscribe)
            try:
                await stream.write(pb.SubscribeRequest(start=start))
                async for reply in stream:
                    reconnect.progress()
                    await handler(reply.event)
                    await stream.write(pb.SubscribeRequest(ack=pb.SubscribeAck(sequences=[reply.event.sequence])))
                    if not durable:  # a new connection goes on after what was seen
                        start.ClearField("from_time")
                        start.from_sequence = reply.event.sequence + 1
                broken = None
            except grpc.aio.AioRpcError as error:
                broken = error
            finally:
                stream.cancel()  # else the platform would go on handing events to a stream that nobody reads
            await (reconnect.failed(broken) if broken else reconnect.pause())


class DeadLetters:
    """`client.dead_letters`: events of the workspace that a service set aside. The caller must be an owner."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.dead_letters

    async def list(self) -> builtins.list[c.DeadLetter]:
        """All of them, oldest first."""
        request = pb.ListDeadLettersRequest(page_size=_PAGE_SIZE)
        return [letter async for page in self._connection.pages(self._stub.ListDeadLetters, request) for letter in page.letters]

    async def retry(self, ids: Sequence[str]) -> builtins.list[pb.DeadLetterOutcome]:
        """What came of up to 100 dead letters, after the services that set them aside tried them once more."""
        request = pb.RetryDeadLettersRequest(ids=ids)
        reply = await self._connection.call(self._stub.RetryDeadLetters, request, timeout=_RETRY_TIMEOUT_SECONDS)
        return [*reply.outcomes]

    async def drop(self, ids: Sequence[str]) -> None:
        """Forget up to 100 dead letters."""
        await self._connection.call(self._stub.DropDeadLetters, pb.DropDeadLettersRequest(ids=ids))
