"""Logs of final runs: one compressed object each, with the cursors that Tail gave before."""

from __future__ import annotations

from collections.abc import Iterator

import zstandard
from google.protobuf.internal.decoder import _DecodeVarint32  # type: ignore[attr-defined]
from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]

from alveary_contracts.logs.v1 import logs_pb2 as pb

# A cursor is the chunk's stream sequence and the line's place in it: it grows, and archiving does not change it.
_SHIFT = 20


def lines_of(sequence: int, data: bytes) -> Iterator[pb.TailLine]:
    """The lines of one chunk with their cursors."""
    for index, line in enumerate(pb.LogChunk.FromString(data).lines):
        yield pb.TailLine(cursor=(sequence << _SHIFT) | (index + 1), line=line)


def sequence_of(cursor: int) -> int:
    """The chunk that a cursor points into."""
    return cursor >> _SHIFT


def compress(lines: list[pb.TailLine]) -> bytes:
    """zstd of length-prefixed messages."""
    raw = b"".join(_VarintBytes(line.ByteSize()) + line.SerializeToString() for line in lines)
    return zstandard.ZstdCompressor(level=6).compress(raw)


def decompress(data: bytes) -> Iterator[pb.TailLine]:
    """The inverse."""
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    position = 0
    while position < len(raw):
        size, position = _DecodeVarint32(raw, position)
        yield pb.TailLine.FromString(raw[position : position + size])
        position += size
