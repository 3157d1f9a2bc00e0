"""Logs of final runs: one compressed object each, with the cursors that Tail gave before. Never whole in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

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


class Writer:
    """Writes an archive to a file: zstd of length-prefixed messages."""

    def __init__(self, path: Path) -> None:
        self.lines, self.last = 0, 0
        self._file = path.open("wb")
        self._stream = zstandard.ZstdCompressor(level=6).stream_writer(self._file)

    def add(self, lines: Iterable[pb.TailLine]) -> None:
        """Append lines; their cursors grow."""
        buffer = io.BytesIO()
        for line in lines:
            serialize_length_prefixed(line, buffer)
            self.lines, self.last = self.lines + 1, line.cursor
        self._stream.write(buffer.getvalue())

    def close(self) -> None:
        """Finish the file."""
        self._stream.close()  # type: ignore[no-untyped-call]
        self._file.close()


def read(path: Path) -> Iterator[pb.TailLine]:
    """The lines of an archive."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        buffered = cast(io.BytesIO, io.BufferedReader(cast(io.RawIOBase, cast(BinaryIO, stream)), 1 << 18))
        while (line := parse_length_prefixed(pb.TailLine, buffered)) is not None:
            yield line
