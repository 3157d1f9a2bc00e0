"""Events that cannot be handled or folded are set aside, and everything else goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import eventually

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core import consumer as consumers
from alveary_core.aggregates import Aggregates
from alveary_core.deadletters import LetterId
from alveary_core.errors import InvalidArgument, NotFound, Unavailable
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Event, Key
from alveary_core.projection import Projection
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.state import State as SchedulerState
from alveary_scheduler.state import evolve as evolve_scheduler

HEADERS = {"ce-id": "x", "ce-time": "2026-01-01T00:00:00Z"}


@pytest.fixture
async def log(bare_servers: Layout) -> AsyncIterator[EventLog]:
    connection = await connect(f"nats://127.0.0.1:{bare_servers.ports.nats}", "runs", bare_servers.secrets["runs"], "runs")
    await ensure_streams(connection)
    yield EventLog(connection, "runs")
    await connection.close()


@pytest.fixture
def key() -> Key:
    """An aggregate in a workspace of its own, so that its letters are those of one test."""
    return Key(new_id(), "run", new_id())


def tagged(text: str) -> ev.RunTagged:
    return ev.RunTagged(set={"n": text})


def text_of(event: Event) -> str:
    return str(event.message.set["n"])  # type: ignore[attr-defined]


class Tags(Projection):
    """Texts; for "bad" it fails half way."""

    schema = "CREATE TABLE IF NOT EXISTS seen (sequence INTEGER PRIMARY KEY, text TEXT)"
    bad = "bad"

    def __init__(self, path: Path, key: Key) -> None:
        self.subjects = (f"alveary.{key.workspace}.>",)
        super().__init__(path)

    def apply(self, event: Event) -> None:
        self.db.execute("INSERT INTO seen VALUES (?, ?)", (event.sequence, text_of(event)))
        if text_of(event) == self.bad:
            raise ValueError("half way \ud800")

    async def texts(self) -> list[str]:
        return [r["text"] for r in await self.rows("SELECT text FROM seen ORDER BY sequence")]


@contextlib.asynccontextmanager
async def running(view: Projection, log: EventLog) -> AsyncIterator[None]:
    task = asyncio.create_task(view.run(log))
    try:
        await asyncio.wait_for(view.caught_up.wait(), 30)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        view.close()


@contextlib.asynccontextmanager
async def handling(log: EventLog, key: Key, handler: consumers.Handler) -> AsyncIterator[str]:
    """A consumer of the aggregate's workspace; its name."""
    name = f"test-{new_id()}"
    task = asyncio.create_task(log.consume(name, [f"alveary.{key.workspace}.>"], handler))
    try:
        yield name
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def letters_of(log: EventLog, key: Key, count: int) -> list[str]:
    """Ids of the workspace's letters, once there are `count`."""

    async def there() -> bool:
        return sum((await log.dead_letters.count(key.workspace)).values()) == count

    await eventually(there, f"{count} dead letters")
    return [letter.id for letter in (await log.dead_letters.page(key.workspace, 0, 100))[0]]


async def test_a_model_goes_on_without_an_event_that_it_cannot_fold(log: EventLog, key: Key, tmp_path: Path) -> None:
    view = Tags(tmp_path / "view.sqlite", key)
    before = await log.append(key, [tagged("1"), tagged("bad"), tagged("2")], 0)
    async with running(view, log):
        after = await log.append(key, [tagged("bad"), tagged("3")], before.sequence)
        await view.wait_for(after.sequence)
        assert await view.texts() == ["1", "2", "3"]  # nothing of what failed half way
        ids = await letters_of(log, key, 2)
        letter = await log.dead_letters.get(key.workspace, LetterId.parse(ids[0]))
        assert (letter.service, letter.consumer, letter.type) == ("runs", "Tags", "run.tagged")
        assert letter.subject == key.subject("tagged")
        assert letter.error.startswith("ValueError: half way \\ud800")
        assert (await log.dead_letters.retry(letter))[0] == "later"
    # A version that can fold it: the model is rebuilt, and the letters are gone.
    fixed = Tags(tmp_path / "view.sqlite", key)
    fixed.bad = "none"
    async with running(fixed, log):
        assert await fixed.texts() == ["1", "bad", "2", "bad", "3"]
        assert await letters_of(log, key, 0) == []


async def test_a_letter_that_could_not_be_stored_is_stored_later(
    log: EventLog, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = log.dead_letters.put, 0

    async def put(*arguments: object) -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise Unavailable("the bus is away")
        await real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(log.dead_letters, "put", put)
    await log.append(key, [tagged("bad")], 0)
    async with running(Tags(tmp_path / "view.sqlite", key), log):
        pass  # a death here forgets nothing
    async with running(Tags(tmp_path / "view.sqlite", key), log):
        assert len(await letters_of(log, key, 1)) == 1


async def test_a_model_that_can_fold_nothing_stops_instead_of_setting_everything_aside(log: EventLog, key: Key, tmp_path: Path) -> None:
    await log.append(key, [tagged("bad") for _ in range(60)], 0)
    view = Tags(tmp_path / "view.sqlite", key)
    with pytest.raises(ValueError, match="half way"):
        await view.run(log)
    view.close()
    assert await letters_of(log, key, 0) == []


async def test_an_event_whose_handler_always_fails_is_set_aside_and_can_be_tried_again(
    log: EventLog, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "TRIES", 3)
    handled: list[str] = []
    broken = True

    async def handler(event: Event) -> None:
        if text_of(event) == "bad" and broken:
            raise KeyError("nobody thought of this")
        handled.append(text_of(event))

    async with handling(log, key, handler) as name:
        await log.append(key, [tagged("1"), tagged("bad"), tagged("2")], 0)
        (letter_id,) = await letters_of(log, key, 1)
        assert handled == ["1", "2"]
        letter = await log.dead_letters.get(key.workspace, LetterId.parse(letter_id))
        assert (letter.consumer, letter.tries) == (name, 3)
        assert "nobody thought of this" in letter.error and "test_dead_letters.py" in letter.traceback
        status, text = await log.dead_letters.retry(letter)
        assert status == "failed" and "nobody thought of this" in text
        assert (await log.dead_letters.get(key.workspace, LetterId.parse(letter_id))).tries == 4
        broken = False
        assert await log.dead_letters.retry(letter) == ("handled", "its event is handled")
        assert handled == ["1", "2", "bad"]
    status, text = await log.dead_letters.retry(letter)
    assert status == "failed" and "does not run" in text


async def test_what_passes_by_itself_is_no_dead_letter(log: EventLog, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "TRIES", 2)
    tries = 0
    done = asyncio.Event()

    async def handler(event: Event) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise Unavailable("the object store does not answer")
        done.set()

    async with handling(log, key, handler):
        await log.append(key, [tagged("1")], 0)
        await asyncio.wait_for(done.wait(), 60)
    assert await letters_of(log, key, 0) == []


async def test_events_that_wait_for_a_slow_handler_come_once(log: EventLog, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "_ACK_SECONDS", 3.0)
    handled: list[str] = []

    async def handler(event: Event) -> None:
        if text_of(event) == "1":
            await asyncio.sleep(7)  # longer than the server waits for an acknowledgement, twice
        handled.append(text_of(event))

    async with handling(log, key, handler) as name:
        await log.append(key, [tagged("1"), tagged("2"), tagged("3")], 0)

        async def acknowledged() -> bool:
            info = await log.js.consumer_info("ALVEARY", name)
            return handled[2:] != [] and not info.num_ack_pending and not info.num_pending

        await eventually(acknowledged, "all events acknowledged")
        assert handled == ["1", "2", "3"]


async def test_events_that_cannot_be_read_are_set_aside_by_everybody(log: EventLog, key: Key, tmp_path: Path) -> None:
    good = await log.append(key, [tagged("1")], 0)
    for body in (b"\xff\xfe", b'{"set": 5}', b'{"set": {"n": "\\ud800"}}', b"[" * 5000):
        last = await log.js.publish(key.subject("tagged"), body, headers=HEADERS)
    handled: list[str] = []

    async def handler(event: Event) -> None:
        handled.append(text_of(event))

    async with handling(log, key, handler), running(view := Tags(tmp_path / "view.sqlite", key), log):
        await view.wait_for(last.seq)
        assert await view.texts() == ["1"]
        await letters_of(log, key, 8)
        assert handled == ["1"]
    # Who appends to the aggregate folds without them, and knows that they are there.
    aggregates: Aggregates[list[int]] = Aggregates(
        log, "run", list, lambda seen, event: [*seen, event.sequence] if isinstance(event.message, ev.RunTagged) else seen
    )
    state, _ = await aggregates.execute(key, lambda seen: [tagged("2")])
    assert state[0] == good.sequence and len(state) == 2
    assert (await log.dead_letters.count(key.workspace))["runs/aggregate-run"] == 4


async def test_an_aggregate_whose_fold_raises_goes_on_without_that_event(log: EventLog, key: Key) -> None:
    def evolve(seen: list[str], event: Event) -> list[str]:
        if text_of(event) == "bad":
            raise ZeroDivisionError("nobody thought of this")
        return [*seen, text_of(event)]

    aggregates = Aggregates(log, "run", list, evolve)
    state, _ = await aggregates.execute(key, lambda seen: [tagged("1"), tagged("bad"), tagged("2")])
    assert state == ["1", "2"]
    assert (await Aggregates(log, "run", list, evolve).load(key))[0] == ["1", "2"]
    (letter_id,) = await letters_of(log, key, 1)
    letter = await log.dead_letters.get(key.workspace, LetterId.parse(letter_id))
    assert (letter.consumer, letter.tries) == ("aggregate-run", 2)
    assert (await log.dead_letters.retry(letter))[0] == "failed"
    await log.dead_letters.drop(key.workspace, LetterId.parse(letter_id))
    with pytest.raises(NotFound, match="there is no dead letter"):
        await log.dead_letters.get(key.workspace, LetterId.parse(letter_id))


async def test_letters_are_listed_in_pages(log: EventLog, key: Key) -> None:
    for sequence in range(1, 6):
        await log.dead_letters.put("handlers", key.subject("tagged"), sequence, "it is bad")
    first, following = await log.dead_letters.page(key.workspace, 0, 3)
    rest, end = await log.dead_letters.page(key.workspace, following, 3)
    assert [x.sequence for x in (*first, *rest)] == [1, 2, 3, 4, 5]
    assert end == 0
    assert await log.dead_letters.count(key.workspace) == {"runs/handlers": 5}
    for text in ("", "runs/handlers", "runs/handlers/0", "runs/*/1", "runs/handlers/99999999999999999999", "../x/1"):
        with pytest.raises(InvalidArgument, match="an id is"):
            LetterId.parse(text)


async def test_an_event_that_is_too_large_is_refused_by_its_size(log: EventLog, key: Key) -> None:
    with pytest.raises(InvalidArgument, match=r"run.tagged: the event .* would have \d+ bytes, and the event log takes \d+"):
        await log.append(key, [tagged("x" * (9 << 20))], 0)
    assert await log.read(key) == []


async def test_the_schedulers_state_is_what_it_was_before_an_event_that_it_cannot_fold(
    bare_servers: Layout, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evolve_scheduler

    def half_way(state: SchedulerState, event: Event) -> None:
        real(state, event)
        if isinstance(event.message, ev.TargetCreated) and event.message.spec.description == "bad":
            raise ArithmeticError("half way")

    view = SchedulerProjection(str(tmp_path / "scheduler.sqlite"))
    view.subjects = (f"alveary.{key.workspace}.>",)
    monkeypatch.setattr("alveary_scheduler.projection.evolve", half_way)
    connection = await connect(f"nats://127.0.0.1:{bare_servers.ports.nats}", "scheduler", bare_servers.secrets["scheduler"], "scheduler")
    log = EventLog(connection, "scheduler")
    for name, text in (("a", "good"), ("b", "bad"), ("c", "good")):
        created = ev.TargetCreated(spec=ev.ComputeSpec(kind=c.TARGET_KIND_NODES, description=text))
        last = await log.append(Key(key.workspace, "target", name), [created], 0)
    async with running(view, log):
        await view.wait_for(last.sequence)
        assert sorted(name for _, name in view.state.targets) == ["a", "c"]
        assert sorted(name for _, name in view.state.pools) == ["a", "c"]
        assert len(await letters_of(log, key, 1)) == 1
    await connection.close()
