"""A connection between the leader of a gang and its followers, without a message bus."""

from __future__ import annotations

import asyncio
from typing import Any


class Wire:
    """A connection between one leader and its members; nothing is lost, nothing is late."""

    def __init__(self) -> None:
        self._hear: Any = None

    async def subscribe(self, subject: str, cb: Any) -> Wire:
        self._hear = cb
        return self

    async def unsubscribe(self) -> None:
        self._hear = None

    async def request(self, subject: str, data: bytes, timeout: float) -> Message:
        message = Message(data)
        await self._hear(message)
        async with asyncio.timeout(timeout):
            return Message(await message.answer)


class Message:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def respond(self, data: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(data)
