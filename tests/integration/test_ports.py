"""One contract for each port; the fakes that unit tests use and the real servers must both keep it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fakes import MemoryLog, MemoryStore

from alveary.local.layout import Layout
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core.aggregates import Aggregates
from alveary_core.errors import NotFound
from alveary_core.eventlog import Conflict, EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch, ObjectStore


@pytest.fixture(params=["memory", "real"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryLog()
        return
    layout: Layout = request.getfixturevalue("bare_servers")
    connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", "runs", layout.secrets["runs"], "ports")
    await ensure_streams(connection)
    yield EventLog(connection, "runs")
    await connection.close()


@pytest.fixture(params=["memory", "real"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryStore()
        return
    layout: Layout = request.getfixturevalue("bare_servers")
    opened = ObjectStore(f"127.0.0.1:{layout.ports.s3}", layout.secrets["s3_access"], layout.secrets["s3_secret"])
    await opened.ensure_buckets()
    yield opened
    opened.close()


def tagged(text: str) -> ev.RunTagged:
    return ev.RunTagged(set={"n": text})


def texts(events: list[Any]) -> list[str]:
    return [e.message.set["n"] for e in events]


async def test_log_keeps_order_per_aggregate_and_refuses_the_late(log: Any) -> None:
    one, two = Key("w", "run", new_id()), Key("w", "run", new_id())
    first = await log.append(one, [tagged("1"), tagged("2")], 0)
    await log.append(two, [tagged("x")], 0)
    last = await log.append(one, [tagged("3")], first.sequence)
    assert texts(await log.read(one)) == ["1", "2", "3"] and texts(await log.read(two)) == ["x"]
    for wrong in (0, first.sequence):
        with pytest.raises(Conflict):
            await log.append(one, [tagged("4")], wrong)
    assert [e.sequence for e in await log.read(one)][-1] == last.sequence <= await log.last_sequence()
    with pytest.raises(ValueError, match="does not belong"):
        await log.append(one, [ev.ModelArchived(version=1)], last.sequence)


async def test_log_purges_what_is_older_of_one_aggregate_alone(log: Any) -> None:
    one, two = Key("w", "run", new_id()), Key("w", "run", new_id())
    await log.append(two, [tagged("x")], 0)
    first = await log.append(one, [tagged("1"), tagged("2")], 0)
    last = await log.append(one, [tagged("3")], first.sequence)
    await log.purge(one, last.sequence)
    assert texts(await log.read(one)) == ["3"] and texts(await log.read(two)) == ["x"]
    await log.append(one, [tagged("4")], last.sequence)
    assert texts(await log.read(one)) == ["3", "4"]


async def test_aggregates_decide_again_after_a_conflict(log: Any) -> None:
    key = Key("w", "run", new_id())
    sides = [Aggregates(log, "run", int, lambda n, _: n + 1) for _ in range(3)]
    await asyncio.gather(*(side.execute(key, lambda n: [tagged(str(n))]) for side in sides))
    assert texts(await log.read(key)) == ["0", "1", "2"]


async def test_store_gives_back_what_was_put_whole_or_in_part(store: Any, tmp_path: Path) -> None:
    data, key = os.urandom(100_000), f"ports/{new_id()}"
    (tmp_path / "a").write_bytes(data)
    entry = await store.put_file("runs", key, tmp_path / "a")
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert await store.get("runs", key) == data and await store.get("runs", key, offset=7, length=9) == data[7:16]
    assert await store.size("runs", key) == len(data)
    await store.get_file("runs", key, tmp_path / "b", entry.sha256)
    assert (tmp_path / "b").read_bytes() == data
    with pytest.raises(DigestMismatch):
        await store.get_file("runs", key, tmp_path / "c", "0" * 64)
    assert not (tmp_path / "c").exists()


async def test_store_lists_copies_and_deletes(store: Any, tmp_path: Path) -> None:
    prefix = f"ports/{new_id()}/"
    await store.put("runs", prefix + "b", b"2")
    await store.put("runs", prefix + "a", b"1")
    await store.copy("models", prefix + "c", "runs", prefix + "a")
    assert await store.keys("runs", prefix) == [prefix + "a", prefix + "b"]
    assert await store.get("models", prefix + "c") == b"1"
    await store.delete("runs", [prefix + "a", prefix + "never"])
    assert await store.keys("runs", prefix) == [prefix + "b"] and await store.size("runs", prefix + "a") is None
    with pytest.raises(NotFound):
        await store.get("runs", prefix + "a")
    with pytest.raises(NotFound):
        await store.copy("models", prefix + "d", "runs", prefix + "a")
