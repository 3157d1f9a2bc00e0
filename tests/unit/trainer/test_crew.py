"""Trainers of one attempt that talk: what they wait for comes, or they learn why it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer.crew import Leader, Member
from alveary_trainer.gang import ENDED, READY, RUNNING, Gang


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


async def pair(wire: Any, on_order: Any) -> tuple[Leader, Member]:
    leader = Leader(wire, "where", Gang(2), "a", "1", lambda order: None)
    await leader.start()
    return leader, Member(wire, "where", 1, "b", "2", on_order)


async def go(leader: Leader, member: Member) -> None:
    leader.gang.port = 1
    leader.tell(phase=READY, host="a")
    member.tell(phase=READY, host="b")


def test_both_go_together() -> None:
    async def main() -> None:
        orders: list[pb.GangOrder] = []
        leader, member = await pair(Wire(), orders.append)
        async with asyncio.timeout(10):
            await go(leader, member)
            assert list((await member.until(RUNNING)).hosts) == ["a", "b"]
            assert (await leader.until(RUNNING)).port == 1
            member.tell(phase=RUNNING)
            await member.heard()
            assert leader.gang.reports[1].phase == RUNNING
            leader.gang.end("canceled")
            leader.decide()
            assert (await member.until(ENDED)).why == "canceled"
        await member.close()
        await leader.close()

    asyncio.run(main())


def test_a_member_that_cannot_go_on_says_so_where_it_waits() -> None:
    def broken(order: pb.GangOrder) -> None:
        raise LookupError("a bug")

    async def main() -> None:
        leader, member = await pair(Wire(), broken)
        async with asyncio.timeout(10):
            with pytest.raises(LookupError):
                await member.until(RUNNING)
            with pytest.raises(LookupError):
                await member.heard()
        await member.close()
        await leader.close()

    asyncio.run(main())


def test_a_leader_that_cannot_answer_says_so_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Message, data: bytes) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(Message, "respond", broken)

    async def main() -> None:
        leader, member = await pair(Wire(), lambda order: None)
        async with asyncio.timeout(10):
            waiting = [asyncio.create_task(leader.all_at(ENDED, lambda text: None)), asyncio.create_task(leader.until(ENDED))]
            await go(leader, member)
            for task in waiting:
                with pytest.raises(LookupError):
                    await task
        await member.close()
        await leader.close()

    asyncio.run(main())
