"""The event log and projections on a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError
from nats.js.api import StreamConfig
from support import servers

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core.aggregates import Aggregates
from alveary_core.errors import FailedPrecondition, Unavailable
from alveary_core.eventlog import LOG_FORMAT, LOGS, Conflict, EventLog, connect, ensure_streams
from alveary_core.events import STREAM, Event, Key
from alveary_core.projection import Projection


async def open_log(layout: Layout, user: str) -> EventLog:
    connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", user, layout.secrets[user], user)
    await ensure_streams(connection)
    return EventLog(connection, user)


@pytest.fixture
async def log(bare_servers: Layout) -> AsyncIterator[EventLog]:
    opened = await open_log(bare_servers, "runs")
    yield opened
    await opened.connection.close()


@pytest.mark.parametrize(("found", "told"), [(None, "format 0.*earlier"), ("0", "format 0.*earlier"), ("2", "format 2.*later")])
async def test_an_event_log_of_another_format_is_refused(tmp_path: Path, found: str | None, told: str) -> None:
    with servers(tmp_path) as layout:
        connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", "runs", layout.secrets["runs"], "tests")
        metadata = {} if found is None else {"alveary.format": found}
        await connection.jetstream().add_stream(StreamConfig(name=STREAM, subjects=["alveary.>"], metadata=metadata))
        with pytest.raises(FailedPrecondition, match=told):
            await ensure_streams(connection)
        await connection.close()


async def test_the_event_log_says_its_format(log: EventLog) -> None:
    config = (await log.js.stream_info(STREAM)).config
    assert config.metadata is not None and config.metadata["alveary.format"] == str(LOG_FORMAT)
    await ensure_streams(log.connection)


def tagged(text: str) -> ev.RunTagged:
    return ev.RunTagged(set={"n": text})


async def test_appends_are_read_back_in_order_with_their_envelope(log: EventLog) -> None:
    key = Key("w.s", "run", new_id())
    first = await log.append(key, [tagged("1"), tagged("2")], 0)
    await log.append(key, [tagged("3")], first.sequence)
    events = await log.read(key)
    assert [e.message.set["n"] for e in events] == ["1", "2", "3"]  # type: ignore[attr-defined]
    assert [e.type for e in events] == ["run.tagged"] * 3
    assert events[0].key == key
    raw = await log.js.get_msg("ALVEARY", seq=events[0].sequence)
    assert raw.headers is not None
    assert raw.headers["ce-type"] == "alveary.run.tagged.v1"
    assert raw.headers["ce-specversion"] == "1.0"


async def test_a_writer_that_did_not_see_the_newest_event_is_refused(log: EventLog) -> None:
    key = Key("w", "run", new_id())
    await log.append(key, [tagged("1")], 0)
    with pytest.raises(Conflict):
        await log.append(key, [tagged("2")], 0)
    assert len(await log.read(key)) == 1


async def test_concurrent_commands_all_get_through_by_deciding_again(log: EventLog, bare_servers: Layout) -> None:
    other = await open_log(bare_servers, "runs")
    make = lambda source: Aggregates(source, "run", int, lambda n, _: n + 1)  # noqa: E731
    one, two = make(log), make(other)
    key = Key("w", "run", new_id())
    await asyncio.gather(*(side.execute(key, lambda n: [tagged(str(n))]) for side in (one, two) for _ in range(4)))
    assert [e.message.set["n"] for e in await log.read(key)] == [str(n) for n in range(8)]  # type: ignore[attr-defined]
    await other.connection.close()


async def test_handlers_get_every_event_once_acknowledged_and_again_after_a_failure(log: EventLog) -> None:
    key = Key("w", "run", new_id())
    seen: list[str] = []
    done = asyncio.Event()

    async def handler(event: Event) -> None:
        text = event.message.set["n"]  # type: ignore[attr-defined]
        seen.append(text)
        if seen == ["1"]:
            raise RuntimeError("the first time it fails")
        if sorted(set(seen)) == ["1", "2"] and seen.count("1") == 2:
            done.set()

    task = asyncio.create_task(log.consume(new_id(), [key.subject()], handler))
    await log.append(key, [tagged("1"), tagged("2")], 0)
    await asyncio.wait_for(done.wait(), 30)
    task.cancel()
    assert seen.count("2") == 1


class Tags(Projection):
    """Counts."""

    schema = "CREATE TABLE IF NOT EXISTS seen (id TEXT, sequence INTEGER PRIMARY KEY)"

    def __init__(self, path: Path, key: Key) -> None:
        self.subjects = (key.subject(),)
        super().__init__(path)

    def apply(self, event: Event) -> None:
        self.db.execute("INSERT INTO seen VALUES (?, ?)", (event.id, event.sequence))


@contextlib.asynccontextmanager
async def running(projection: Projection, log: EventLog) -> AsyncIterator[None]:
    task = asyncio.create_task(projection.run(log))
    await asyncio.wait_for(projection.caught_up.wait(), 30)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    projection.close()


async def test_a_projection_goes_on_where_it_was_and_a_lost_file_is_made_anew(log: EventLog, tmp_path: Path) -> None:
    key = Key("w", "run", new_id())
    last = await log.append(key, [tagged("1"), tagged("2")], 0)
    async with running(view := Tags(tmp_path / "a.sqlite", key), log):
        await view.wait_for(last.sequence)
        assert len(await view.rows("SELECT * FROM seen")) == 2
    last = await log.append(key, [tagged("3")], last.sequence)
    async with running(view := Tags(tmp_path / "a.sqlite", key), log):
        await view.wait_for(last.sequence)
        rows = await view.rows("SELECT * FROM seen ORDER BY sequence")
        assert len(rows) == 3  # an INSERT of an event seen before would have failed
    async with running(fresh := Tags(tmp_path / "b.sqlite", key), log):
        await fresh.wait_for(last.sequence)
        assert [tuple(r) for r in await fresh.rows("SELECT * FROM seen ORDER BY sequence")] == [tuple(r) for r in rows]


async def test_reads_of_ones_own_writes_wait_and_give_up_with_a_reason(log: EventLog, tmp_path: Path) -> None:
    key = Key("w", "run", new_id())
    async with running(view := Tags(tmp_path / "a.sqlite", key), log):
        waiting = asyncio.create_task(view.wait_for((await log.last_sequence()) + 1))
        await log.append(key, [tagged("1")], 0)
        await asyncio.wait_for(waiting, 30)
        with pytest.raises(Unavailable, match="not yet at"):
            await view.wait_for(view.position + 1_000_000, patience=0.2)


async def test_a_follower_survives_the_loss_of_its_consumer(log: EventLog) -> None:
    key = Key("w", "run", new_id())
    got: list[int] = []
    last = await log.append(key, [tagged("1")], 0)

    async def follow() -> None:
        async with contextlib.aclosing(log.follow([key.subject()], last.sequence)) as stream:
            async for item in stream:
                if item is not None:
                    got.append(item[1])
                    if len(got) == 3:
                        return
                elif len(got) == 1:
                    for info in await log.js.consumers_info("ALVEARY"):
                        if info.config.filter_subjects == [key.subject()] or info.config.filter_subject == key.subject():
                            await log.js.delete_consumer("ALVEARY", info.name)
                    await log.append(key, [tagged("2"), tagged("3")], last.sequence)

    await asyncio.wait_for(follow(), 60)
    assert got == sorted(set(got)) and len(got) == 3


async def test_a_service_cannot_write_what_belongs_to_another(log: EventLog) -> None:
    with pytest.raises((NatsError, Unavailable)):
        await asyncio.wait_for(log.js.publish("alveary.w.model.x.registered", b"{}", timeout=1), 5)
    with pytest.raises(ValueError, match="does not belong"):
        await log.append(Key("w", "run", "x"), [ev.ModelArchived(version=1)], 0)


async def test_an_unknown_event_is_skipped_and_unknown_fields_are_ignored(log: EventLog, tmp_path: Path) -> None:
    key = Key("w", "run", new_id())
    headers = {"ce-id": new_id(), "ce-time": "2026-01-01T00:00:00Z"}
    await log.js.publish(key.subject("of_the_future"), b"{}", headers=headers)
    ack = await log.js.publish(key.subject("tagged"), b'{"set": {"n": "1"}, "newField": 3}', headers=headers)
    async with running(view := Tags(tmp_path / "a.sqlite", key), log):
        await view.wait_for(ack.seq)
        assert len(await view.rows("SELECT * FROM seen")) == 1


def test_specifications_survive_the_journey() -> None:
    from alveary_core.events import body, decode, envelope

    spec = c.RunSpec(entry_script="ü.py", arguments=["\u2028", "a\nb"], max_run_duration_seconds=0.5, tags={"k": "v"})
    message = ev.RunSubmitted(spec=spec, number=2**40)
    key = Key("w", "run", "a.b c")
    headers = envelope(key, message, "id", "runs", "")
    event = decode(key.subject("submitted"), headers, body(message), 1)
    assert event.message == message
    assert event.key == key


async def test_who_follows_is_told_that_nothing_is_left_also_when_the_rest_was_purged(
    bare_servers: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of a consumer and the first message that it sends, an archiver may have purged all of them."""
    log = await open_log(bare_servers, "trainer")
    subject = f"alveary-logs.w.{new_id()}"
    for _ in range(3):
        await log.js.publish(subject, b"")
    add = log.js.add_consumer

    async def purged_meanwhile(*arguments: Any, **options: Any) -> Any:
        await log.js.purge_stream(LOGS, subject=subject)
        info = await add(*arguments, **options)
        info.num_pending = 3
        return info

    monkeypatch.setattr(log.js, "add_consumer", purged_meanwhile)
    async with asyncio.timeout(20), contextlib.aclosing(log.follow([subject], 1, LOGS)) as stream:
        assert await anext(stream) is None
        await log.js.publish(subject, b"more")
        assert (await anext(stream))[0].data == b"more" and await anext(stream) is None  # type: ignore[index]
    await log.connection.close()
