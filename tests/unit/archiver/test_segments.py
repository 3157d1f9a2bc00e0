"""The second copy's format: whole, in order, without gaps, or loudly not."""

from __future__ import annotations

from itertools import pairwise

import pytest
from alveary_archiver.segments import Damaged, Record, Segment, chain, mergeable, pack, unpack
from hypothesis import given
from hypothesis import strategies as st

RECORDS = st.lists(st.tuples(st.integers(1, 5), st.binary(max_size=50), st.text(max_size=5)), min_size=1, max_size=20)


@given(RECORDS)
def test_what_is_packed_is_unpacked(steps: list[tuple[int, bytes, str]]) -> None:
    sequence, records = 100, []
    for step, data, text in steps:
        sequence += step
        records.append(Record(sequence, "alveary.w.run.x.y", (("ce-id", text),), data))
    segment, data = pack("ALVEARY", 100, sequence, records)
    assert list(unpack(segment, data)) == records
    assert Segment.of(segment.key) == segment


def test_damage_is_noticed() -> None:
    segment, data = pack("ALVEARY", 0, 2, [Record(1, "s", (), b"a"), Record(2, "s", (), b"b")])
    with pytest.raises(Damaged, match="not those that were written"):
        list(unpack(segment, data[:-1] + b"x"))
    wrong, data = pack("ALVEARY", 0, 2, [Record(2, "s", (), b"b"), Record(1, "s", (), b"a")])
    with pytest.raises(Damaged, match="out of place"):
        list(unpack(wrong, data))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=20), st.data())
def test_merged_segments_take_the_place_of_theirs_and_a_gap_is_noticed(sizes: list[int], data: st.DataObject) -> None:
    segments, reached = [], 0
    for size in sizes:
        segments.append(Segment("ALVEARY", reached, reached + size, "0" * 64))
        reached += size
    assert chain(segments) == segments
    first = data.draw(st.integers(0, len(segments) - 1))
    last = data.draw(st.integers(first, len(segments) - 1))
    merged = Segment("ALVEARY", segments[first].after, segments[last].last, "1" * 64)
    found = chain([*segments, merged])
    assert found[0].after == 0 and found[-1].last == reached
    assert all(a.last == b.after for a, b in pairwise(found))
    if len(segments) > 1:
        lost = data.draw(st.integers(0, len(segments) - 2))
        with pytest.raises(Damaged, match="gap"):
            chain([s for i, s in enumerate(segments) if i != lost])


def test_only_small_neighbours_at_the_end_are_merged() -> None:
    sizes = [100, 1, 2, 3]
    segments, reached = [], 0
    for size in sizes:
        segments.append(Segment("ALVEARY", reached, reached + size, "0" * 64))
        reached += size
    assert mergeable(segments, small=50, many=3) == segments[1:]
    assert mergeable(segments, small=50, many=4) == []
