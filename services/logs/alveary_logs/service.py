"""Tail while a run lives, archive when it is final, Tail the same afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable
from fnmatch import fnmatchcase
from typing import Any

from nats.js.errors import NotFoundError

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2_grpc as rpc
from alveary_contracts.names import token
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound
from alveary_core.eventlog import LOGS, EventLog
from alveary_core.events import Event
from alveary_core.objectstore import ObjectStore
from alveary_core.projection import Projection
from alveary_logs.archive import compress, decompress, lines_of, sequence_of

SUBJECTS = ("alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled")
_BATCH = 500


class LogsProjection(Projection):
    """Which runs exist, which are final, which are archived."""

    subjects = ("alveary.*.run.*.submitted", *SUBJECTS, "alveary.*.log.>")
    schema = """
    CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, workspace TEXT, final INTEGER DEFAULT 0, archive BLOB);
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        match event.message:
            case ev.RunSubmitted():
                self.db.execute("INSERT OR IGNORE INTO runs (run, workspace) VALUES (?,?)", (event.key.id, event.key.workspace))
            case ev.LogArchived() as archived:
                self.db.execute("UPDATE runs SET archive=? WHERE run=?", (archived.SerializeToString(), event.key.id))
            case _:
                self.db.execute("UPDATE runs SET final=1 WHERE run=?", (event.key.id,))

    def archive(self, run_id: str) -> ev.LogArchived | None:
        """The archive of a run, where there is one."""
        row = self.row("SELECT archive FROM runs WHERE run=?", (run_id,))
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
        lines = await read_all(self._log, subject)
        data = await asyncio.to_thread(compress, lines)
        name = f"{event.key.id}/log.binpb.zst"
        await self._store.put("runs", name, data)
        archived = ev.LogArchived(key=name, lines=len(lines), size=len(data), sha256=hashlib.sha256(data).hexdigest())
        await self._logs.execute(key, lambda done: [] if done else [archived])
        if lines:
            await self._log.js.purge_stream(LOGS, seq=sequence_of(lines[-1].cursor) + 1, subject=subject)


async def read_all(log: EventLog, subject: str) -> list[pb.TailLine]:
    """All lines that the stream holds now for a run."""
    lines: list[pb.TailLine] = []
    try:
        newest = (await log.js.get_last_msg(LOGS, subject)).seq or 0
    except NotFoundError:
        return lines
    async with contextlib.aclosing(log.follow([subject], 1, LOGS)) as stream:
        async for item in stream:
            if item is None:
                continue
            message, sequence = item
            lines += lines_of(sequence, message.data)
            if sequence >= newest:
                break
    return lines


class LogService(rpc.LogServiceServicer):
    """alveary.logs.v1.LogService."""

    def __init__(self, log: EventLog, store: ObjectStore, projection: LogsProjection) -> None:
        self._log, self._store, self._view = log, store, projection

    async def _require(self, run_id: str) -> str:
        who = auth.require("reader")
        # A run that was submitted a moment ago may not be in the view yet.
        await self._view.wait_for(0)
        for _ in range(100):
            row = self._view.row("SELECT workspace FROM runs WHERE run=?", (run_id,))
            if row is not None and row["workspace"] == who.workspace:
                return who.workspace
            await asyncio.sleep(0.02)
        raise NotFound("run", run_id)

    async def Tail(self, request: pb.TailRequest, context: Any) -> AsyncIterator[pb.TailResponse]:
        if request.after < 0:
            raise InvalidArgument(("after", "a cursor that Tail gave, or 0"))
        workspace = await self._require(request.run_id)
        last = request.after
        if self._view.archive(request.run_id) is None:
            async for lines in self._live(workspace, request):
                last = lines[-1].cursor
                wanted = [one for one in lines if self._wanted(one, request)]
                if wanted:
                    yield pb.TailResponse(lines=wanted)
        archive = self._view.archive(request.run_id)
        if archive is None:
            return
        data = await self._store.get("runs", archive.key)
        if hashlib.sha256(data).hexdigest() != archive.sha256:
            raise FailedPrecondition(f"the archived log of run {request.run_id} is damaged: its digest is another")
        batch: list[pb.TailLine] = []
        for line in decompress(data):
            if line.cursor > last and self._wanted(line, request):
                batch.append(line)
            if len(batch) >= _BATCH:
                yield pb.TailResponse(lines=batch)
                batch = []
        if batch:
            yield pb.TailResponse(lines=batch)

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
            async for _ in self._view.changes(timeout=5):
                if self._view.archive(request.run_id) is not None:
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
    def _wanted(line: pb.TailLine, request: pb.TailRequest) -> bool:
        if request.HasField("rank") and line.line.rank != request.rank:
            return False
        patterns: Iterable[str] = request.streams
        return not request.streams or any(fnmatchcase(line.line.stream, p) for p in patterns)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> pb.DownloadResponse:
        await self._require(request.run_id)
        archive = self._view.archive(request.run_id)
        if archive is None:
            raise FailedPrecondition(f"run {request.run_id} is not final yet: its log is not archived; use Tail", f"run/{request.run_id}")
        return pb.DownloadResponse(url=self._store.get_url("runs", archive.key), lines=archive.lines, sha256=archive.sha256)
