"""Tail while a run lives, archive when it is final, Tail the same afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from nats.js.errors import NotFoundError

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2_grpc as rpc
from alveary_contracts.names import token
from alveary_core import auth, scratch
from alveary_core.aggregates import Aggregates
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound
from alveary_core.eventlog import LOGS, EventLog
from alveary_core.events import Event, Key
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_core.projection import Projection
from alveary_logs import archive
from alveary_logs.archive import lines_of, sequence_of

SUBJECTS = ("alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled")
_BATCH = 500
PAGE, MAX_PAGE = 1000, 10_000


class LogsProjection(Projection):
    """Which runs exist, which are final, which are archived."""

    subjects = ("alveary.*.run.*.submitted", "alveary.*.run.*.compacted", *SUBJECTS, "alveary.*.log.>")
    version = 2
    schema = """
    CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, workspace TEXT, final INTEGER DEFAULT 0, archive BLOB);
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        match event.message:
            case ev.RunSubmitted():
                self.db.execute("INSERT OR IGNORE INTO runs (run, workspace) VALUES (?,?)", (event.key.id, event.key.workspace))
            case ev.LogArchived() as archived:
                # It may come before the run's first event, where that was compacted: the row is made here then.
                self.db.execute(
                    "INSERT INTO runs (run, workspace, archive) VALUES (?,?,?) ON CONFLICT DO UPDATE SET archive=excluded.archive",
                    (event.key.id, event.key.workspace, archived.SerializeToString()),
                )
            case ev.RunCompacted():
                self.db.execute(
                    "INSERT INTO runs (run, workspace, final) VALUES (?,?,1) ON CONFLICT DO UPDATE SET final=1",
                    (event.key.id, event.key.workspace),
                )
            case _:
                self.db.execute("UPDATE runs SET final=1 WHERE run=?", (event.key.id,))

    async def archive(self, run_id: str) -> ev.LogArchived | None:
        """The archive of a run, where there is one."""
        row = await self.row("SELECT archive FROM runs WHERE run=?", (run_id,))
        return ev.LogArchived.FromString(row["archive"]) if row and row["archive"] is not None else None


class Archiver:
    """On a run's final event, all its lines become one object."""

    def __init__(self, log: EventLog, store: ObjectStore) -> None:
        self._log, self._store = log, store
        self._logs = Aggregates(log, "log", lambda: False, lambda _, __: True)

    async def __call__(self, event: Event) -> None:
        """Handle one event; idempotent. What the trainer said is acknowledged before the run becomes final."""
        key = self._logs.key(event.key.workspace, event.key.id)
        if (await self._logs.load(key))[0]:
            return
        subject = f"alveary-logs.{token(event.key.workspace)}.{token(event.key.id)}"
        name = f"{event.key.id}/log.binpb.zst"
        async with scratch.folder("alveary-log-") as folder:
            path = folder / "log"
            writer = archive.Writer(path)
            try:
                async with contextlib.aclosing(stored(self._log, subject)) as chunks:
                    async for lines in chunks:
                        await asyncio.to_thread(writer.add, lines)
            finally:
                await asyncio.to_thread(writer.close)
            entry = await self._store.put_file("runs", name, path)
        archived = ev.LogArchived(key=name, lines=writer.lines, size=entry.size, sha256=entry.sha256)
        await self._logs.execute(key, lambda done: [] if done else [archived])
        if writer.lines:
            await self._log.js.purge_stream(LOGS, seq=sequence_of(writer.last) + 1, subject=subject)


async def stored(log: EventLog, subject: str, start: int = 1) -> AsyncGenerator[list[pb.TailLine], None]:
    """All lines that the stream holds now for a run, chunk by chunk."""
    try:
        newest = (await log.js.get_last_msg(LOGS, subject)).seq or 0
    except NotFoundError:
        return
    if newest < start:
        return
    async with contextlib.aclosing(log.follow([subject], start, LOGS)) as stream:
        async for item in stream:
            if item is None:  # caught up: an archiver may have purged what was newest a moment ago
                break
            message, sequence = item
            yield list(lines_of(sequence, message.data))
            if sequence >= newest:
                break


class LogService(rpc.LogServiceServicer):
    """alveary.logs.v1.LogService."""

    def __init__(self, log: EventLog, store: ObjectStore, projection: LogsProjection) -> None:
        self._log, self._store, self._view = log, store, projection

    async def _require(self, run_id: str) -> str:
        who = auth.require("reader")
        # A run that was submitted a moment ago may not be in the view yet.
        await self._view.wait_for(0)
        for _ in range(100):
            row = await self._view.row("SELECT workspace FROM runs WHERE run=?", (run_id,))
            if row is not None and row["workspace"] == who.workspace:
                return who.workspace
            await asyncio.sleep(0.02)
        raise NotFound("run", run_id)

    async def Tail(self, request: pb.TailRequest, context: Any) -> AsyncIterator[pb.TailResponse]:
        if request.after < 0:
            raise InvalidArgument(("after", "a cursor that Tail gave, or 0"))
        workspace = await self._require(request.run_id)
        last = request.after
        if await self._view.archive(request.run_id) is None:
            async for lines in self._live(workspace, request):
                last = lines[-1].cursor
                wanted = [one for one in lines if self._wanted(one, request)]
                if wanted:
                    yield pb.TailResponse(lines=wanted)
        archived = await self._archive_of(workspace, request.run_id)
        if archived is None:
            return
        async with contextlib.aclosing(self._archived(request.run_id, archived, last)) as batches:
            async for lines in batches:
                wanted = [one for one in lines if self._wanted(one, request)]
                if wanted:
                    yield pb.TailResponse(lines=wanted)

    async def _archive_of(self, workspace: str, run_id: str) -> ev.LogArchived | None:
        """The archive, asked of the log itself where the view has none: lines are purged once it is there."""
        known = await self._view.archive(run_id)
        if known is None:
            for event in await self._log.read(Key(workspace, "log", run_id)):
                known = event.message if isinstance(event.message, ev.LogArchived) else None
        return known

    async def _archived(self, run_id: str, archived: ev.LogArchived, after: int) -> AsyncGenerator[list[pb.TailLine], None]:
        """Lines of an archive behind a cursor, a batch at a time."""
        async with scratch.folder("alveary-log-") as folder:
            path = folder / "log"
            try:
                await self._store.get_file("runs", archived.key, path, archived.sha256)
            except DigestMismatch as error:
                raise FailedPrecondition(f"the archived log of run {run_id} is damaged: {error}", f"run/{run_id}") from error
            lines = archive.read(path)
            try:
                while batch := await asyncio.to_thread(lambda: list(islice(lines, _BATCH))):
                    if batch[-1].cursor > after:
                        yield [line for line in batch if line.cursor > after]
            finally:
                lines.close()  # type: ignore[attr-defined]

    async def _now(self, run_id: str, after: int) -> AsyncGenerator[list[pb.TailLine], None]:
        """All lines there are now behind a cursor, wherever they are."""
        workspace = await self._require(run_id)
        last = after
        if await self._view.archive(run_id) is None:
            subject = f"alveary-logs.{token(workspace)}.{token(run_id)}"
            async with contextlib.aclosing(stored(self._log, subject, max(sequence_of(after), 1))) as chunks:
                async for lines in chunks:
                    fresh = [line for line in lines if line.cursor > last]
                    if fresh:
                        last = fresh[-1].cursor
                        yield fresh
        archived = await self._archive_of(workspace, run_id)
        if archived is not None:  # since before, or since a moment ago
            async with contextlib.aclosing(self._archived(run_id, archived, last)) as batches:
                async for lines in batches:
                    yield lines

    async def _page(
        self, request: pb.ReadRequest | pb.SearchRequest, keep: Callable[[pb.TailLine], bool], *, newest: bool = False
    ) -> tuple[list[pb.TailLine], int]:
        limit = request.limit or PAGE
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidArgument(("limit", f"{request.limit}: 1 to {MAX_PAGE}"))
        if request.after < 0:
            raise InvalidArgument(("after", "a cursor that the service gave, or 0"))
        found: deque[pb.TailLine] = deque(maxlen=limit if newest else None)
        async with contextlib.aclosing(self._now(request.run_id, request.after)) as batches:
            async for lines in batches:
                for line in lines:
                    if not (self._wanted(line, request) and keep(line)):
                        continue
                    if not newest and len(found) == limit:
                        return list(found), found[-1].cursor
                    found.append(line)
        return list(found), 0

    async def Read(self, request: pb.ReadRequest, context: Any) -> pb.ReadResponse:
        lines, following = await self._page(request, lambda _: True, newest=request.newest)
        return pb.ReadResponse(lines=lines, next=following)

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        if not 1 <= len(request.text) <= 1000:
            raise InvalidArgument(("text", f"{len(request.text)} characters: 1 to 1,000 are looked for"))
        text = request.text.encode()
        if request.ignore_case:
            small = text.lower()
            lines, following = await self._page(request, lambda one: small in one.line.data.lower())
        else:
            lines, following = await self._page(request, lambda one: text in one.line.data)
        return pb.SearchResponse(lines=lines, next=following)

    async def _live(self, workspace: str, request: pb.TailRequest) -> AsyncIterator[list[pb.TailLine]]:
        """Lines of the stream; ends when caught up without follow, or when the archive has taken over."""
        subject = f"alveary-logs.{token(workspace)}.{token(request.run_id)}"
        start = max(sequence_of(request.after), 1)
        queue: asyncio.Queue[list[pb.TailLine] | None] = asyncio.Queue(maxsize=64)

        async def feed() -> None:
            async with contextlib.aclosing(self._log.follow([subject], start, LOGS)) as stream:
                async for item in stream:
                    lines = None if item is None else [x for x in lines_of(item[1], item[0].data) if x.cursor > request.after]
                    if lines is None or lines:
                        await queue.put(lines)

        async def archived() -> None:
            async for _ in self._view.changes(request.run_id, timeout=5):
                if await self._view.archive(request.run_id) is not None:
                    return

        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(feed()), asyncio.create_task(archived())]
        try:
            while True:
                get = asyncio.create_task(queue.get())
                tasks.append(get)
                await asyncio.wait({get, *tasks[:2]}, return_when=asyncio.FIRST_COMPLETED)
                tasks.pop()
                if get.done():
                    lines = get.result()
                    if lines is not None:
                        yield lines
                    elif not request.follow:
                        return
                    continue
                get.cancel()
                if tasks[0].done():
                    tasks[0].result()
                return  # archived: the caller goes on from there, behind the last cursor
        finally:
            for task in tasks:
                task.cancel()

    @staticmethod
    def _wanted(line: pb.TailLine, request: pb.TailRequest | pb.ReadRequest | pb.SearchRequest) -> bool:
        if request.HasField("rank") and line.line.rank != request.rank:
            return False
        patterns: Iterable[str] = request.streams
        return not request.streams or any(fnmatchcase(line.line.stream, p) for p in patterns)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> pb.DownloadResponse:
        await self._require(request.run_id)
        archived = await self._view.archive(request.run_id)
        if archived is None:
            raise FailedPrecondition(f"run {request.run_id} is not final yet: its log is not archived; use Tail", f"run/{request.run_id}")
        return pb.DownloadResponse(url=self._store.get_url("runs", archived.key), lines=archived.lines, sha256=archived.sha256)
