"""Copies streams behind themselves; verifies and restores them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from alveary_archiver.segments import Damaged, Record, Segment, chain, mergeable, pack, unpack
from alveary_core import telemetry
from alveary_core.errors import FailedPrecondition
from alveary_core.eventlog import METRICS, EventLog, ensure_streams
from alveary_core.events import STREAM
from alveary_core.objectstore import ObjectStore

BUCKET = "archive"
STREAMS = (STREAM, METRICS)
SUBJECTS = {STREAM: "alveary.>", METRICS: "alveary-metrics.>"}
# A segment is written when it has this many messages, or this long after its first one, seconds.
FULL, LINGER = 10_000, 5.0
# So many neighbours of fewer sequences than FULL become one.
MERGE = 60
# Stands in a restored stream for sequences that were purged, until it is purged itself.
_FILLER = {STREAM: "alveary.-.restore.-.filler", METRICS: "alveary-metrics.-.filler"}


async def covered(store: ObjectStore, stream: str) -> list[Segment]:
    """What the copy holds, in order.

    Raises:
        Damaged: a part is missing.
    """
    keys = await store.keys(BUCKET, f"{stream}/")
    return chain(found for key in keys if (found := Segment.of(key)) is not None)


async def records(store: ObjectStore, segments: list[Segment]) -> AsyncIterator[Record]:
    """All records of segments, in order."""
    for segment in segments:
        data = await store.get(BUCKET, segment.key)
        for record in await asyncio.to_thread(lambda segment=segment, data=data: list(unpack(segment, data))):  # type: ignore[misc]
            yield record


class Archiver:
    """Copies one stream. One runs at a time; a second one only repeats what the first did."""

    def __init__(
        self, log: EventLog, store: ObjectStore, stream: str, linger: float = LINGER, full: int = FULL, merge: int = MERGE
    ) -> None:
        self._log, self._store, self._stream = log, store, stream
        self._linger, self._full, self._merge = linger, full, merge
        self.position = 0

    async def run(self) -> None:
        """For ever.

        Raises:
            FailedPrecondition: the stream is another one than that which was copied: it must be restored first.
        """
        segments = await covered(self._store, self._stream)
        self.position = segments[-1].last if segments else 0
        await self._same_stream(segments)
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
                        segments.append(await self._write(batch, reached))
                        batch = []
                        segments = await self._tidy(segments)
            finally:
                if pending is not None:
                    pending.cancel()
                    await asyncio.gather(pending, return_exceptions=True)

    async def _same_stream(self, segments: list[Segment]) -> None:
        if not segments:
            return
        state = (await self._log.info(self._stream)).state
        lost = state.last_seq < self.position
        if not lost and state.first_seq <= self.position:
            newest = [r async for r in records(self._store, segments[-1:])]
            with contextlib.suppress(NotFoundError):  # purged since
                there = await self._log.js.get_msg(self._stream, seq=newest[-1].sequence)
                lost = there.data != newest[-1].data or there.subject != newest[-1].subject
        if lost:
            raise FailedPrecondition(
                f"the stream {self._stream} (at {state.last_seq}) is not the one that was copied (to {self.position}): its data was lost. "
                "Stop the services, and restore it with `alveary admin restore` before anything new is written"
            )

    async def _write(self, batch: list[Record], last: int) -> Segment:
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
            raise FailedPrecondition(f"{stream}: {record.subject} went to {reached} instead of {record.sequence}: somebody else is writing")
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
