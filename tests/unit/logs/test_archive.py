"""Archives of logs: any bytes, any number of lines, the same cursors."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_logs import archive


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=20), max_size=10))
def test_what_is_written_is_read_back(tmp_path_factory: object, chunks: list[list[bytes]]) -> None:
    path: Path = tmp_path_factory.mktemp("a") / "log"  # type: ignore[attr-defined]
    writer = archive.Writer(path)
    expected = []
    for number, chunk in enumerate(chunks, 1):
        data = pb.LogChunk(lines=[pb.LogLine(stream="stdout", data=line) for line in chunk]).SerializeToString()
        lines = list(archive.lines_of(number * 7, data))
        expected += lines
        writer.add(lines)
    writer.close()
    assert list(archive.read(path)) == expected
    assert writer.lines == len(expected) and writer.last == (expected[-1].cursor if expected else 0)
    assert [archive.sequence_of(line.cursor) for line in expected] == [n * 7 for n, chunk in enumerate(chunks, 1) for _ in chunk]
