"""Moves logs from the stream into the object store: of runs that are final, and the older part of logs that grow long.

A log is archived in parts of bounded size, one after another: put, read back, said in an event, purged from the stream.
Which chunks make up a part, and what it is called, follows from the chunks alone. So after a crash, the next attempt
writes the same part over the unfinished one, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import nats.errors
from nats.js.errors import APIError

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import untoken
from alveary_core import scratch, telemetry
from alveary_core.aggregates import Aggregates
from alveary_core.errors import AlvearyError, Unavailable
from alveary_core.eventlog import LOGS, EventLog
from alveary_core.events import Event, Key
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_logs.archive import Writer
from alveary_logs.projection import LogsProjection
from alveary_logs.reader import BUCKET
from alveary_logs.stream import LogStream, subject_of
from alveary_logs.wire import LAST_PLACE, cursor_at, encode, provisional, sequence_of

# Content of a part, bytes: it is on the disk of this service, compressed, until it is stored.
PART_BYTES = 64 << 20
# The stream of logs is looked after this often, seconds.
_LOOK_SECONDS = 10.0
# A log that lives is moved away part by part when so many parts of it are on the stream. Once the stream holds that share
# of what it takes, parts are this much smaller.
_LONG, _PRESSED, _SMALLER = 2, 0.5, 8
# A log that is on the stream for so long after its run was final is archived without its event, seconds.
_OVERDUE_SECONDS = 600.0
# How many logs are moved in one look.
_AT_ONCE = 16


class _Moved(Exception):
    """Another replica archived a part of this log meanwhile."""


class Archiver:
    """Archives logs. `folder` is for the part that is being written."""

    def __init__(
        self, log: EventLog, store: ObjectStore, stream: LogStream, view: LogsProjection, folder: Path, part_bytes: int = PART_BYTES
    ) -> None:
        self._log, self._store, self._stream, self._view, self._folder = log, store, stream, view, folder
        self._part_bytes = part_bytes
        self._newest: Aggregates[ev.LogArchived] = Aggregates(log, "log", ev.LogArchived, _newest_part)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # How many messages a log had when there was too little of it for a part.
        self._short: dict[str, int] = {}
        # Since when a log of a final run has been seen on the stream.
        self._waiting: dict[str, float] = {}

    async def __call__(self, event: Event) -> None:
        """Handle a run's final event; idempotent. What the trainer said is acknowledged before the run becomes final."""
        await self.archive(event.key.workspace, event.key.id, final=True)

    async def archive(self, workspace: str, run_id: str, *, final: bool, part_bytes: int = 0) -> int:
        """Move what is on the stream of a run's log into the object store: all of it if the run is final, else parts that are full.

        `part_bytes`: content of a full part, 0: as usual.

        Returns:
            How many parts were written.

        Raises:
            Unavailable: the stream, the event log or the object store does not answer, or does not take more.
        """
        key = self._newest.key(workspace, run_id)
        lock = self._locks[run_id]
        try:
            async with lock:
                before, _ = await self._newest.load(key)
                # Again, where that was missed: by a crash after the event.
                await self._purge(key, before)
                if before.key and not before.index_size:
                    return 0  # of an older version, which has everything
                written = 0
                while (archived := await self._archive_part(key, final, part_bytes or self._part_bytes)) is not None:
                    written += 1
                    if not archived.open:
                        break
                return written
        finally:
            if not lock.locked():
                self._locks.pop(run_id, None)

    async def _archive_part(self, key: Key, final: bool, part_bytes: int) -> ev.LogArchived | None:
        """Archive the next part, unless another archiver did, and return it; None: there is none to archive now."""
        before, _ = await self._newest.load(key)
        done = bool(before.key) and not before.open
        subject = subject_of(key)
        newest = await self._stream.newest(subject)
        start = sequence_of(before.last) + 1
        if newest < start and (done or not final):
            return None
        async with scratch.folder("alveary-log-", self._folder) as folder:
            path = folder / "part"
            writer = await self._stream.run_aside(partial(Writer, path, before.preceding + before.lines))
            try:
                last = await self._fill(subject, writer, start, newest, part_bytes)
                full = writer.content_size >= part_bytes
                if not full and not final:
                    return None
                index_size, index_sha256 = await self._stream.run_aside(writer.close)
            finally:
                await self._stream.run_aside(writer.abandon)
            name = f"{key.id}/log-{start}-{max(last, start)}.binpb.zst"
            entry = await self._store.put_file(BUCKET, name, path)
            await self._verify(name, folder / "back", entry.sha256)
        archived = ev.LogArchived(
            key=name, lines=writer.lines, size=entry.size, sha256=entry.sha256, index_size=index_size, index_sha256=index_sha256,
            first=writer.first, last=cursor_at(last, LAST_PLACE) if last else before.last, preceding=before.preceding + before.lines,
            open=not final or last < newest,
        )  # fmt: skip

        def decide(state: ev.LogArchived) -> list[ev.LogArchived]:
            if state != before:
                raise _Moved
            return [archived]

        try:
            await self._newest.execute(key, decide)
        except _Moved:
            # No other part that begins here can be announced any more, so this object is superfluous, unless it is that part.
            if all(getattr(event.message, "key", "") != name for event in await self._log.read(key)):
                await self._store.delete(BUCKET, [name])
            return (await self._newest.load(key))[0]
        await self._purge(key, archived)
        telemetry.logger().info("log.archived", run=key.id, lines=archived.lines, size=archived.size, open=archived.open)
        return archived

    async def _fill(self, subject: str, writer: Writer, start: int, newest: int, part_bytes: int) -> int:
        """Write chunks from `start` on until the part is full or `newest` is in it; returns the last one's sequence, 0: none."""
        last = 0
        while last < newest and writer.content_size < part_bytes:
            messages = await self._stream.messages(subject, max(start, last + 1))
            if not messages:
                # Another replica archived and purged them, or this one was answered by a server that lags.
                raise Unavailable(f"{subject}: message {newest} was there a moment ago; it is looked for again")

            def write(messages: list[tuple[int, bytes]] = messages) -> int:
                written = 0
                for sequence, data in messages:
                    if sequence > newest or writer.content_size >= part_bytes:
                        break
                    writer.add(encode(sequence, data, provisional(data)))
                    written = sequence
                return written

            last = await self._stream.run_aside(write)
        return last

    async def _verify(self, name: str, path: Path, sha256: str) -> None:
        """Read a part back before the only other copy goes."""
        try:
            await self._store.get_file(BUCKET, name, path, sha256)
        except DigestMismatch as error:
            raise Unavailable(f"the object store does not give back what it took: {error}") from error

    async def _purge(self, key: Key, archived: ev.LogArchived) -> None:
        if not archived.key:
            return
        # An archive without an index, of an older version, has everything.
        below = sequence_of(archived.last) + 1 if archived.index_size else None
        try:
            await self._log.js.purge_stream(LOGS, seq=below, subject=subject_of(key))
        except (nats.errors.Error, APIError, TimeoutError, OSError) as error:
            raise Unavailable(f"the stream of logs is not purged: {error or type(error).__name__}") from error

    async def keep(self) -> None:
        """Look after the stream of logs, for ever: nothing of it may stay that is archived, and no run may fill it."""
        while True:
            try:
                await self.look()
            except (AlvearyError, nats.errors.Error, APIError, TimeoutError, OSError) as error:
                telemetry.logger().warning("logs.keep.retry", error=str(error) or type(error).__name__)
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Archive what came after a log was complete, and the older part of logs that are long."""
        info = await self._log.js.stream_info(LOGS, subjects_filter=">")
        state, subjects = info.state, info.state.subjects or {}
        pressed = state.bytes > _PRESSED * (info.config.max_bytes or 1 << 62) > 0
        part_bytes = self._part_bytes // _SMALLER if pressed else self._part_bytes
        self._short = {subject: count for subject, count in self._short.items() if subject in subjects}
        now = time.monotonic()
        waiting: dict[str, float] = {}
        moved = 0
        for subject, count in sorted(subjects.items(), key=lambda item: -item[1]):
            _, workspace, run_id = (untoken(part) for part in subject.split("."))
            known = await self._view.state(run_id)
            if known.final and not known.complete:
                waiting[subject] = self._waiting.get(subject, now)
            # Of a run that was final long ago, the event is with the dead letters, or lost: its log is archived all the same.
            all_of_it = known.complete or now - waiting.get(subject, now) > _OVERDUE_SECONDS
            # The size of one subject is not told: it is estimated, and looked at again only after it grew.
            size = count * state.bytes / max(state.messages, 1)
            long = not known.final and size > _LONG * part_bytes and count > self._short.get(subject, 0) * 1.25
            if moved < _AT_ONCE and (all_of_it or long):
                moved += 1
                await self._move(subject, count, workspace, run_id, final=all_of_it, part_bytes=part_bytes)
        self._waiting = waiting

    async def _move(self, subject: str, count: int, workspace: str, run_id: str, *, final: bool, part_bytes: int) -> None:
        try:
            if not await self.archive(workspace, run_id, final=final, part_bytes=part_bytes):
                self._short[subject] = count
        except (AlvearyError, nats.errors.Error, APIError, TimeoutError, OSError) as error:
            # The next one may succeed, and this one at the next look.
            telemetry.logger().warning("logs.move.retry", run=run_id, error=str(error) or type(error).__name__)


def _newest_part(before: ev.LogArchived, event: Event) -> ev.LogArchived:
    return event.message if isinstance(event.message, ev.LogArchived) else before
