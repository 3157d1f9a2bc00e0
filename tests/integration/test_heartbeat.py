"""Heartbeats go on whatever the trainer's loop does; a lost lease stops everything, by force if need be."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import SecretStr

from alveary.local.layout import Layout
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core.eventlog import connect
from alveary_trainer import heartbeat
from alveary_trainer.heartbeat import Heartbeat
from alveary_trainer.settings import TrainerSettings


class Scheduler:
    """Answers beats, on a thread of its own, for as long as it is told to."""

    def __init__(self, layout: Layout, node: str) -> None:
        self._layout, self._node = layout, node
        self.beats: list[pb.Heartbeat] = []
        self.answer: pb.HeartbeatResponse | None = pb.HeartbeatResponse()
        self._ready, self._stop = threading.Event(), threading.Event()

    async def _serve(self) -> None:
        connection = await connect(
            f"nats://127.0.0.1:{self._layout.ports.nats}", "scheduler", self._layout.secrets["scheduler"], "test-scheduler"
        )

        async def hear(message: Any) -> None:
            beat = pb.Heartbeat.FromString(message.data)
            if self.answer is not None:
                self.beats.append(beat)
                await message.respond(self.answer.SerializeToString())

        await connection.subscribe(f"alveary-heartbeat.default.{self._node}", cb=hear)
        await connection.flush()
        self._ready.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.02)
        await connection.close()

    @contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        thread.start()
        assert self._ready.wait(30)
        yield
        self._stop.set()
        thread.join(30)


def block_until(condition: Callable[[], bool]) -> None:
    """Hold the thread, and the loop that runs in it, until something holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_beats_go_on_and_a_lost_lease_ends_everything(bare_servers: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_FENCING", 0.3)
    node = f"n{time.monotonic_ns()}"
    settings = TrainerSettings(
        node=node, nats_url=f"nats://127.0.0.1:{bare_servers.ports.nats}", nats_user="trainer",
        nats_password=SecretStr(bare_servers.secrets["trainer"]), lease_seconds=1.0, beat_seconds=0.05,
    )  # fmt: skip
    ended: list[str] = []
    died: list[int] = []
    changed = asyncio.Event()

    def end(name: str) -> None:
        ended.append(name)
        changed.set()

    scheduler = Scheduler(bare_servers, node)
    with scheduler.serving():
        beating = Heartbeat(
            settings, lambda leaving: pb.Heartbeat(node=node, leaving=leaving), end=end, end_all=lambda: end("all"), leave=lambda: end("left"),
            idle=lambda: True, die=died.append,
        )  # fmt: skip
        beating.start()
        block_until(lambda: len(scheduler.beats) >= 10)  # while this very loop stands still
        assert not died and not ended
        scheduler.answer = pb.HeartbeatResponse(stop=["r-1"])
        await asyncio.wait_for(changed.wait(), 60)
        assert set(ended) == {"r-1"}
        scheduler.answer = None
        while "all" not in ended:
            await asyncio.sleep(0.02)
        assert not died
        block_until(lambda: bool(died))  # a loop that cannot stop what it lost ends the process
        assert died[0] == 70
        scheduler.answer = pb.HeartbeatResponse()
        await beating.stop()
        assert beating.over.done() and scheduler.beats[-1].leaving
