"""Archived logs: objects of zstd frames with an index at their end, so that any page is a read of a few bytes.

A frame's content is a serialized TailResponse: it goes to a follower as it is. The index is a zstd skippable frame, so
that the whole object is also one zstd stream. Archives of older versions have no index and are read from their start.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard
from google.protobuf.proto import parse_length_prefixed

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_logs.wire import LAST_CURSOR, split

# Content of a frame, bytes: what a page costs to read, and what one reply carries.
FRAME = 1 << 20
_LEVEL = 3
_SKIPPABLE = 0x184D2A50
_HEADER = struct.Struct("<II")
# What an index or a frame may be at most: a damaged or foreign object must not fill the memory.
_MAX_CONTENT = 256 << 20


def last_of(archived: ev.LogArchived) -> int:
    """The last cursor that a part of a log covers; one without an index covers all."""
    return archived.last if archived.index_size else LAST_CURSOR


class Damaged(Exception):
    """An archive is not what was written."""


class Writer:
    """Writes one part of a log to a file, in bounded memory.

    `preceding`: lines of the log in earlier parts.
    """

    def __init__(self, path: Path, preceding: int = 0) -> None:
        self.lines, self.first, self.last, self.content_size = 0, 0, 0, 0
        self._file = path.open("wb")
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
        self._index = pb.LogIndex()
        self._sources: dict[tuple[str, int], int] = {}
        self._preceding = preceding
        self._pending: list[bytes] = []
        self._pending_size = 0

    def add(self, payload: bytes) -> None:
        """Append the lines of a serialized TailResponse; their cursors grow."""
        self._pending.append(payload)
        self._pending_size += len(payload)
        self.content_size += len(payload)
        if self._pending_size >= FRAME:
            self._flush()

    def _flush(self) -> None:
        content = b"".join(self._pending)
        self._pending, self._pending_size = [], 0
        lines = pb.TailResponse.FromString(content).lines
        if not lines:
            return
        compressed = self._compressor.compress(content)
        earliest, latest, sources = None, 0, set()
        for one in lines:
            line = one.line
            at = line.time.seconds * 1_000_000 + line.time.nanos // 1000
            earliest = at if earliest is None or at < earliest else earliest
            latest = max(latest, at)
            sources.add((line.stream, line.rank))
        for source in sorted(sources - self._sources.keys()):
            self._sources[source] = len(self._sources)
            self._index.sources.add(stream=source[0], rank=source[1])
        self._index.frames.add(
            offset=self._file.tell(), size=len(compressed), content_size=len(content), sha256=hashlib.sha256(compressed).digest(),
            first=lines[0].cursor, last=lines[-1].cursor, preceding=self._preceding + self.lines, lines=len(lines),
            earliest_us=earliest or 0, latest_us=latest, sources=sorted(self._sources[s] for s in sources),
        )  # fmt: skip
        self._file.write(compressed)
        self.first = self.first or lines[0].cursor
        self.lines, self.last = self.lines + len(lines), lines[-1].cursor

    def close(self) -> tuple[int, str]:
        """Finish the file; returns the size of the index at its end and its digest."""
        self._flush()
        index = self._compressor.compress(self._index.SerializeToString())
        framed = _HEADER.pack(_SKIPPABLE, len(index)) + index
        with self._file:
            self._file.write(framed)
        return len(framed), hashlib.sha256(framed).hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()


def _decompress(data: bytes, size: int) -> bytes:
    try:
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error
    return content


def read_index(framed: bytes, sha256: str) -> pb.LogIndex:
    """The index, from the last bytes of an object.

    Raises:
        Damaged: it is not what was written.
    """
    if hashlib.sha256(framed).hexdigest() != sha256 or len(framed) < _HEADER.size:
        raise Damaged(f"its index is not what was written ({len(framed)} bytes, expected sha256 {sha256})")
    return pb.LogIndex.FromString(_decompress(framed[_HEADER.size :], _MAX_CONTENT))


def read_frame(frame: pb.LogFrame, data: bytes) -> bytes:
    """The content of a frame: a serialized TailResponse.

    Raises:
        Damaged: `data` is not what was written.
    """
    if hashlib.sha256(data).digest() != frame.sha256:
        raise Damaged(f"its {frame.size} bytes from {frame.offset} are not what was written")
    return _decompress(data, min(frame.content_size, _MAX_CONTENT))


def read_unindexed(path: Path, after: int = 0) -> Iterator[bytes]:
    """Serialized TailResponses of about FRAME bytes, from an archive of an older version: zstd of length-prefixed TailLines."""
    reply, size = pb.TailResponse(), 0
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        buffered = cast(io.BytesIO, io.BufferedReader(cast(io.RawIOBase, cast(BinaryIO, stream)), 1 << 18))
        while (line := parse_length_prefixed(pb.TailLine, buffered)) is not None:
            if line.cursor <= after:
                continue
            reply.lines.append(line)
            size += len(line.line.data) + 40
            if size >= FRAME:
                yield reply.SerializeToString()
                reply, size = pb.TailResponse(), 0
    if reply.lines:
        yield reply.SerializeToString()


def count(payload: bytes) -> int:
    """Lines of a serialized TailResponse."""
    return len(split(payload))
