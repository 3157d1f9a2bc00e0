"""Log lines as bytes. A message of the stream becomes a reply without an object for each of its lines."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from alveary_contracts.logs.v1 import logs_pb2 as pb

# A cursor is the chunk's stream sequence and the line's place in it: it grows, and archiving does not change it.
_SHIFT = 20
LAST_PLACE = (1 << _SHIFT) - 1
LAST_CURSOR = (1 << 63) - 1


def cursor_at(sequence: int, place: int) -> int:
    """The cursor of a chunk's line, counted from 1; place 0 is ahead of its first line."""
    return (sequence << _SHIFT) | place


def sequence_of(cursor: int) -> int:
    """The chunk that a cursor points into."""
    return cursor >> _SHIFT


def _raw_message() -> Callable[[bytes], Any]:
    """A parser of "repeated bytes lines = 1": on the wire the same as the lines of a LogChunk or a TailResponse."""
    file = descriptor_pb2.FileDescriptorProto(name="alveary_logs/wire.proto", package="alveary_logs.wire", syntax="proto3")
    field = file.message_type.add(name="Raw").field.add(name="lines", number=1)
    field.type, field.label = field.TYPE_BYTES, field.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("alveary_logs.wire.Raw"))
    return kind.FromString  # type: ignore[no-any-return]


_parse = _raw_message()


def split(data: bytes) -> list[bytes]:
    """The serialized lines of a LogChunk (LogLine) or of a TailResponse (TailLine)."""
    return list(_parse(data).lines)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_VARINTS = [_varint(n) for n in range(1 << 14)]
_LOW = [bytes((n | 0x80,)) for n in range(128)]


def size_prefix(size: int) -> bytes:
    """A size as protobuf writes it."""
    return _VARINTS[size] if size < len(_VARINTS) else _varint(size)


def encode(sequence: int, chunk: bytes, without: frozenset[int] = frozenset()) -> bytes:
    """The serialized TailResponse of a serialized LogChunk: each line gets its cursor. Lines at the places `without` are left out."""
    lines = split(chunk)
    high = sequence << _SHIFT
    out: list[bytes] = []
    # The first byte of a cursor's varint are its low seven bits; the others are the same for 128 lines on end.
    for start in range(0, len(lines) + 1, 128):
        rest = _varint((high | start) >> 7)
        fixed = len(rest) + 3
        for place, line in enumerate(lines[max(start - 1, 0) : start + 127], max(start, 1)):
            if place in without:
                continue
            length = size_prefix(len(line))
            out.append(b"\x0a%b\x08%b%b\x12%b%b" % (size_prefix(fixed + len(length) + len(line)), _LOW[place & 127], rest, length, line))
    return b"".join(out)


def provisional(chunk: bytes) -> frozenset[int]:
    """The places of a serialized LogChunk's provisional lines."""
    return frozenset(place for place, line in enumerate(pb.LogChunk.FromString(chunk).lines, 1) if line.provisional)


def settled(lines: list[pb.TailLine]) -> list[pb.TailLine]:
    """Lines without those provisional ones that a later line of the same source replaces."""
    if not any(one.line.provisional for one in lines):
        return lines
    kept: list[pb.TailLine | None] = list(lines)
    shown: dict[tuple[str, int, int], int] = {}
    for index, one in enumerate(lines):
        source = (one.line.stream, one.line.rank, one.line.attempt)
        if (replaced := shown.pop(source, None)) is not None:
            kept[replaced] = None
        if one.line.provisional:
            shown[source] = index
    return [one for one in kept if one is not None]


def join(lines: Iterable[bytes]) -> bytes:
    """The serialized TailResponse of serialized TailLines."""
    return b"".join([b"\x0a%b%b" % (size_prefix(len(line)), line) for line in lines])


def lines_of(payload: bytes) -> list[pb.TailLine]:
    """The lines of a serialized TailResponse."""
    return list(pb.TailResponse.FromString(payload).lines)


@dataclass(frozen=True)
class Filter:
    """Which lines a caller wants: of streams that match one of the patterns (none: all), of one rank (None: all)."""

    streams: tuple[str, ...] = ()
    rank: int | None = None
    # Lines of the moment, too: only the stream has them.
    provisional: bool = False

    @property
    def everything(self) -> bool:
        """Whether it keeps all streams and ranks."""
        return not self.streams and self.rank is None

    def keeps(self, stream: str, rank: int) -> bool:
        """Whether it keeps lines of this stream and rank."""
        if self.rank is not None and rank != self.rank:
            return False
        return not self.streams or any(fnmatchcase(stream, pattern) for pattern in self.streams)


def select(payload: bytes, wanted: Filter, after: int = 0, before: int = LAST_CURSOR, most: int = 0) -> bytes:
    """The lines of a serialized TailResponse that are wanted, and between two cursors, as one too; the first `most` (0: all)."""
    lines = pb.TailResponse.FromString(payload).lines
    start = bisect_right(lines, after, key=_cursor) if lines and lines[0].cursor <= after else 0
    end = bisect_left(lines, before, key=_cursor) if lines and lines[-1].cursor >= before else len(lines)
    kept: Sequence[int]
    if wanted.everything:
        kept = range(start, end)[: most or None]
    else:
        known: dict[tuple[str, int], bool] = {}
        kept = []
        for index in range(start, end):
            line = lines[index].line
            source = (line.stream, line.rank)
            keep = known.get(source)
            if keep is None:
                keep = known[source] = wanted.keeps(*source)
            if keep:
                kept.append(index)
                if len(kept) == most:
                    break
    if len(kept) == len(lines):
        return payload
    raw = split(payload)
    return join(raw[index] for index in kept)


def _cursor(one: pb.TailLine) -> int:
    return one.cursor


def find(payload: bytes, text: bytes, ignore_case: bool, wanted: Filter, after: int, limit: int) -> list[pb.TailLine]:
    """At most `limit` lines whose data hold `text`, behind a cursor. With `ignore_case`, `text` is in lower case."""
    if text not in (payload.lower() if ignore_case else payload):
        return []  # which is most often so: nothing was looked at line by line
    found: list[pb.TailLine] = []
    for raw in split(payload):
        if text not in (raw.lower() if ignore_case else raw):
            continue
        one = pb.TailLine.FromString(raw)
        data = one.line.data.lower() if ignore_case else one.line.data
        # It may have been in the name of the stream, or across two fields.
        if text in data and one.cursor > after and wanted.keeps(one.line.stream, one.line.rank):
            found.append(one)
            if len(found) == limit:
                break
    return found
