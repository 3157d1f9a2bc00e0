"""One scheduler is active: two would place runs twice."""

from __future__ import annotations

import os
import socket

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from alveary_contracts.ids import new_id
from alveary_core.errors import FailedPrecondition

# The active scheduler answers here.
_SUBJECT = "alveary-scheduler.who"
_TAKE_OVER_SECONDS = 2.0


class Leadership:
    """Makes sure that no other scheduler is active, and tells others that this one is."""

    def __init__(self, connection: Client) -> None:
        self._connection = connection
        self._identity = f"{socket.gethostname()}, pid {os.getpid()}, {new_id()}".encode()

    async def take_over(self) -> None:
        """Become the active scheduler.

        Raises:
            FailedPrecondition: another one is active.
        """
        await self.require_alone(_TAKE_OVER_SECONDS)
        await self._connection.subscribe(_SUBJECT, cb=self._answer)

    async def _answer(self, message: Msg) -> None:
        if message.data != self._identity:
            await message.respond(self._identity)

    async def require_alone(self, timeout: float) -> None:
        """Ask whether another scheduler is active, for `timeout` seconds.

        Raises:
            FailedPrecondition: one is.
        """
        try:
            reply = await self._connection.request(_SUBJECT, self._identity, timeout=timeout)
        except (NoRespondersError, NatsTimeout):
            return
        other = reply.data.decode(errors="replace")
        raise FailedPrecondition(f"another scheduler is active ({other}): two would place runs twice, so this one stops")
