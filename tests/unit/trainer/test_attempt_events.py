"""The events of an attempt are in the log once and in order, whatever becomes of the calls that append them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from fakes import MemoryLog
from google.protobuf.message import Message

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.errors import Unavailable
from alveary_core.eventlog import Appended
from alveary_core.events import Event, Key
from alveary_trainer import attempt_events
from alveary_trainer.attempt_events import AttemptEventWriter, NoEventWriter
from alveary_trainer.end_signal import EndReason, EndSignal

KEY = Key("default", "attempt", "r-1")
EVENTS = [ev.AttemptAccepted(node="n"), ev.AttemptStarted(process_count=1), ev.AttemptFinished()]


class FrailLog(MemoryLog):
    """Fails each append once: before it is made, or after, so that its acknowledgement is lost."""

    def __init__(self, error: Exception, *, after: bool) -> None:
        super().__init__()
        self._error, self._after = error, after
        self._failed: set[type[Message]] = set()

    async def append(self, key: Key, messages: Sequence[Message], expected: int) -> Appended:
        kind = type(messages[0])
        first = kind not in self._failed
        self._failed.add(kind)
        if first and not self._after:
            raise self._error
        done = await super().append(key, messages, expected)
        if first:
            raise self._error
        return done


async def names(log: MemoryLog) -> list[str]:
    return [type(event.message).__name__ for event in await log.read(KEY)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_events, "_RETRY_SECONDS", 0.001)


@pytest.mark.parametrize("after", [False, True], ids=["lost", "acknowledgement lost"])
@pytest.mark.parametrize("error", [Unavailable("away"), LookupError("a bug")], ids=["away", "bug"])
async def test_each_event_is_appended_once_and_in_order(error: Exception, after: bool) -> None:
    log = FrailLog(error, after=after)
    writer = AttemptEventWriter(log, KEY, EndSignal())  # type: ignore[arg-type]
    for event in EVENTS:
        writer.publish(event)
    async with asyncio.timeout(10):
        await writer.finish()
    assert await names(log) == ["AttemptAccepted", "AttemptStarted", "AttemptFinished"]


async def test_a_log_that_is_away_while_a_conflict_is_looked_at_is_asked_again() -> None:
    class SilentLog(FrailLog):
        silent = 3

        async def read(self, key: Key) -> list[Event]:
            if self.silent:
                self.silent -= 1
                raise Unavailable("away")
            return await super().read(key)

    log = SilentLog(Unavailable("away"), after=True)
    writer = AttemptEventWriter(log, KEY, EndSignal())  # type: ignore[arg-type]
    for event in EVENTS:
        writer.publish(event)
    async with asyncio.timeout(10):
        await writer.finish()
    assert await names(log) == ["AttemptAccepted", "AttemptStarted", "AttemptFinished"]


async def test_a_fenced_attempt_publishes_nothing_more() -> None:
    log, end = MemoryLog(), EndSignal()
    writer = AttemptEventWriter(log, KEY, end)  # type: ignore[arg-type]
    writer.publish(EVENTS[0])
    await asyncio.sleep(0.01)
    end.request(EndReason.FENCED)
    writer.publish(EVENTS[1])
    await writer.finish()
    assert await names(log) == ["AttemptAccepted"]


async def test_an_event_that_can_never_be_appended_is_given_up_and_a_follower_publishes_none() -> None:
    class BrokenLog(MemoryLog):
        async def append(self, key: Key, messages: Sequence[Message], expected: int) -> Appended:
            raise LookupError("a bug")

    writer = AttemptEventWriter(BrokenLog(), KEY, EndSignal())  # type: ignore[arg-type]
    writer.publish(EVENTS[0])
    with pytest.raises(LookupError):
        await writer.finish()
    await writer.close()
    follower = NoEventWriter()
    follower.publish(EVENTS[0])
    await follower.finish()
    await follower.close()
