"""The end of an attempt: the first request decides, a fence overrides it, and storing is interrupted rather than ended."""

from __future__ import annotations

import asyncio

import pytest

from alveary_trainer.end_signal import End, EndReason, EndSignal, Fenced


async def test_the_first_request_decides_and_a_fence_overrides_it() -> None:
    end, heard = EndSignal(), list[End]()
    end.subscribe(heard.append)
    end.request(EndReason.PREEMPTED, "why")
    end.request(EndReason.CANCELED)
    assert await end.wait() == End(EndReason.PREEMPTED, "why") and not end.fenced and not end.stores_nothing
    end.request(EndReason.FENCED)
    assert end.fenced and end.stores_nothing
    end.request(EndReason.CANCELED)
    assert [one.reason for one in heard] == [EndReason.PREEMPTED, EndReason.FENCED], "each is heard before request returns"
    with pytest.raises(Fenced):
        end.raise_if_fenced()


@pytest.mark.parametrize(("reason", "interrupts"), [(EndReason.CANCELED, True), (EndReason.TIMEOUT, True), (EndReason.PREEMPTED, False)])
async def test_while_storing_a_cancel_or_timeout_interrupts_it(reason: EndReason, interrupts: bool) -> None:
    end = EndSignal()
    end.begin_storing()
    end.request(reason, "now")
    assert (end.interruption is not None) == interrupts and (end.end is None) == interrupts
    work = asyncio.sleep(0.01, "stored")
    assert await end.run_until_interrupted(work) == (None if interrupts else "stored")


async def test_work_that_is_cut_short_is_cancelled_and_has_ended() -> None:
    end, ended = EndSignal(), list[str]()

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")
        return "never"

    asyncio.get_running_loop().call_later(0.01, end.request, EndReason.FENCED)
    with pytest.raises(Fenced):
        await end.run_until_fenced(work())
    assert ended == ["cleaned up"]
    assert await end.run_until_end(asyncio.sleep(60)) is None

    async def broken() -> None:
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        await EndSignal().run_until_end(broken())
