"""One log, wherever its lines are: archived parts and the stream read as one, with cursors that stay what they are."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_core import scratch
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_logs import archive
from alveary_logs.archive import last_of
from alveary_logs.projection import LogsProjection
from alveary_logs.stream import Chunk, LogStream, Overtaken, subject_of
from alveary_logs.wire import LAST_CURSOR, LAST_PLACE, Filter, cursor_at, encode, find, lines_of, select, sequence_of, settled

T = TypeVar("T")
BUCKET = "runs"
# Frames and indexes that are kept for who comes next, bytes of content.
_FRAME_CACHE, _INDEX_CACHE = 16 << 20, 16 << 20
# What one read of the object store brings at most where frames are read one after another: compressed, and of content for
# a follower, who holds it, and for a search, which does not. And how many such reads are under way.
_GROUP_BYTES, _TAIL_CONTENT, _SEARCH_CONTENT, _AHEAD = 4 << 20, 2 << 20, 16 << 20, 3
# How often a follower looks by itself, seconds: a sign that there is more may be lost with a connection.
_LOOK_SECONDS = 5.0
_RESTARTS = 20


@dataclass(slots=True, frozen=True)
class Block:
    """Some consecutive lines, as a serialized TailResponse; `last` is a cursor at or behind the last line of what was looked at."""

    payload: bytes
    last: int


@dataclass(slots=True, frozen=True)
class Where:
    """Between which cursors lines are wanted; neither is among them."""

    after: int = 0
    before: int = LAST_CURSOR


Contents = Iterable[tuple[pb.LogFrame, bytes]]


class _Cache:
    """The most recently used of what was read, by name, bounded in bytes; who asks at the same time waits for one read."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._size = capacity, 0
        self._known: OrderedDict[object, tuple[asyncio.Task[object], int]] = OrderedDict()

    async def get(self, name: object, size: int, read: Callable[[], Awaitable[T]]) -> T:
        known = self._known.get(name)
        if known is not None and known[0].done() and (known[0].cancelled() or known[0].exception() is not None):
            self._size -= self._known.pop(name)[1]
        if name not in self._known:

            async def work() -> object:
                return await read()

            self._known[name] = (asyncio.create_task(work()), size)
            self._size += size
            while self._size > self._capacity and len(self._known) > 1:
                _, (_, freed) = self._known.popitem(last=False)
                self._size -= freed
        self._known.move_to_end(name)
        task = self._known[name][0]
        return cast(T, await asyncio.shield(task))


class LogReader:
    """Reads logs. `folder` is for temporary files: archives of older versions are read from one."""

    def __init__(self, stream: LogStream, store: ObjectStore, view: LogsProjection, folder: Path) -> None:
        self._stream, self._store, self._view, self._folder = stream, store, view, folder
        self._indexes, self._frames = _Cache(_INDEX_CACHE), _Cache(_FRAME_CACHE)

    # ---- forwards -------------------------------------------------------------------------------------------------

    async def blocks(self, key: Key, wanted: Filter, where: Where, follow: bool = False, most: int = 0) -> AsyncGenerator[Block]:
        """All lines that are wanted, in order; ends when there are no more now, with `follow` when there never will be.

        A block may have no more than the first `most` of its lines: for callers that need no more in all.

        Raises:
            FailedPrecondition: an archived part is damaged.
            Unavailable: the stream or the object store does not answer.
        """
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(self._stream.watch(key)) if follow else None
            position = where.after
            while True:
                # A run that was final before the stream is looked at has said all: then that look is the last one.
                ticket, state = watch.ticket() if watch else None, await self._view.state(key.id, position)
                for part in state.parts:
                    if part.lines:
                        async with contextlib.aclosing(self._part(key, part, wanted, where, position, most)) as blocks:
                            async for block in blocks:
                                yield block
                    position = max(position, last_of(part))
                try:
                    chunks = await self._stream.page(key, position, wanted)
                except Overtaken as event:
                    await self._view.wait_for(event.sequence)
                    continue
                if chunks:
                    payload = await self._joined(chunks, wanted, position, where)
                    position = cursor_at(chunks[-1].sequence, LAST_PLACE)
                    yield Block(payload, position)
                elif watch is None or state.final:
                    return
                else:
                    assert ticket is not None
                    await watch.wait(ticket, _LOOK_SECONDS)

    async def _joined(self, chunks: list[Chunk], wanted: Filter, position: int, where: Where) -> bytes:
        first = chunks[0]
        if cursor_at(first.sequence, 0) >= position and where.before > cursor_at(chunks[-1].sequence, LAST_PLACE):
            return b"".join(chunk.select(wanted) for chunk in chunks)
        joined = b"".join(chunk.whole(wanted) for chunk in chunks)
        return await self._stream.run_aside(partial(select, joined, wanted, position, where.before))

    async def _part(self, key: Key, part: ev.LogArchived, wanted: Filter, where: Where, after: int, most: int) -> AsyncGenerator[Block]:
        """The wanted lines of an archived part behind a cursor, a frame each."""
        if not part.index_size:
            async with contextlib.aclosing(self._unindexed(key, part, after)) as payloads:
                async for payload in payloads:
                    lines = await self._stream.run_aside(partial(select, payload, wanted, after, where.before))
                    yield Block(lines, lines_of(payload)[-1].cursor)
            return
        frames = _frames_of(await self._index(key, part), wanted, after, where.before)

        def read(contents: Contents) -> list[Block]:
            return [Block(select(content, wanted, after, where.before, most), frame.last) for frame, content in contents]

        async with contextlib.aclosing(self._ahead(key, part, frames, read, _TAIL_CONTENT)) as results:
            async for blocks in results:
                for block in blocks:
                    yield block

    async def _ahead(
        self, key: Key, part: ev.LogArchived, frames: Sequence[pb.LogFrame], read: Callable[[Contents], T], content: int
    ) -> AsyncGenerator[T]:
        """What `read` makes of groups of neighbouring frames, in order.

        One frame at first, which may be all that the caller needs; then more and more, of up to `content` bytes, the next
        group read while the caller has one.
        """

        async def one(group: Sequence[pb.LogFrame]) -> T:
            if len(group) == 1:
                contents = [(group[0], await self._frame(key, part, group[0]))]
                return await self._stream.run_aside(lambda: read(contents))
            data = await self._bytes(part, group[0].offset, group[-1].offset + group[-1].size - group[0].offset)
            try:
                return await self._stream.run_aside(lambda: read(_contents(group, data)))
            except archive.Damaged as error:
                raise self._damaged(key, error) from error

        groups = _groups(frames, content)
        tasks: list[asyncio.Task[T]] = []
        under_way = 1
        try:
            while True:
                while len(tasks) < under_way and (group := next(groups, None)) is not None:
                    tasks.append(asyncio.create_task(one(group)))
                if not tasks:
                    return
                yield await tasks[0]
                tasks.pop(0)
                under_way = _AHEAD
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _unindexed(self, key: Key, part: ev.LogArchived, after: int) -> AsyncGenerator[bytes]:
        async with scratch.folder("alveary-log-", self._folder) as folder:
            path = folder / "log"
            try:
                await self._store.get_file(BUCKET, part.key, path, part.sha256)
            except DigestMismatch as error:
                raise self._damaged(key, error) from error
            payloads = archive.read_unindexed(path, after)
            try:
                while (payload := await self._stream.run_aside(lambda: next(payloads, None))) is not None:
                    yield payload
            finally:
                payloads.close()  # type: ignore[attr-defined]

    # ---- pages ----------------------------------------------------------------------------------------------------

    async def read(self, key: Key, wanted: Filter, where: Where, limit: int) -> tuple[list[pb.TailLine], int]:
        """The first `limit` lines, and the cursor to go on from (0: there are no more now).

        The last page shows lines that are unfinished now.
        """
        found: list[pb.TailLine] = []
        wanted = replace(wanted, provisional=True)
        async with contextlib.aclosing(self.blocks(key, wanted, where, most=limit + 1)) as blocks:
            async for block in blocks:
                found, more = await self._stream.run_aside(partial(_and_first_of, found, block.payload, limit))
                if more:
                    return found, found[-1].cursor
                if block.last >= where.before:
                    break
        return found, 0

    async def ahead_of_time(self, key: Key, after: int, time_us: int) -> int:
        """The cursor behind which, and behind `after`, the first line comes that was read at a time or later (microseconds
        since the epoch); the end of the log where none is that new."""
        for part in await self._view.parts(key.id, after):
            if not part.index_size:
                break
            if part.lines:
                for frame in (await self._index(key, part)).frames:
                    if frame.last > after and frame.latest_us >= time_us:
                        content = await self._frame(key, part, frame)
                        cursor = await self._stream.run_aside(partial(_ahead_of_time, content, after, time_us))
                        if cursor is not None:
                            return cursor
            after = part.last
        async with contextlib.aclosing(self.blocks(key, Filter(), Where(after=after))) as blocks:
            async for block in blocks:
                cursor = await self._stream.run_aside(partial(_ahead_of_time, block.payload, after, time_us))
                if cursor is not None:
                    return cursor
                after = block.last
        return after

    async def newest(self, key: Key, wanted: Filter, where: Where, limit: int) -> list[pb.TailLine]:
        """The last `limit` lines, in order, with those that are unfinished now. Reads from the end, and no more than it needs."""
        for _ in range(_RESTARTS):
            parts = await self._view.parts(key.id)
            archived = max((last_of(part) for part in parts), default=0)
            floor = max(archived, where.after)
            try:
                found = await self._newest_of_stream(key, wanted, where, floor, limit)
            except Overtaken as event:
                await self._view.wait_for(event.sequence)
                continue
            for part in reversed(parts):
                if len(found) == limit or last_of(part) <= where.after:
                    break
                if part.lines and part.first < where.before:
                    found = await self._newest_of_part(key, part, wanted, where, limit - len(found)) + found
            return found
        raise Unavailable(f"the log of run {key.id} is being archived: try again")

    async def _newest_of_stream(self, key: Key, wanted: Filter, where: Where, floor: int, limit: int) -> list[pb.TailLine]:
        subject, lowest = subject_of(key), sequence_of(floor + 1)
        newest = min(await self._stream.newest(subject), sequence_of(where.before))
        found: list[pb.TailLine] = []
        # A run's messages lie between those of others: the window grows until it holds enough of them.
        window, upper = 16, newest
        while upper >= max(lowest, 1) and len(found) < limit:
            lower = max(upper - window + 1, lowest, 1)
            pages: list[pb.TailLine] = []
            size = 0
            start = lower
            while start <= upper and (messages := await self._stream.messages(subject, start)):
                inside = [message for message in messages if message[0] <= upper]
                size += sum(len(data) for _, data in inside)
                pages = await self._stream.run_aside(partial(_and_newest_of, pages, inside, wanted, where, floor, limit))
                start = messages[-1][0] + 1
            found = settled(pages + found)[-limit:]
            upper = lower - 1
            window = window * 4 if size < 1 << 20 else window
        cursor, event = await self._stream.archived_to(key)
        if cursor > floor:
            raise Overtaken(event)
        return found

    async def _newest_of_part(self, key: Key, part: ev.LogArchived, wanted: Filter, where: Where, limit: int) -> list[pb.TailLine]:
        if not part.index_size:
            kept: list[pb.TailLine] = []
            async with contextlib.aclosing(self._part(key, part, wanted, where, where.after, 0)) as blocks:
                async for block in blocks:
                    kept = (kept + await self._stream.run_aside(partial(lines_of, block.payload)))[-limit:]
            return kept
        found: list[pb.TailLine] = []
        for frame in reversed(_frames_of(await self._index(key, part), wanted, where.after, where.before)):
            content = await self._frame(key, part, frame)
            lines = await self._stream.run_aside(partial(_newest_of, content, wanted, where, limit - len(found)))
            found = lines + found
            if len(found) == limit:
                break
        return found

    async def ahead_of_line(self, key: Key, line: int) -> int:
        """The cursor behind which line number `line` of the log (from 1) comes first.

        Raises:
            NotFound: the log does not have that many lines now.
        """
        seen, position = 0, 0
        for part in await self._view.parts(key.id):
            if part.index_size and part.preceding + part.lines < line:
                seen, position = part.preceding + part.lines, last_of(part)
                continue
            if part.index_size and part.lines:
                for frame in (await self._index(key, part)).frames:
                    if frame.preceding + frame.lines >= line:
                        content = await self._frame(key, part, frame)
                        one = (await self._stream.run_aside(partial(lines_of, content)))[line - frame.preceding - 1]
                        return one.cursor - 1
        async with contextlib.aclosing(self.blocks(key, Filter(), Where(after=position))) as blocks:
            async for block in blocks:
                lines = await self._stream.run_aside(partial(lines_of, block.payload))
                if seen + len(lines) >= line:
                    return lines[line - seen - 1].cursor - 1
                seen += len(lines)
        raise NotFound("log line", f"{line} of run {key.id}, which has {seen} lines now")

    # ---- search ---------------------------------------------------------------------------------------------------

    async def search(
        self, key: Key, text: bytes, ignore_case: bool, wanted: Filter, after: int, limit: int, seconds: float
    ) -> tuple[list[pb.TailLine], int]:
        """Lines that hold `text`, the first `limit`, and the cursor to go on from (0: that was all). Returns early after `seconds`."""
        text = text.lower() if ignore_case else text
        found: list[pb.TailLine] = []
        deadline = time.monotonic() + seconds
        async with contextlib.aclosing(self._hits(key, text, ignore_case, wanted, after, limit + 1)) as results:
            async for hits, last in results:
                found += hits
                if len(found) > limit:
                    return found[:limit], found[limit - 1].cursor
                if time.monotonic() > deadline:
                    return found, last
        return found, 0

    async def _hits(
        self, key: Key, text: bytes, ignore_case: bool, wanted: Filter, after: int, limit: int
    ) -> AsyncGenerator[tuple[list[pb.TailLine], int]]:
        position = after

        def read(contents: Contents) -> tuple[list[pb.TailLine], int]:
            hits: list[pb.TailLine] = []
            last = after
            for frame, content in contents:
                last = frame.last
                if len(hits) < limit:
                    hits += find(content, text, ignore_case, wanted, after, limit - len(hits))
            return hits, last

        for part in await self._view.parts(key.id, after):
            if not part.index_size:
                break
            if part.lines:
                frames = _frames_of(await self._index(key, part), wanted, after)
                async with contextlib.aclosing(self._ahead(key, part, frames, read, _SEARCH_CONTENT)) as results:
                    async for result in results:
                        yield result
            position = max(position, part.last)
        async with contextlib.aclosing(self.blocks(key, Filter(), Where(after=position))) as blocks:
            async for block in blocks:
                yield await self._stream.run_aside(partial(find, block.payload, text, ignore_case, wanted, position, limit)), block.last

    # ---- the object store -----------------------------------------------------------------------------------------

    async def _bytes(self, part: ev.LogArchived, offset: int, size: int) -> bytes:
        return await self._store.get(BUCKET, part.key, offset, size)

    async def _index(self, key: Key, part: ev.LogArchived) -> pb.LogIndex:
        async def read() -> pb.LogIndex:
            data = await self._bytes(part, part.size - part.index_size, part.index_size)
            try:
                return await self._stream.run_aside(partial(archive.read_index, data, part.index_sha256))
            except archive.Damaged as error:
                raise self._damaged(key, error) from error

        return await self._indexes.get(part.key, part.index_size * 4, read)

    async def _frame(self, key: Key, part: ev.LogArchived, frame: pb.LogFrame) -> bytes:
        async def read() -> bytes:
            data = await self._bytes(part, frame.offset, frame.size)
            try:
                return await self._stream.run_aside(partial(archive.read_frame, frame, data))
            except archive.Damaged as error:
                raise self._damaged(key, error) from error

        return await self._frames.get((part.key, frame.offset), frame.content_size, read)

    @staticmethod
    def _damaged(key: Key, error: Exception) -> FailedPrecondition:
        return FailedPrecondition(f"the archived log of run {key.id} is damaged: {error}", f"run/{key.id}")


def _frames_of(index: pb.LogIndex, wanted: Filter, after: int, before: int = LAST_CURSOR) -> list[pb.LogFrame]:
    """The frames that can hold wanted lines."""
    sources = {number for number, source in enumerate(index.sources) if wanted.keeps(source.stream, source.rank)}
    return [f for f in index.frames if f.last > after and f.first < before and (wanted.everything or not sources.isdisjoint(f.sources))]


def _groups(frames: Iterable[pb.LogFrame], most: int) -> Iterator[list[pb.LogFrame]]:
    """Neighbours together: one at first, then twice as much each time, up to `most` bytes of content."""
    group: list[pb.LogFrame] = []
    content, room = 0, 1
    for frame in frames:
        if group:
            neighbour = group[-1].offset + group[-1].size == frame.offset
            if not neighbour or frame.offset + frame.size - group[0].offset > _GROUP_BYTES or content + frame.content_size > room:
                yield group
                group, content, room = [], 0, min(max(room * 2, archive.FRAME * 2), most)
        group.append(frame)
        content += frame.content_size
    if group:
        yield group


def _contents(group: Sequence[pb.LogFrame], data: bytes) -> Iterator[tuple[pb.LogFrame, bytes]]:
    start = group[0].offset
    for frame in group:
        yield frame, archive.read_frame(frame, data[frame.offset - start : frame.offset - start + frame.size])


def _and_first_of(found: list[pb.TailLine], payload: bytes, limit: int) -> tuple[list[pb.TailLine], bool]:
    """What was found and what follows, up to `limit` lines, and whether there are more; where there are, provisional ones have passed."""
    lines = settled(found + lines_of(payload))
    if len(lines) > limit:
        lasting = [one for one in lines if not one.line.provisional]
        if len(lasting) > limit:
            return lasting[:limit], True
    return lines, False


def _ahead_of_time(payload: bytes, after: int, time_us: int) -> int | None:
    for one in pb.TailResponse.FromString(payload).lines:
        time = one.line.time
        if one.cursor > after and time.seconds * 1_000_000 + time.nanos // 1000 >= time_us:
            return one.cursor - 1
    return None


def _newest_of(payload: bytes, wanted: Filter, where: Where, limit: int) -> list[pb.TailLine]:
    return lines_of(select(payload, wanted, where.after, where.before))[-limit:]


def _and_newest_of(
    found: list[pb.TailLine], messages: list[tuple[int, bytes]], wanted: Filter, where: Where, floor: int, limit: int
) -> list[pb.TailLine]:
    for sequence, data in messages:
        found = settled(found + lines_of(select(encode(sequence, data), wanted, floor, where.before)))[-limit:]
    return found
