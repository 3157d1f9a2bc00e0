"""The socket of an attempt: whatever a script sends, it is told what is wrong, and everything else arrives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from alveary_core.metrics import MetricBudget
from alveary_core.settings import MetricLimits
from alveary_trainer import context_server
from alveary_trainer.context_server import MAX_LINE, ContextServer
from alveary_trainer.shipper import LARGEST, Shipper, metric_batch


class Bus:
    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    async def publish(
        self, subject: str, payload: bytes = b"", timeout: float | None = None, *, headers: dict[str, str] | None = None
    ) -> None:
        self.payloads.append(payload)


class Attempt:
    """A server, and a connection to it."""

    def __init__(self, path: Path) -> None:
        self.bus, self.notes = Bus(), list[str]()
        self.metrics = Shipper(self.bus, "s", metric_batch(1))
        self.path = path
        self.server = ContextServer(path, "r", self.metrics, {"slow": self._slow, "broken": self._broken}, self.notes.append)
        self.go = asyncio.Event()

    async def _slow(self, message: dict[str, Any]) -> str:
        await self.go.wait()
        return "done"

    async def _broken(self, message: dict[str, Any]) -> None:
        raise LookupError("a bug")

    async def open(self) -> None:
        await self.server.start()
        self.reader, self.writer = await asyncio.open_unix_connection(str(self.path))

    def send(self, data: bytes) -> None:
        self.writer.write(data + b"\n")

    def log(self, name: str, value: Any, **more: Any) -> None:
        self.send(json.dumps({"op": "metric", "name": name, "kind": "text", "value": value, "time": 0, **more}).encode())

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(60):
            return dict(json.loads(await self.reader.readline()))

    async def logged(self) -> list[str]:
        self.send(b'{"op": "flush", "id": 99}')
        while (answer := await self.answer()).get("id") != 99:
            assert answer["id"] is None and answer["error"]
        return [p.name for data in self.bus.payloads for p in metric_batch(1)([]).FromString(data).points]  # type: ignore[attr-defined]


@pytest.fixture
async def attempt(tmp_path: Path) -> AsyncIterator[Attempt]:
    made = Attempt(tmp_path / "s")
    await made.open()
    yield made
    made.writer.close()
    await made.server.finish(1)
    await made.metrics.close()


async def test_a_value_beyond_the_limit_is_refused_by_name_and_all_else_arrives(attempt: Attempt) -> None:
    attempt.log("before", "x")
    attempt.log("report", "x" * (LARGEST + 1), id=1)
    answer = await attempt.answer()
    assert answer["id"] == 1 and "'report'" in answer["error"] and f"{LARGEST:,}" in answer["error"]
    attempt.log("gigantic", "x" * (2 * MAX_LINE + 12345))
    answer = await attempt.answer()
    assert answer["id"] is None and "'gigantic'" in answer["error"] and f"{MAX_LINE:,}" in answer["error"]
    attempt.log("large", "x" * (LARGEST // 2), id=2)
    assert await attempt.answer() == {"id": 2, "ok": True}
    attempt.log("after", "x")
    assert await attempt.logged() == ["before", "large", "after"]
    assert len(attempt.notes) == 2 and "report" in attempt.notes[0] and "gigantic" in attempt.notes[1]


@pytest.mark.parametrize(
    "line",
    [
        b"no json", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"op": "metric"}', b'{"op": "what", "id": 1}', b'{"op": "broken", "id": 1}', b"",
        json.dumps({"op": "metric", "name": "n", "kind": "scalar", "value": 10**400, "time": 0}).encode(),
        json.dumps({"op": "metric", "name": "n", "kind": "scalar", "value": "x", "time": 0}).encode(),
        json.dumps({"op": "metric", "name": "\udce9", "kind": "scalar", "value": 1, "time": 0}).encode(),
        json.dumps({"op": "metric", "name": "n", "kind": "scalar", "value": 1, "time": 1e300}).encode(),
        json.dumps({"op": "metric", "name": "n", "kind": "scalar", "value": 1, "time": 0, "step": 2**70}).encode(),
        json.dumps({"op": "metric", "name": "n", "kind": "list", "value": 3, "time": 0}).encode(),
    ],
)  # fmt: skip
async def test_whatever_is_sent_is_answered_and_the_next_is_taken(attempt: Attempt, line: bytes) -> None:
    attempt.send(line)
    answer = await attempt.answer()
    assert answer["error"] and answer["id"] in (None, 1)
    attempt.log("after", "\udce9")
    assert await attempt.logged() == ["after"]


async def test_refusals_that_nobody_reads_hold_nothing_up(attempt: Attempt) -> None:
    for _ in range(20_000):
        attempt.log("", "no name")
    await attempt.writer.drain()
    attempt.log("after", "x")
    assert await attempt.logged() == ["after"]
    assert len(attempt.notes) == 20 and "further refusals" in attempt.notes[-1]


async def test_who_waits_long_is_told_that_it_is_worked_on(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_server, "_WORKING_SECONDS", 0.01)
    attempt.send(b'{"op": "slow", "id": 5}')
    assert await attempt.answer() == {"id": 5, "working": True}
    attempt.go.set()
    while (answer := await attempt.answer()).get("working"):
        pass
    assert answer == {"id": 5, "ok": "done"}


async def test_more_names_and_points_than_a_run_may_log_are_refused_by_name_and_the_rest_arrives(tmp_path: Path) -> None:
    made = Attempt(tmp_path / "s")
    limits = MetricLimits(metric_names=2, metric_points=5)
    made.server = ContextServer(made.path, "r", made.metrics, {}, made.notes.append, MetricBudget(limits))
    await made.open()
    for name in ("a", "b", "c", "a"):
        made.log(name, "x")
    assert (await made.answer())["error"] == "metric 'c' is refused: a run may log 2 metrics (ALVEARY_METRIC_NAMES): use fewer names"
    for number in range(3):
        made.log("b", str(number))
    assert "metric 'b' is refused: a run may log 5 points (ALVEARY_METRIC_POINTS)" in (await made.answer())["error"]
    assert await made.logged() == ["a", "b", "a", "b", "b"] and len(made.notes) == 2
    made.writer.close()
    await made.server.finish(1)
    await made.metrics.close()
