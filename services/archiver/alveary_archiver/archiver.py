"""Copies streams behind themselves; verifies and restores them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence

from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from alveary_archiver.segments import Damaged, Record, Segment, chain, mergeable, pack, unpack
from alveary_core import telemetry
from alveary_core.errors import FailedPrecondition
from alveary_core.eventlog import LOG_FORMAT, METRICS, EventLog, ensure_streams
from alveary_core.events import STREAM
from alveary_core.objectstore import ObjectStore

BUCKET = "archive"
STREAMS = (STREAM, METRICS)
SUBJECTS = {STREAM: "alveary.>", METRICS: "alveary-metrics.>"}
# A segment is written when it has this many messages, or this long after its first one, seconds.
FULL, LINGER = 10_000, 5.0
# So many neighbours of fewer sequences than FULL become one.
MERGE = 60
# Deleted runs that are remembered.
_REMEMBERED = 10_000
# Stands in a restored stream for sequences that were purged, until it is purged itself.
_FILLER = {STREAM: "alveary.-.restore.-.filler", METRICS: "alveary-metrics.-.filler"}


async def covered(store: ObjectStore, stream: str) -> list[Segment]:
    """What the copy holds, in order.

    Raises:
        Damaged: a part is missing.
        FailedPrecondition: the copy is of a log of another format.
    """
    keys = await store.keys(BUCKET, f"{stream}/")
    segments = chain(found for key in keys if (found := Segment.of(key)) is not None)
    formats = [key.rpartition("/")[2] for key in await store.keys(BUCKET, f"format/{stream}/")]
    if segments and formats != [str(LOG_FORMAT)]:
        raise FailedPrecondition(
            f"the copy of {stream} has format {', '.join(formats) or 0}, and this version of Alveary reads format {LOG_FORMAT}: "
            "run the version that wrote it"
        )
    return segments


async def records(store: ObjectStore, segments: list[Segment]) -> AsyncIterator[Record]:
    """All records of segments, in order."""
    for segment in segments:
        data = await store.get(BUCKET, segment.key)
        for record in await asyncio.to_thread(lambda segment=segment, data=data: list(unpack(segment, data))):  # type: ignore[misc]
            yield record


def _run_of(subject: str) -> str:
    """The run that a message belongs to alone; empty: none."""
    parts = subject.split(".")
    if parts[0] == "alveary-metrics":
        return parts[-1]
    if len(parts) < 4 or parts[2] not in ("run", "placement", "attempt", "log"):
        return ""
    return parts[3].rpartition("-")[0] if parts[2] == "attempt" else parts[3]


def _deleted(subject: str) -> str:
    """The run that a message is the tombstone of; empty: it is none."""
    parts = subject.split(".")
    return parts[3] if len(parts) == 5 and parts[2] == "run" and parts[4] == "deleted" else ""


def _without(segment: Segment, data: bytes, run: str) -> tuple[list[Record], int]:
    """The records of a segment but those of a run, its tombstone excepted; and how many there were."""
    every = list(unpack(segment, data))
    return [r for r in every if _run_of(r.subject) != run or _deleted(r.subject)], len(every)


async def same_stream(log: EventLog, stream: str, store: ObjectStore, segments: Sequence[Segment]) -> None:
    """Make sure that the stream is the one that was copied to `segments`.

    Raises:
        FailedPrecondition: it is another one.
    """
    if not segments:
        return
    position = segments[-1].last
    state = (await log.info(stream)).state
    lost = state.last_seq < position
    if not lost and state.first_seq <= position:
        newest = [r async for r in records(store, list(segments[-1:]))]
        # All of it may have been erased; or it was purged since.
        with contextlib.suppress(NotFoundError, IndexError):
            there = await log.js.get_msg(stream, seq=newest[-1].sequence)
            lost = there.data != newest[-1].data or there.subject != newest[-1].subject
    if lost:
        raise FailedPrecondition(
            f"the stream {stream} (at {state.last_seq}) is not the one that was copied (to {position}): its data was lost. "
            "Stop the services, and restore it with `alveary admin restore` before anything new is written"
        )


class Archiver:
    """Copies one stream. One runs at a time; a second one only repeats what the first did."""

    def __init__(
        self, log: EventLog, store: ObjectStore, stream: str, linger: float = LINGER, full: int = FULL, merge: int = MERGE
    ) -> None:
        self._log, self._store, self._stream = log, store, stream
        self._linger, self._full, self._merge = linger, full, merge
        self.position = 0
        self._segments: list[Segment] = []
        # One at a time changes what is copied.
        self._writing = asyncio.Lock()
        # Runs that were deleted while this process lives: what comes late of them is not copied.
        self._deleted: OrderedDict[str, None] = OrderedDict()
        # Archivers of other streams, which erase when this one hears that a run was deleted.
        self.others: Sequence[Archiver] = ()

    async def run(self) -> None:
        """For ever.

        Raises:
            FailedPrecondition: the stream is another one than that which was copied: it must be restored first.
        """
        self._segments = segments = await covered(self._store, self._stream)
        if not segments:
            await self._store.put(BUCKET, f"format/{self._stream}/{LOG_FORMAT}", b"")
        self.position = segments[-1].last if segments else 0
        await same_stream(self._log, self._stream, self._store, segments)
        batch: list[Record] = []
        reached, since = self.position, 0.0
        async with contextlib.aclosing(self._log.follow([SUBJECTS[self._stream]], self.position + 1, self._stream)) as stream:
            arriving = aiter(stream)
            pending: asyncio.Future[tuple[Msg, int] | None] | None = None
            try:
                while True:
                    pending = pending or asyncio.ensure_future(anext(arriving))
                    wait = max(self._linger - (time.monotonic() - since), 0.0) if batch else None
                    await asyncio.wait({pending}, timeout=wait)
                    if pending.done():
                        item, pending = pending.result(), None
                        if item is not None:
                            message, reached = item
                            since = since if batch else time.monotonic()
                            batch.append(Record(reached, message.subject, tuple((message.headers or {}).items()), message.data))
                    if batch and (len(batch) >= self._full or time.monotonic() - since >= self._linger):
                        for run in [name for r in batch if (name := _deleted(r.subject))]:
                            # Before the tombstone counts as copied: after a death in between it is read, and all this done, again.
                            for archiver in (self, *self.others):
                                await archiver.erase(run)
                        async with self._writing:
                            self._segments.append(await self._write(batch, reached))
                            self._segments = await self._tidy(self._segments)
                        batch = []
            finally:
                if pending is not None:
                    pending.cancel()
                    await asyncio.gather(pending, return_exceptions=True)

    async def erase(self, run: str) -> None:
        """Take everything of a run but its tombstone out of the copy."""
        self._deleted[run] = None
        while len(self._deleted) > _REMEMBERED:
            self._deleted.popitem(last=False)
        async with self._writing:
            for segment in await covered(self._store, self._stream):
                data = await self._store.get(BUCKET, segment.key)
                kept, count = await asyncio.to_thread(_without, segment, data, run)
                if len(kept) < count:
                    made, data = await asyncio.to_thread(pack, self._stream, segment.after, segment.last, kept)
                    await self._store.put(BUCKET, made.key, data)
                    await self._store.delete(BUCKET, [segment.key])
            # Where a death came between the two, both are there, and one of them is not in the chain.
            self._segments = await covered(self._store, self._stream)
            valid = {s.key for s in self._segments}
            keys = await self._store.keys(BUCKET, f"{self._stream}/")
            await self._store.delete(BUCKET, [k for k in keys if Segment.of(k) is not None and k not in valid])
        telemetry.logger().info("archive.erased", stream=self._stream, run=run)

    async def _write(self, batch: list[Record], last: int) -> Segment:
        batch = [r for r in batch if not (self._deleted and _run_of(r.subject) in self._deleted and not _deleted(r.subject))]
        segment, data = await asyncio.to_thread(pack, self._stream, self.position, last, batch)
        await self._store.put(BUCKET, segment.key, data)
        self.position = last
        telemetry.COPIED.labels(self._stream).set(last)
        telemetry.logger().debug("archived", stream=self._stream, last=last, events=len(batch))
        return segment

    async def _tidy(self, segments: list[Segment]) -> list[Segment]:
        """Merge many small neighbours into one; they are deleted once it is there."""
        small = mergeable(segments, self._full, self._merge)
        if not small:
            return segments
        together = [r async for r in records(self._store, small)]
        merged, data = await asyncio.to_thread(pack, self._stream, small[0].after, small[-1].last, together)
        await self._store.put(BUCKET, merged.key, data)
        await self._store.delete(BUCKET, [s.key for s in small])
        return [*segments[: -len(small)], merged]


async def verify(log: EventLog, store: ObjectStore, stream: str, say: Callable[[str], None]) -> None:
    """Compare a stream with its copy.

    Raises:
        Damaged: they differ, and where.
    """
    segments = await covered(store, stream)
    last = segments[-1].last if segments else 0
    state = (await log.info(stream)).state
    # Both in order, one beside the other: neither is ever whole in memory.
    copied = records(store, segments)
    record = await anext(copied, None)
    compared = alone = 0
    if state.messages and state.first_seq <= last:
        async with contextlib.aclosing(log.follow([SUBJECTS[stream]], 1, stream)) as messages:
            async for item in messages:
                if item is None:
                    break
                message, sequence = item
                if sequence > last:
                    break
                while record is not None and record.sequence < sequence:
                    alone += 1
                    record = await anext(copied, None)
                if record is None or record.sequence != sequence:
                    raise Damaged(f"{stream}: {message.subject} at {sequence} is not in the copy")
                if (record.subject, record.data) != (message.subject, message.data):
                    raise Damaged(f"{stream}: {message.subject} at {sequence} is another in the copy")
                compared += 1
                record = await anext(copied, None)
    while record is not None:
        alone += 1
        record = await anext(copied, None)
    behind = max(state.last_seq - last, 0)
    say(f"{stream}: {compared} messages are the same, {alone} are in the copy alone, {behind} are not copied yet")


async def restore(log: EventLog, store: ObjectStore, say: Callable[[str], None], progress: Callable[[int], None] = lambda _: None) -> None:
    """Rebuild the streams from their copy on a server that has none; sequences stay what they were.

    Raises:
        FailedPrecondition: a stream is there and not empty.
        Damaged: the copy is.
    """
    chains = {stream: await covered(store, stream) for stream in STREAMS}
    for stream in STREAMS:
        try:
            state = (await log.info(stream)).state
        except NotFoundError:
            continue
        if state.last_seq:
            raise FailedPrecondition(f"the stream {stream} is not empty (at {state.last_seq}): restore writes into an empty server alone")
    await ensure_streams(log.connection)
    for stream in STREAMS:
        count = await _restore(log, store, stream, chains[stream], progress)
        say(f"{stream}: {count} messages restored, up to sequence {chains[stream][-1].last if chains[stream] else 0}")


async def _restore(log: EventLog, store: ObjectStore, stream: str, segments: list[Segment], progress: Callable[[int], None]) -> int:
    count, reached = 0, 0
    async for record in records(store, segments):
        reached = await _fill(log, stream, reached, record.sequence - 1)
        # What the message expected of the log before it held then; here the order is given.
        headers = {k: v for k, v in record.headers if not k.startswith("Nats-Expected-")}
        reached = (await log.js.publish(record.subject, record.data, headers=headers)).seq
        if reached != record.sequence:
            raise FailedPrecondition(f"{stream}: {record.subject} went to {reached} instead of {record.sequence}: another writer is active")
        count += 1
        progress(count)
    if segments:
        await _fill(log, stream, reached, segments[-1].last)
    await log.js.purge_stream(stream, subject=_FILLER[stream])
    return count


async def _fill(log: EventLog, stream: str, reached: int, wanted: int) -> int:
    """Take up sequences that were purged."""
    while reached < wanted:
        burst = min(wanted - reached, 500)
        done = await asyncio.gather(*(log.js.publish(_FILLER[stream], b"{}") for _ in range(burst)))
        reached = max(d.seq for d in done)
    return reached
