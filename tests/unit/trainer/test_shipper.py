"""Messages for the bus: what it refuses never stops a run, what it takes arrives in order and once."""

from __future__ import annotations

import asyncio
from typing import Any

import nats.errors
import pytest
from nats.js.errors import APIError, NoStreamResponseError

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_trainer import shipper as shippers
from alveary_trainer.shipper import LARGEST, Shipper, TooLarge, metric_batch


class Bus:
    """JetStream as told."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.errors: list[Exception] = []
        self.always: Exception | None = None
        self.limit = 10**9
        self.tries = 0

    async def publish(
        self, subject: str, payload: bytes = b"", timeout: float | None = None, *, headers: dict[str, str] | None = None
    ) -> None:
        self.tries += 1
        await asyncio.sleep(0)
        if len(payload) > self.limit:
            raise nats.errors.MaxPayloadError
        if self.errors:
            raise self.errors.pop(0)
        if self.always is not None:
            raise self.always
        batch = pb.MetricBatch.FromString(payload)
        assert batch.attempt == 3 and headers is not None and headers["Nats-Msg-Id"]
        self.taken += [p.name for p in batch.points]


def full() -> APIError:
    return APIError(code=400, err_code=10077, description="maximum bytes exceeded")


def point(name: str, size: int = 0) -> pb.MetricPoint:
    return pb.MetricPoint(name=name, text="x" * size)


def shipper(bus: Bus, said: list[str], **options: Any) -> Shipper:
    return Shipper(bus, "s", metric_batch(3), said.append, "metric points", **options)


async def test_a_bus_that_cannot_be_reached_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, said = Bus(), list[str]()
    bus.errors = [nats.errors.TimeoutError(), OSError(), nats.errors.ConnectionReconnectingError(), full(), NoStreamResponseError()]
    one = shipper(bus, said)
    for number in range(100):
        one.add(point(str(number)))
    await one.flush(60)
    assert bus.taken == [str(number) for number in range(100)] and not said and not one.lost
    await one.close()


async def test_a_full_stream_loses_and_says_it_and_does_not_hold_up() -> None:
    bus, said = Bus(), list[str]()
    bus.always = full()
    one = shipper(bus, said, refusing_seconds=0.0)
    for number in range(50):
        one.add(point(str(number), 100_000))
        await one.room()
    await one.flush(60)
    assert one.lost == 50 and not bus.taken and bus.tries < 50
    bus.always = None
    one._tried = 0.0  # a second later
    one.add(point("again"))
    await one.flush(60)
    assert bus.taken == ["again"] and said == ["50 metric points were lost: the stream s took nothing, it was full"]
    await one.close()


async def test_what_is_too_large_is_refused_by_itself() -> None:
    bus, said = Bus(), list[str]()
    bus.limit = 5000
    one = shipper(bus, said)
    with pytest.raises(TooLarge, match=f"{LARGEST:,}"):
        one.add(point("huge", LARGEST))
    for number in range(20):
        one.add(point(str(number), 6000 if number == 7 else 10))
    await one.flush(60)
    assert bus.taken == [str(n) for n in range(20) if n != 7] and one.lost == 1
    assert len(said) == 1 and "refused by the message bus" in said[0]
    await one.close()


async def test_an_error_that_nobody_foresaw_loses_one_batch() -> None:
    bus, said = Bus(), list[str]()
    bus.errors = [LookupError("a bug")]
    one = shipper(bus, said)
    one.add(point("first"))
    await one.flush(60)
    one.add(point("second"))
    await one.flush(60)
    assert bus.taken == ["second"] and one.lost == 1
    await one.close()


async def test_the_end_waits_for_a_bus_that_is_away_for_a_bounded_time() -> None:
    bus, said = Bus(), list[str]()
    bus.always = nats.errors.TimeoutError()
    one = shipper(bus, said)
    for number in range(5):
        one.add(point(str(number), shippers.CHUNK))
    async with asyncio.timeout(60):
        await one.finish(0.2)
    one.add(point("late"))
    assert one.lost >= 5
    await one.close()
