"""Logs on a real stream and a real object store: read as one while they move from the one into the other."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import urllib3
import zstandard
from google.protobuf.proto import serialize_length_prefixed
from nats.aio.client import Client

from alveary.local.layout import Layout
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2_grpc as rpc
from alveary_core.auth import Principal, issue
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable
from alveary_core.eventlog import LOGS, EventLog, connect, ensure_streams
from alveary_core.events import Event, Key
from alveary_core.objectstore import ObjectStore
from alveary_core.server import Server
from alveary_logs import archiver as archiver_module
from alveary_logs import stream as stream_module
from alveary_logs.archive import count
from alveary_logs.archiver import Archiver
from alveary_logs.projection import LogsProjection
from alveary_logs.reader import LogReader, Where
from alveary_logs.service import LogService, add
from alveary_logs.stream import LogStream, subject_of
from alveary_logs.wire import LAST_CURSOR, Filter, lines_of

ALL = Filter()
SECRET = "a secret that is long enough for a key"


@dataclass
class Logs:
    """The parts of the service, and a trainer that writes one log."""

    trainer: Client
    log: EventLog
    runs: EventLog
    store: ObjectStore
    stream: LogStream
    view: LogsProjection
    reader: LogReader
    archiver: Archiver
    key: Key = field(default_factory=lambda: Key("default", "log", new_id()))
    said: list[bytes] = field(default_factory=list)

    async def say(self, *lines: bytes, stream: str = "stdout", rank: int = 0, at: float = 0.0, **options: bool) -> None:
        """Publish lines as one chunk."""
        chunk = pb.LogChunk()
        for data in lines:
            one = chunk.lines.add(stream=stream, rank=rank, attempt=1, data=data, **options)
            one.time.FromMicroseconds(int(at * 1e6))
        await self.trainer.jetstream().publish(subject_of(self.key), chunk.SerializeToString())
        if not options:
            self.said += lines

    async def end(self) -> None:
        """The run is final."""
        key = Key("default", "run", self.key.id)
        await self.view.wait_for((await self.runs.append(key, [ev.RunCompleted(attempt=1)], 0)).sequence)

    async def archive(self, *, final: bool = True) -> int:
        written = await self.archiver.archive("default", self.key.id, final=final)
        _, sequence = await self.archiver._newest.load(self.key)
        await self.view.wait_for(sequence)
        return written

    async def lines(self, after: int = 0, wanted: Filter = ALL) -> list[pb.TailLine]:
        return [one async for block in self.reader.blocks(self.key, wanted, Where(after)) for one in lines_of(block.payload)]

    async def follow(self, after: int = 0, slowly: Callable[[], Awaitable[None]] | None = None) -> list[bytes]:
        found = []
        async with contextlib.aclosing(self.reader.blocks(self.key, ALL, Where(after), follow=True)) as blocks:
            async for block in blocks:
                found += [one.line.data for one in lines_of(block.payload)]
                if slowly is not None:
                    await slowly()
        return found

    async def left(self) -> int:
        """Messages of the log on the stream."""
        state = (await self.log.js.stream_info(LOGS, subjects_filter=subject_of(self.key))).state
        return sum((state.subjects or {}).values())

    async def objects(self) -> list[str]:
        return sorted(await self.store.keys("runs", f"{self.key.id}/"))


@pytest.fixture
async def logs(bare_servers: Layout, tmp_path: Path) -> AsyncIterator[Logs]:
    url, secrets = f"nats://127.0.0.1:{bare_servers.ports.nats}", bare_servers.secrets
    connections = [await connect(url, user, secrets[user], user) for user in ("trainer", "logs", "runs")]
    await ensure_streams(connections[0])
    store = ObjectStore(f"127.0.0.1:{bare_servers.ports.s3}", secrets["s3_access"], secrets["s3_secret"])
    await store.ensure_buckets()
    log, runs = EventLog(connections[1], "logs"), EventLog(connections[2], "runs")
    executor = ThreadPoolExecutor(2)
    view, stream = LogsProjection(tmp_path / "logs.sqlite"), LogStream(log, executor)

    def changed(event: Event) -> None:
        stream.nudge(Key(event.key.workspace, "log", event.key.id))

    view.on_event(changed)
    following = asyncio.create_task(view.run(log))
    await view.caught_up.wait()
    archiver = Archiver(log, store, stream, view, tmp_path, part_bytes=20_000)
    yield Logs(connections[0], log, runs, store, stream, view, LogReader(stream, store, view, tmp_path), archiver)
    while not following.done():  # a cancellation that meets the very end of a wait may be lost (cpython issue 86296)
        following.cancel()
        await asyncio.wait({following}, timeout=0.2)
    for connection in connections:
        await connection.close()
    view.close()
    store.close()
    executor.shutdown()
    assert [path.name for path in tmp_path.iterdir() if "alveary-log" in path.name] == []


def data_of(lines: list[pb.TailLine]) -> list[bytes]:
    return [one.line.data for one in lines]


async def test_followers_miss_nothing_while_the_log_moves_into_the_archive(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    # So small a cache that the slow one is always behind it.
    monkeypatch.setattr(stream_module, "CACHE_BYTES", 10_000)
    gate = asyncio.Event()

    async def slowly() -> None:
        await gate.wait()

    followers = [asyncio.create_task(logs.follow()) for _ in range(3)]
    slow = asyncio.create_task(logs.follow(slowly=slowly))
    for number in range(120):
        await logs.say(*(b"%d.%d " % (number, n) + b"x" * 100 for n in range(10)))
        if number % 10 == 9:
            await logs.archive(final=False)
    await logs.end()
    # Who reads is not held up by who does not, and is not told of the end by the archive alone.
    assert await asyncio.gather(*followers) == [logs.said] * 3
    await logs.archive()
    gate.set()
    assert await slow == logs.said
    assert len(await logs.objects()) == len(await logs.view.parts(logs.key.id)) > 5
    assert await logs.left() == 0
    assert logs.stream._cached <= 20_000


async def test_pages_are_the_same_before_and_after_archiving(logs: Logs) -> None:
    for number in range(60):
        await logs.say(*(b"line %d.%d " % (number, n) + b"y" * 60 for n in range(20)), stream=("stdout", "stderr")[number % 2], rank=number % 3,
                       at=1000.0 + number)  # fmt: skip
    every = await logs.lines()
    assert data_of(every) == logs.said
    cursors = [one.cursor for one in every]
    assert cursors == sorted(set(cursors))

    async def look() -> list[Any]:
        wanted = Filter(("stdout",), 0)
        seen: list[Any] = []
        for filtered in (ALL, wanted, Filter(("nothing",))):
            for after in (0, cursors[0], cursors[333], cursors[-1]):
                seen.append(await logs.reader.read(logs.key, filtered, Where(after), 50))
                seen.append(await logs.reader.newest(logs.key, filtered, Where(after), 50))
                seen.append(await logs.reader.newest(logs.key, filtered, Where(after, cursors[800]), 7))
        for line in (1, 2, 500, 1200):
            assert await logs.reader.ahead_of_line(logs.key, line) == cursors[line - 1] - 1
        with pytest.raises(NotFound, match="1200 lines"):
            await logs.reader.ahead_of_line(logs.key, 1201)
        for second in (0, 1000, 1030, 1059):
            ahead = await logs.reader.ahead_of_time(logs.key, 0, second * 1_000_000)
            seen.append(next(one.line.data for one in every if one.cursor > ahead))
        assert await logs.reader.ahead_of_time(logs.key, 0, 2_000_000_000) >= cursors[-1]
        for text, folded in ((b"line 7.7 ", False), (b"LINE 59.", True), (b"LINE", False)):
            seen.append(await logs.reader.search(logs.key, text, folded, ALL, 0, 15, 10.0))
            seen.append(await logs.reader.search(logs.key, text, folded, wanted, cursors[100], 1000, 10.0))
        return seen

    alive = await look()
    first, _ = alive[0]
    assert data_of(first) == logs.said[:50]
    assert data_of(alive[1]) == logs.said[-50:] and data_of(alive[2]) == logs.said[793:800]
    assert await logs.archive(final=False) > 2 and await logs.left() > 0  # the older part is archived, the rest is on the stream
    assert await look() == alive
    await logs.end()
    await logs.archive()
    assert await logs.left() == 0
    assert await look() == alive
    assert await logs.lines() == every
    assert await logs.lines(cursors[777]) == every[778:]


async def test_a_search_that_takes_long_says_where_to_go_on(logs: Logs) -> None:
    for number in range(10):
        await logs.say(b"%d " % number + b"z" * 30_000)
    await logs.end()
    await logs.archive()
    found, after, calls = [], 0, 0
    while True:
        lines, after = await logs.reader.search(logs.key, b"9 ", False, ALL, after, 10, 0.0)
        found += lines
        calls += 1
        if not after:
            break
    assert len(found) == 1 and calls > 2


async def test_any_bytes_and_a_million_empty_lines(logs: Logs) -> None:
    logs.archiver._part_bytes = 5 << 20
    odd = [b"\x00" * 10, bytes(range(256)), "ümläut ☃".encode(), b"\xff\xfe", b""]
    await logs.say(*odd)
    await logs.say(b"p" * (256 << 10), partial=True)
    await logs.say(b"q" * (44 << 10))
    empty = pb.LogChunk(lines=[pb.LogLine(stream="stdout")] * 8000).SerializeToString()
    for _ in range(125):
        await logs.trainer.jetstream().publish(subject_of(logs.key), empty)
    await logs.say(b"the end")
    for _ in range(2):
        blocks = [block.payload async for block in logs.reader.blocks(logs.key, ALL, Where())]
        assert all(len(payload) < 4 << 20 for payload in blocks)  # what a gRPC client takes unless it is told to take more
        lines = [*lines_of(b"".join(blocks[:3]))[:8], *lines_of(blocks[-1])[-1:]]
        assert sum(count(payload) for payload in blocks) == 1_000_008 and data_of(lines[:5]) == odd and lines[-1].line.data == b"the end"
        assert [len(one.line.data) for one in lines[5:8]] == [256 << 10, 44 << 10, 0] and lines[5].line.partial
        assert data_of((await logs.reader.search(logs.key, "☃".encode(), False, ALL, 0, 10, 10.0))[0]) == ["ümläut ☃".encode()]
        assert data_of((await logs.reader.search(logs.key, b"\x00\x00", False, ALL, 0, 10, 10.0))[0]) == [b"\x00" * 10]
        await logs.archive()


@pytest.mark.parametrize("crash", ["put_file", "get_file", "append", "purge_stream"])
async def test_a_crash_anywhere_in_archiving_costs_nothing(logs: Logs, monkeypatch: pytest.MonkeyPatch, crash: str) -> None:
    for number in range(30):
        await logs.say(*(b"%d.%d " % (number, n) + b"x" * 100 for n in range(20)))
    await logs.end()
    owner: Any = {"put_file": logs.store, "get_file": logs.store, "append": logs.log, "purge_stream": logs.log.js}[crash]
    inner, calls = getattr(owner, crash), 0

    async def crashing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = await inner(*arguments, **options)
        if calls in (1, 3):
            raise Unavailable("killed here, after it was done")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, crash, crashing)
        crashes = 0
        while True:
            # What a new process knows.
            logs.archiver = Archiver(logs.log, logs.store, logs.stream, logs.view, logs.archiver._folder, part_bytes=20_000)
            try:
                await logs.archive()
                break
            except Unavailable:
                crashes += 1
                assert data_of(await logs.lines()) == logs.said
    assert crashes == 2
    assert data_of(await logs.lines()) == logs.said
    assert await logs.left() == 0
    assert await logs.objects() == sorted(part.key for part in await logs.view.parts(logs.key.id))


async def test_nothing_is_purged_before_the_object_store_gives_it_back(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    await logs.say(b"only here")
    await logs.end()
    inner = logs.store.put_file

    async def spoiling(bucket: str, key: str, path: Path) -> Any:
        entry = await inner(bucket, key, path)
        await logs.store.put(bucket, key, b"something else")
        return entry

    async def full(*_: Any) -> Any:
        raise Unavailable("object store: no space left")

    for broken, message in ((full, "no space"), (spoiling, "does not give back")):
        monkeypatch.setattr(logs.store, "put_file", broken)
        with pytest.raises(Unavailable, match=message):
            await logs.archive()
        assert await logs.left() == 1
        # Who follows is not held up: the run is final, and all that it said was seen.
        assert await asyncio.wait_for(logs.follow(), 30) == [b"only here"]
    monkeypatch.setattr(logs.store, "put_file", inner)
    assert await logs.archive() == 1 and await logs.left() == 0
    assert data_of(await logs.lines()) == [b"only here"]


async def test_two_that_archive_the_same_log_leave_one_archive(logs: Logs) -> None:
    for number in range(30):
        await logs.say(*(b"%d.%d " % (number, n) + b"x" * 100 for n in range(20)))
    await logs.end()
    other = Archiver(logs.log, logs.store, logs.stream, logs.view, logs.archiver._folder, part_bytes=7_000)
    done = await asyncio.gather(
        *(one.archive("default", logs.key.id, final=True) for one in (logs.archiver, other)), return_exceptions=True
    )
    assert all(isinstance(result, (int, Unavailable)) for result in done), done
    await logs.archive()
    assert data_of(await logs.lines()) == logs.said
    assert await logs.left() == 0
    assert await logs.objects() == sorted(part.key for part in await logs.view.parts(logs.key.id))


async def test_what_comes_after_the_archive_is_not_lost(logs: Logs) -> None:
    await logs.say(b"in time")
    await logs.end()
    await logs.archive()
    await logs.say(b"late")
    assert data_of(await logs.lines()) == [b"in time", b"late"]
    await logs.archiver.look()
    assert await logs.left() == 0
    assert data_of(await logs.lines()) == [b"in time", b"late"]
    assert data_of(await logs.reader.newest(logs.key, ALL, Where(), 10)) == [b"in time", b"late"]


async def test_a_long_log_moves_away_while_its_run_lives(logs: Logs) -> None:
    for number in range(61):
        await logs.say(b"%d " % number + b"x" * 9_000)  # three of them are a part
    await logs.archiver.look()
    assert 0 < await logs.left() < 10
    assert data_of(await logs.lines()) == logs.said
    await logs.archiver.look()  # too little is left for a part: it stays
    assert 0 < await logs.left() < 10


async def test_a_log_whose_event_went_to_the_dead_letters_is_archived_all_the_same(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    await logs.say(b"only here")
    await logs.end()
    await logs.archiver.look()
    await logs.archiver.look()
    assert await logs.left() == 1  # its event may still be on its way
    monkeypatch.setattr(archiver_module, "_OVERDUE_SECONDS", 0.0)
    await logs.archiver.look()
    assert await logs.left() == 0
    assert data_of(await logs.lines()) == [b"only here"]


async def test_a_run_that_said_nothing(logs: Logs) -> None:
    await logs.end()
    assert await logs.follow() == []
    assert await logs.archive() == 1
    assert await logs.follow() == [] and await logs.lines() == []
    assert await logs.reader.newest(logs.key, ALL, Where(), 10) == []
    assert await logs.reader.read(logs.key, ALL, Where(), 10) == ([], 0)
    assert (await logs.view.state(logs.key.id)).complete


async def test_an_archive_of_an_older_version_is_read(logs: Logs, tmp_path: Path) -> None:
    await logs.say(*(b"%d" % n for n in range(3000)))
    every = await logs.lines()
    with (tmp_path / "old").open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for one in every:
            serialize_length_prefixed(one, stream)  # type: ignore[arg-type]
    entry = await logs.store.put_file("runs", f"{logs.key.id}/log.binpb.zst", tmp_path / "old")
    archived = ev.LogArchived(key=f"{logs.key.id}/log.binpb.zst", lines=3000, size=entry.size, sha256=entry.sha256)
    await logs.view.wait_for((await logs.log.append(logs.key, [archived], 0)).sequence)
    assert await logs.archive() == 0 and await logs.left() == 0
    assert await logs.lines() == every and await logs.lines(every[9].cursor) == every[10:]
    assert await logs.reader.read(logs.key, ALL, Where(every[9].cursor), 5) == (every[10:15], every[14].cursor)
    assert await logs.reader.newest(logs.key, ALL, Where(), 5) == every[-5:]
    assert (await logs.reader.search(logs.key, b"2999", False, ALL, 0, 5, 10.0))[0] == every[-1:]
    assert await logs.reader.ahead_of_line(logs.key, 11) == every[10].cursor - 1
    await logs.store.put("runs", archived.key, b"damaged")
    with pytest.raises(FailedPrecondition, match="damaged"):
        await logs.lines()


async def test_a_damaged_archive_is_refused_with_a_sentence(logs: Logs) -> None:
    await logs.say(*(b"%d" % n for n in range(100)))
    await logs.end()
    await logs.archive()
    (part,) = await logs.view.parts(logs.key.id)
    await logs.store.put("runs", part.key, b"\x00" * part.size)
    for work in (logs.lines(), logs.reader.newest(logs.key, ALL, Where(), 5), logs.reader.search(logs.key, b"x", False, ALL, 0, 5, 10.0)):
        with pytest.raises(FailedPrecondition, match=f"run {logs.key.id} is damaged"):
            await work


async def test_progress_is_shown_while_it_lasts_and_not_kept(logs: Logs) -> None:
    for percent in (10, 20, 30):
        await logs.say(b"%d%%" % percent, provisional=True)
    await logs.say(b"warning", stream="stderr")
    momentary = Filter(provisional=True)
    assert data_of(await logs.lines()) == [b"warning"]
    assert data_of(await logs.lines(wanted=momentary)) == [b"10%", b"20%", b"30%", b"warning"]
    for look in (logs.reader.read(logs.key, ALL, Where(), 10), logs.reader.newest(logs.key, ALL, Where(0, LAST_CURSOR), 10)):
        found = await look
        assert data_of(found[0] if isinstance(found, tuple) else found) == [b"30%", b"warning"]
    assert (await logs.reader.search(logs.key, b"%", False, ALL, 0, 10, 10.0))[0] == []
    await logs.say(b"100%")
    assert data_of((await logs.reader.read(logs.key, ALL, Where(), 10))[0]) == [b"warning", b"100%"]
    assert data_of((await logs.reader.read(logs.key, ALL, Where(), 1))[0]) == [b"warning"]
    await logs.end()
    await logs.archive()
    assert data_of(await logs.lines(wanted=momentary)) == [b"warning", b"100%"]


@pytest.fixture
async def served(logs: Logs) -> AsyncIterator[rpc.LogServiceAsyncStub]:
    """The service, asked over gRPC by an owner of the workspace `default`."""
    server = Server(SECRET)
    add(LogService(logs.log, logs.store, logs.view, logs.reader), server.server)
    port = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.LogServiceStub(channel)
    await server.stop(0)


def as_owner(workspace: str = "default") -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {issue(SECRET, Principal('tests', workspace, 'owner'))}"),)


async def test_a_run_that_the_view_does_not_know_yet_is_followed(logs: Logs, served: rpc.LogServiceAsyncStub) -> None:
    logs.view.apply = lambda event: None  # type: ignore[method-assign]  # it lags for ever
    await logs.runs.append(Key("default", "run", logs.key.id), [ev.RunSubmitted(submitted_by="tests")], 0)
    await logs.say(b"\xff early", b"")
    replies = [reply async for reply in served.Tail(pb.TailRequest(run_id=logs.key.id), metadata=as_owner())]
    assert [one.line.data for reply in replies for one in reply.lines] == logs.said
    for workspace, run_id in (("another", logs.key.id), ("default", new_id())):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.Read(pb.ReadRequest(run_id=run_id), metadata=as_owner(workspace), timeout=30)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND and run_id in (caught.value.details() or "")


async def test_who_follows_and_does_not_read_holds_up_nobody(logs: Logs, served: rpc.LogServiceAsyncStub) -> None:
    await logs.runs.append(Key("default", "run", logs.key.id), [ev.RunSubmitted(submitted_by="tests")], 0)
    stalled = served.Tail(pb.TailRequest(run_id=logs.key.id, follow=True), metadata=as_owner())
    await logs.say(b"first")
    reply: Any = await stalled.read()
    assert reply.lines[0].line.data == b"first"  # and nothing more
    reading = served.Tail(pb.TailRequest(run_id=logs.key.id, follow=True, streams=["std*"]), metadata=as_owner())
    for number in range(40):
        await logs.say(b"%d " % number + b"x" * 200_000)
    found = 0
    async for reply in reading:
        found += len(reply.lines)
        if found == len(logs.said):
            break
    reading.cancel()
    stalled.cancel()


async def test_requests_that_cannot_be_meant_are_refused_with_a_sentence(logs: Logs, served: rpc.LogServiceAsyncStub) -> None:
    await logs.runs.append(Key("default", "run", logs.key.id), [ev.RunSubmitted(submitted_by="tests")], 0)
    bad: list[tuple[Any, str]] = [
        (served.Read(pb.ReadRequest(run_id=logs.key.id, limit=10_001), metadata=as_owner()), "1 to 10000"),
        (served.Read(pb.ReadRequest(run_id=logs.key.id, limit=-1), metadata=as_owner()), "1 to 10000"),
        (served.Read(pb.ReadRequest(run_id=logs.key.id, after=-1), metadata=as_owner()), "cursor"),
        (served.Read(pb.ReadRequest(run_id=logs.key.id, before=-1), metadata=as_owner()), "cursor"),
        (served.Read(pb.ReadRequest(run_id=logs.key.id, line=-1), metadata=as_owner()), "from 1"),
        (served.Read(pb.ReadRequest(run_id=logs.key.id, line=1, newest=True), metadata=as_owner()), "not together"),
        (served.Search(pb.SearchRequest(run_id=logs.key.id), metadata=as_owner()), "1 to 1,000"),
    ]
    for call, message in bad:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and message in (caught.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.Download(pb.DownloadRequest(run_id=logs.key.id), metadata=as_owner())
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_all_parts_of_an_archive_are_linked(logs: Logs, served: rpc.LogServiceAsyncStub) -> None:
    for number in range(40):
        await logs.say(b"%d " % number + b"x" * 2_000)
    await logs.end()
    await logs.archive()
    reply = await served.Download(pb.DownloadRequest(run_id=logs.key.id), metadata=as_owner())
    found: list[pb.TailLine] = []
    for part in reply.parts:
        whole = (await asyncio.to_thread(urllib3.request, "GET", part.url)).data
        assert len(whole) == part.size and hashlib.sha256(whole).hexdigest() == part.sha256 and part.framed
        content = zstandard.ZstdDecompressor().stream_reader(whole, read_across_frames=True).read()
        found += lines_of(content)
    assert len(reply.parts) > 2 and reply.lines == len(found)
    assert found == await logs.lines()
