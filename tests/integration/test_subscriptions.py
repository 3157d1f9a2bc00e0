"""Subscriptions to events through the service, with clients that are slow, fail, go away and share a name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from support import eventually

from alveary.aio import Client
from alveary.config import Config
from alveary.errors import AlvearyError
from alveary.local.layout import Layout
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.names import token
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc
from alveary_core import auth
from alveary_core.errors import InvalidArgument
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.server import Server
from alveary_runs import subscriptions
from alveary_runs.subscriptions import EventService, check_pattern

SECRET = "0" * 48


@pytest.fixture
async def log(bare_servers: Layout) -> AsyncIterator[EventLog]:
    connection = await connect(f"nats://127.0.0.1:{bare_servers.ports.nats}", "runs", bare_servers.secrets["runs"], "runs")
    await ensure_streams(connection)
    yield EventLog(connection, "runs")
    await connection.close()


@pytest.fixture
def key() -> Key:
    """An aggregate in a workspace of its own."""
    return Key(new_id(), "run", new_id())


@pytest.fixture
async def client(log: EventLog, key: Key) -> AsyncIterator[Client]:
    """Of a server that has the event service alone."""
    server = Server(SECRET)
    runs_pb2_grpc.add_EventServiceServicer_to_server(EventService(log), server.server)
    port = await server.start("127.0.0.1:0")
    secret = auth.issue(SECRET, auth.Principal("somebody", key.workspace, "reader"))
    made = Client(Config(f"127.0.0.1:{port}", secret, key.workspace))
    yield made
    await made.close()
    await server.stop(0)


async def tell(log: EventLog, key: Key, *texts: str) -> None:
    events = await log.read(key)
    await log.append(key, [ev.RunTagged(set={"n": text}) for text in texts], events[-1].sequence if events else 0)


def text_of(event: pb.Event) -> str:
    return event.data_json.partition('"n":')[2].strip(' "}').strip()


@contextlib.asynccontextmanager
async def subscribed(client: Client, handler: object, durable: str) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(client.events.subscribe("run.*", handler, durable=durable, from_sequence=1))  # type: ignore[arg-type]
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settled(log: EventLog, key: Key, durable: str) -> None:
    async def nothing_left() -> bool:
        info = await log.js.consumer_info("ALVEARY", f"sub-{token(key.workspace)}-{durable}")
        return not info.num_ack_pending and not info.num_pending

    await eventually(nothing_left, "every event is acknowledged")


async def test_a_slow_subscriber_gets_each_event_once(client: Client, log: EventLog, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_ACK_SECONDS", 3.0)
    seen: list[str] = []

    async def handler(event: pb.Event) -> None:
        seen.append(text_of(event))
        if seen == ["0"]:
            await asyncio.sleep(7)  # twice as long as the bus waits for an acknowledgement

    await tell(log, key, *map(str, range(5)))
    async with subscribed(client, handler, "slow"):
        await eventually_len(seen, 5)
        await settled(log, key, "slow")
    assert seen == ["0", "1", "2", "3", "4"]


async def eventually_len(seen: list[str], count: int) -> None:
    async def enough() -> bool:
        return len(seen) >= count

    await eventually(enough, f"{count} events")


async def test_what_a_handler_could_not_handle_comes_again_and_nothing_else(client: Client, log: EventLog, key: Key) -> None:
    seen: list[str] = []

    async def handler(event: pb.Event) -> None:
        seen.append(text_of(event))
        if seen == ["0", "1"]:
            raise RuntimeError("the automation has a bug")

    await tell(log, key, "0", "1", "2")
    async with subscribed(client, handler, "failing") as task:
        with pytest.raises(RuntimeError, match="the automation has a bug"):
            await asyncio.wait_for(task, 60)
    async with subscribed(client, handler, "failing"):
        await eventually_len(seen, 4)
        await settled(log, key, "failing")
    assert seen[:2] == ["0", "1"] and sorted(seen[2:]) == ["1", "2"]


async def test_two_subscribers_of_one_name_share_its_events_and_one_takes_over(client: Client, log: EventLog, key: Key) -> None:
    one: list[str] = []
    two: list[str] = []
    stuck = asyncio.Event()

    async def first(event: pb.Event) -> None:
        one.append(text_of(event))
        await stuck.wait()

    async def second(event: pb.Event) -> None:
        two.append(text_of(event))

    async with subscribed(client, second, "shared"):
        async with subscribed(client, first, "shared"):
            for number in range(60):  # which of the two gets one is the bus's choice
                await tell(log, key, str(number))
                if one:
                    break
            await eventually_len(one, 1)
        await settled(log, key, "shared")
    assert len(one) == 1
    assert sorted(two) == sorted(map(str, range(number + 1)))  # what the first had and did not acknowledge, too


async def test_a_subscriber_that_does_not_read_is_sent_a_window_and_no_more(client: Client, log: EventLog, key: Key) -> None:
    await tell(log, key, *(str(n) * 1000 for n in range(100)))
    never = asyncio.Event()

    async def handler(event: pb.Event) -> None:
        await never.wait()

    async with subscribed(client, handler, "asleep"):

        async def full() -> bool:
            with contextlib.suppress(Exception):
                return bool((await log.js.consumer_info("ALVEARY", f"sub-{token(key.workspace)}-asleep")).num_ack_pending)
            return False

        await eventually(full, "events are on their way")
        info = await log.js.consumer_info("ALVEARY", f"sub-{token(key.workspace)}-asleep")
        assert info.config.max_ack_pending == subscriptions._WINDOW and info.num_ack_pending <= subscriptions._WINDOW


async def test_a_window_of_an_earlier_version_gets_smaller(
    client: Client, log: EventLog, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    async def handler(event: pb.Event) -> None:
        seen.append(text_of(event))

    monkeypatch.setattr(subscriptions, "_WINDOW", 256)
    await tell(log, key, "0")
    async with subscribed(client, handler, "old"):
        await eventually_len(seen, 1)
        await settled(log, key, "old")
    monkeypatch.undo()
    await tell(log, key, "1")
    async with subscribed(client, handler, "old"):
        await eventually_len(seen, 2)
        await settled(log, key, "old")
    assert seen == ["0", "1"]
    assert (await log.js.consumer_info("ALVEARY", f"sub-{token(key.workspace)}-old")).config.max_ack_pending == subscriptions._WINDOW


async def test_events_that_this_version_cannot_read_are_passed_on(client: Client, log: EventLog, key: Key) -> None:
    got: list[pb.Event] = []
    done = asyncio.Event()

    async def handler(event: pb.Event) -> None:
        got.append(event)
        if len(got) == 2:
            done.set()

    await log.js.publish(key.subject("of_the_future"), b"{}", headers={"ce-id": "1", "ce-time": "2026-01-01T00:00:00Z"})
    await log.js.publish(key.subject("tagged"), b"\xff", headers={"ce-id": "2", "ce-time": "soon"})
    async with subscribed(client, handler, ""):
        await asyncio.wait_for(done.wait(), 60)
    assert [(e.type, e.data_json, e.HasField("time")) for e in got] == [("run.of_the_future", "{}", True), ("run.tagged", "\ufffd", False)]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("run.complete", "there is no event 'run.complete'; run has .*completed.* Did you mean 'run.completed'?"),
        ("runs.*", "there is no aggregate 'runs'; there are run, .* Did you mean 'run"),
        ("*.complete", "there is no event.*Did you mean '\\*.completed'?"),
        ("model.completed", "there is no event 'model.completed'; model has "),
        ("run", "use '<aggregate>.<event>'"),
        ("", "use '<aggregate>.<event>'"),
        ("run.completed.x", "there is no event"),
        ("run.>", "there is no event"),
        ("**.*", "there is no aggregate"),
        ("x" * 300, "use '<aggregate>.<event>'"),
    ],
)
def test_patterns_that_nothing_can_match_are_refused_with_the_nearest_that_something_can(pattern: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", ["*.*", "run.*", "*.completed", "run.completed", "model.export_failed"])
def test_patterns_that_something_can_match_are_taken(pattern: str) -> None:
    assert ".".join(check_pattern(pattern)) == pattern


async def test_a_subscription_to_nothing_is_refused_through_the_client(client: Client) -> None:
    async def handler(event: pb.Event) -> None:
        raise AssertionError("nothing can match")

    with pytest.raises(AlvearyError, match="Did you mean 'run.completed'?"):
        await client.events.subscribe("run.complete", handler)
