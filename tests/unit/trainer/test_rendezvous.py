"""Trainers of one attempt that talk: what they wait for comes, or they learn why it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gang_wire import Message, Wire

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1.trainer_pb2 import GangReport
from alveary_trainer.adapters.runtime import Host
from alveary_trainer.end_signal import EndReason, EndSignal
from alveary_trainer.gang import ENDED, READY, RUNNING, STORED, Gang
from alveary_trainer.rendezvous import Follower, Leader, Solo


class BrokenSignal(EndSignal):
    """Fails where an order ends the attempt."""

    def request(self, reason: EndReason, message: str = "") -> None:
        raise LookupError("a bug")


async def pair(wire: Any, end: EndSignal) -> tuple[Leader, Follower]:
    leader = Leader(wire, "where", Gang(2), "a", "1", EndSignal(), lambda text: None)
    await leader.start()
    follower = Follower(wire, "where", 1, "b", "2", end)
    await follower.start()
    return leader, follower


async def go(leader: Leader, follower: Follower) -> None:
    leader.gang.port = 1
    leader.tell(phase=READY, host="a")
    follower.tell(phase=READY, host="b")


def test_both_go_together() -> None:
    async def main() -> None:
        end = EndSignal()
        leader, follower = await pair(Wire(), end)
        async with asyncio.timeout(10):
            await go(leader, follower)
            assert list((await follower.wait_for_order(RUNNING)).hosts) == ["a", "b"]
            assert (await leader.wait_for_order(RUNNING)).port == 1
            follower.tell(phase=RUNNING)
            await follower._settled()
            assert leader.gang.reports[1].phase == RUNNING
            leader._end.request(EndReason.CANCELED)
            assert (await follower.wait_for_order(ENDED)).end_reason == c.EXIT_REASON_CANCELED
            assert (await end.wait()).reason is EndReason.CANCELED
        await follower.close()
        await leader.close()

    asyncio.run(main())


def test_an_order_to_end_does_not_interrupt_a_follower_that_is_storing() -> None:
    async def main() -> None:
        end = EndSignal()
        leader, follower = await pair(Wire(), end)
        async with asyncio.timeout(10):
            await go(leader, follower)
            await follower.wait_for_order(RUNNING)
            end.begin_storing()
            leader._end.request(EndReason.TIMEOUT, "it ran too long")
            await follower.wait_for_order(ENDED)
            assert end.end is None and end.interruption is None
        await follower.close()
        await leader.close()

    asyncio.run(main())


def test_a_member_that_cannot_go_on_says_so_where_it_waits() -> None:
    async def main() -> None:
        leader, follower = await pair(Wire(), BrokenSignal())
        async with asyncio.timeout(10):
            await go(leader, follower)
            await follower.wait_for_order(RUNNING)
            leader._end.request(EndReason.CANCELED)
            with pytest.raises(LookupError):
                await follower.wait_for_order(STORED)
            with pytest.raises(LookupError):
                await follower._settled()
        await follower.close()
        await leader.close()

    asyncio.run(main())


def test_a_leader_that_cannot_answer_says_so_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Message, data: bytes) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr(Message, "respond", broken)

    async def main() -> None:
        leader, follower = await pair(Wire(), EndSignal())
        async with asyncio.timeout(10):
            waiting = [asyncio.create_task(leader.wait_for_members(ENDED)), asyncio.create_task(leader.wait_for_order(ENDED))]
            await go(leader, follower)
            for task in waiting:
                with pytest.raises(LookupError):
                    await task
        await follower.close()
        await leader.close()

    asyncio.run(main())


def test_a_leader_that_failed_holds_no_answer_back_and_the_loop_goes_on() -> None:
    async def main() -> None:
        wire: Any = Wire()
        leader = Leader(wire, "where", Gang(2), "a", "1", EndSignal(), lambda text: None)
        await leader.start()
        asking = asyncio.create_task(wire.request("where", GangReport(index=1, last_order_version=9).SerializeToString(), 60))
        await asyncio.sleep(0.05)
        assert not asking.done()

        async def fail() -> None:
            raise LookupError("a bug")

        failed = asyncio.create_task(fail())
        failed.add_done_callback(leader._conversation_ended)
        async with asyncio.timeout(1):
            await asking
        await leader.close()

    asyncio.run(main())


def test_an_attempt_on_one_node_goes_through_the_same_phases_alone() -> None:
    async def main() -> None:
        end = EndSignal()
        solo = Solo(Gang(1), "a", "1", end, lambda text: None)
        async with asyncio.timeout(10):
            await solo.start()
            team = await solo.rendezvous(Host("localhost", "", 0))
            assert (team.index, list(team.hosts)) == (0, ["localhost"])
            await solo.running()
            status = c.ExitStatus(reason=c.EXIT_REASON_EXITED, exit_code=0)
            await solo.ended(status, 0.0, [])
            assert solo.exit_status(c.ExitStatus()).reason == c.EXIT_REASON_EXITED
            await solo.stored("no space")
            assert solo.exit_status(status).reason == c.EXIT_REASON_UPLOAD_FAILED
            with pytest.raises(ValueError, match="only a run with MpiConfiguration"):
                await solo.launch_on("alveary-1", "orted")
        await solo.close()

    asyncio.run(main())
