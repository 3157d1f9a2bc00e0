"""Archives of logs: any bytes, any number of lines, the same cursors; and the bytes that the service passes on unread."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import zstandard
from google.protobuf.proto import serialize_length_prefixed
from hypothesis import given, settings
from hypothesis import strategies as st

from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_logs import archive
from alveary_logs.__main__ import clean_scratch
from alveary_logs.wire import Filter, cursor_at, encode, find, join, lines_of, provisional, select, sequence_of, settled, split

STREAMS = ("stdout", "stderr", "logs/train.log")


def log_chunk(lines: list[bytes]) -> bytes:
    """A chunk whose lines go round the streams and ranks."""
    made = pb.LogChunk()
    for number, data in enumerate(lines):
        one = made.lines.add(stream=STREAMS[number % 3], rank=number % 2, attempt=1, data=data)
        one.time.FromMicroseconds(1_000_000 + number)
    return made.SerializeToString()


def plainly(sequence: int, chunk: bytes) -> list[pb.TailLine]:
    """What the lines of a chunk are, line by line."""
    lines = pb.LogChunk.FromString(chunk).lines
    return [pb.TailLine(cursor=(sequence << 20) | place, line=line) for place, line in enumerate(lines, 1)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 2**40))
def test_a_chunk_becomes_a_reply_as_protobuf_would_write_it(lines: list[bytes], sequence: int) -> None:
    chunk = log_chunk(lines)
    assert encode(sequence, chunk) == pb.TailResponse(lines=plainly(sequence, chunk)).SerializeToString()


@pytest.mark.parametrize("size", [0, 100, 127, 128, 16_383, 16_384, 262_144, 3 << 20])
def test_lines_of_any_size_keep_their_bytes(size: int) -> None:
    chunk = log_chunk([bytes([n % 256]) * max(size - n, 0) for n in range(3)])
    assert lines_of(encode(5, chunk)) == plainly(5, chunk)


def test_a_chunk_of_very_many_empty_lines_has_a_cursor_for_each() -> None:
    chunk = log_chunk([b""] * 20_000)
    assert lines_of(encode(1 << 30, chunk)) == plainly(1 << 30, chunk)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_filters_and_searches_find_what_looking_at_each_line_finds(data: st.DataObject) -> None:
    chunk = log_chunk(data.draw(st.lists(st.text("aAbB\x00é\xff", max_size=6).map(str.encode), max_size=12)))
    every, payload = plainly(3, chunk), encode(3, chunk)
    wanted = Filter(
        data.draw(st.sampled_from([(), ("stdout",), ("logs/*", "stderr"), ("nothing",)])), data.draw(st.sampled_from([None, 0, 1, 7]))
    )
    after, before = cursor_at(3, data.draw(st.integers(0, 13))), cursor_at(3, data.draw(st.integers(0, 14)))
    passing = [one for one in every if wanted.keeps(one.line.stream, one.line.rank)]
    assert lines_of(select(payload, wanted, after, before)) == [one for one in passing if after < one.cursor < before]
    assert lines_of(select(payload, wanted, after, before, 3)) == [one for one in passing if after < one.cursor < before][:3]
    text, folded = data.draw(st.text("aAbé", min_size=1, max_size=2)).encode(), data.draw(st.booleans())
    hits = [one for one in passing if one.cursor > after and (text in one.line.data or (folded and text.lower() in one.line.data.lower()))]
    assert find(payload, text.lower() if folded else text, folded, wanted, after, 4) == hits[:4]


def test_a_search_looks_at_what_was_said_not_at_how_it_is_stored() -> None:
    payload = encode(1, log_chunk([b"one", b"stdout", b"two"]))
    assert [one.line.data for one in find(payload, b"stdout", False, Filter(), 0, 10)] == [b"stdout"]
    assert not find(payload, b"train", False, Filter(), 0, 10)


def test_momentary_lines_are_replaced_and_not_kept() -> None:
    made = pb.LogChunk()
    for stream, data, momentary in [
        ("stdout", b"10%", True), ("stderr", b"5%", True), ("stdout", b"20%", True), ("stdout", b"done", False), ("stdout", b"name? ", True)
    ]:  # fmt: skip
        made.lines.add(stream=stream, data=data, provisional=momentary)
    chunk = made.SerializeToString()
    assert [one.line.data for one in settled(plainly(1, chunk))] == [b"5%", b"done", b"name? "]
    kept = lines_of(encode(1, chunk, provisional(chunk)))
    assert [(sequence_of(one.cursor), one.cursor & 7, one.line.data) for one in kept] == [(1, 4, b"done")]


def written(path: Path, chunks: list[bytes], preceding: int = 0) -> tuple[archive.Writer, pb.LogIndex, bytes]:
    writer = archive.Writer(path, preceding)
    for number, chunk in enumerate(chunks, 1):
        writer.add(encode(number * 7, chunk))
    size, digest = writer.close()
    whole = path.read_bytes()
    return writer, archive.read_index(whole[-size:], digest), whole


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=20), max_size=10), st.sampled_from([1, 500, 1 << 20]))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, chunks: list[list[bytes]], frame: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "FRAME", frame)
        data = [log_chunk(lines) for lines in chunks]
        writer, index, whole = written(tmp_path_factory.mktemp("a") / "log", data, preceding=100)
    expected = [one for number, chunk in enumerate(data, 1) for one in plainly(number * 7, chunk)]
    found: list[pb.TailLine] = []
    for one in index.frames:
        lines = lines_of(archive.read_frame(one, whole[one.offset : one.offset + one.size]))
        assert (one.first, one.last, one.lines, one.preceding) == (lines[0].cursor, lines[-1].cursor, len(lines), 100 + len(found))
        times = [line.line.time.ToMicroseconds() for line in lines]
        assert (one.earliest_us, one.latest_us) == (min(times), max(times))
        here = {(index.sources[number].stream, index.sources[number].rank) for number in one.sources}
        assert here == {(line.line.stream, line.line.rank) for line in lines}
        found += lines
    assert found == expected and writer.lines == len(expected)
    # And for whoever downloads it: one zstd stream, one message.
    plain = zstandard.ZstdDecompressor().stream_reader(whole, read_across_frames=True).read()
    assert list(pb.TailResponse.FromString(plain).lines) == expected


def test_damage_is_noticed(tmp_path: Path) -> None:
    _, index, whole = written(tmp_path / "log", [log_chunk([b"x"] * 100)])
    frame = index.frames[0]
    data = bytearray(whole[frame.offset : frame.offset + frame.size])
    data[len(data) // 2] ^= 1
    with pytest.raises(archive.Damaged, match="not what was written"):
        archive.read_frame(frame, bytes(data))
    with pytest.raises(archive.Damaged, match="index"):
        archive.read_index(whole[-10:], hashlib.sha256(whole).hexdigest())


def test_archives_of_older_versions_are_read(tmp_path: Path) -> None:
    expected = [one for number in range(1, 4) for one in plainly(number, log_chunk([b"\xff\x00 %d" % number] * 5))]
    with (tmp_path / "log").open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for one in expected:
            serialize_length_prefixed(one, stream)  # type: ignore[arg-type]
    assert [one for payload in archive.read_unindexed(tmp_path / "log") for one in lines_of(payload)] == expected
    behind = list(archive.read_unindexed(tmp_path / "log", expected[6].cursor))
    assert [one for payload in behind for one in lines_of(payload)] == expected[7:]


def test_what_a_killed_service_left_is_removed_at_its_next_start(tmp_path: Path) -> None:
    left = clean_scratch(tmp_path) / "alveary-log-x"
    left.mkdir()
    (left / "part").write_bytes(b"x")
    assert list(clean_scratch(tmp_path).iterdir()) == []


def test_replies_can_be_taken_apart_and_put_together() -> None:
    payload = encode(9, log_chunk([b"a", b"b" * 200, b""]))
    assert join(split(payload)) == payload
