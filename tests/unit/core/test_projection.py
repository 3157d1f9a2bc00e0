"""Read models without servers: what runs where, and what a full disk or a damaged file does to them."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import MemoryLetters

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.errors import DeadlineExceeded
from alveary_core.events import Event, Key, body, envelope
from alveary_core.projection import Projection

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"


class Log:
    """A log that holds `count` events, and more when told to."""

    def __init__(self, count: int) -> None:
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.dead_letters = MemoryLetters()
        self.last = 0
        for _ in range(count):
            self.add()
        self.messages.put_nowait(None)

    def add(self) -> None:
        self.last += 1
        key, message = Key("w", "run", f"r{self.last % 3}"), ev.RunTagged(set={"n": str(self.last)})
        stored = SimpleNamespace(subject=key.subject("tagged"), headers=envelope(key, message, str(self.last), "t", ""), data=body(message))
        self.messages.put_nowait((stored, self.last))

    async def info(self, stream: str) -> Any:
        return SimpleNamespace(created="1", state=SimpleNamespace(last_seq=self.last))

    async def follow(self, subjects: Sequence[str], start: int, stream: str) -> AsyncGenerator[Any, None]:
        while True:
            item = await self.messages.get()
            if item is None or item[1] >= start:
                yield item


class Seen(Projection):
    """Notes the sequence of each event and the thread that applied it."""

    schema = "CREATE TABLE IF NOT EXISTS seen (sequence INTEGER PRIMARY KEY, filler BLOB)"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.threads: set[int] = set()
        self.forgotten = 0

    def apply(self, event: Event) -> None:
        self.threads.add(threading.get_ident())
        self.db.execute("INSERT INTO seen VALUES (?, zeroblob(4000))", (event.sequence,))

    def forget(self) -> None:
        self.forgotten += 1


async def stop(task: asyncio.Task[None], view: Projection) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    view.close()


@pytest.mark.parametrize("inline", [False, True])
async def test_events_are_applied_beside_the_event_loop_unless_their_state_belongs_to_it(tmp_path: Path, inline: bool) -> None:
    view = Seen(tmp_path / "a")
    view.inline = inline
    told: list[int] = []
    view.on_event(lambda event: told.append(threading.get_ident()))
    task = asyncio.create_task(view.run(Log(1200)))  # type: ignore[arg-type]
    await asyncio.wait_for(view.caught_up.wait(), 30)
    assert [r[0] for r in await view.rows("SELECT sequence FROM seen ORDER BY 1")] == list(range(1, 1201)) and view.position == 1200
    assert (threading.get_ident() in view.threads) == inline and set(told) == {threading.get_ident()} and len(told) == 1200
    assert not list(tmp_path.glob("*.progress*"))
    await stop(task, view)


async def test_queries_that_last_hold_up_neither_lookups_nor_the_writer_and_end_with_their_caller(tmp_path: Path) -> None:
    view, log = Seen(tmp_path / "a"), Log(1)
    task = asyncio.create_task(view.run(log))  # type: ignore[arg-type]
    await asyncio.wait_for(view.caught_up.wait(), 30)
    lasting = [asyncio.create_task(view.rows(ENDLESS, slow=True)) for _ in range(10)]
    await asyncio.sleep(0)
    log.add()
    log.messages.put_nowait(None)
    await view.wait_for(2, 30)
    assert (await view.row("SELECT count(*) FROM seen"))[0] == 2  # type: ignore[index]
    assert not any(t.done() for t in lasting)
    for one in lasting:
        one.cancel()
    await asyncio.gather(*lasting, return_exceptions=True)
    assert await view.rows("SELECT 1", slow=True), "their threads are free again"
    with pytest.raises(DeadlineExceeded, match="ask for less"):
        await view.readers.run(lambda db: db.execute(ENDLESS).fetchall(), slow=True, patience=0.05)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        await view.rows("DELETE FROM seen")
    await stop(task, view)


async def test_a_full_disk_delays_a_batch_and_loses_nothing(tmp_path: Path) -> None:
    view, log = Seen(tmp_path / "a"), Log(2)
    task = asyncio.create_task(view.run(log))  # type: ignore[arg-type]
    await asyncio.wait_for(view.caught_up.wait(), 30)
    pages = view.db.execute("PRAGMA page_count").fetchone()[0]
    view.db.execute(f"PRAGMA max_page_count={pages + 1}")
    for _ in range(50):
        log.add()
    log.messages.put_nowait(None)
    while not view.forgotten:
        await asyncio.sleep(0.01)
    assert len(await view.rows("SELECT 1 FROM seen")) == 2 and not task.done()
    view.db.execute("PRAGMA max_page_count=1000000")
    await view.wait_for(52, 30)
    assert len(await view.rows("SELECT 1 FROM seen")) == 52
    await stop(task, view)


@pytest.mark.parametrize("damage", [b"this is no database" * 100, None])
async def test_a_damaged_or_outdated_file_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "a"
    view = Seen(path)
    view.db.execute("INSERT INTO seen VALUES (99, NULL)")
    view.close()
    if damage is not None:
        path.write_bytes(damage)
    monkey = type("Newer", (Seen,), {"version": 2}) if damage is None else Seen
    fresh = monkey(path)
    assert await fresh.rows("SELECT * FROM seen") == [] and fresh.position == 0
    fresh.close()


async def test_changes_tell_of_one_aggregate_only(tmp_path: Path) -> None:
    view, log = Seen(tmp_path / "a"), Log(0)
    task = asyncio.create_task(view.run(log))  # type: ignore[arg-type]
    await asyncio.wait_for(view.caught_up.wait(), 30)
    changes = view.changes("r2", timeout=60)
    await anext(changes)
    following = asyncio.ensure_future(anext(changes))
    log.add()  # r1
    log.messages.put_nowait(None)
    await view.wait_for(1, 30)
    assert not following.done()
    log.add()  # r2
    log.messages.put_nowait(None)
    await asyncio.wait_for(following, 30)
    await changes.aclose()  # type: ignore[attr-defined]
    assert view._watchers == {}
    await stop(task, view)
