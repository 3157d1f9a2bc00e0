"""Points of metrics: as columns, as pages, thinned, of several attempts, within limits."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.errors import InvalidArgument, ResourceExhausted
from alveary_core.events import Event, Key
from alveary_core.settings import MetricLimits
from alveary_runs import points, series
from alveary_runs.metrics import MetricsProjection, batches, show
from alveary_runs.points import NO_STEP, Columns

POINT = st.builds(
    pb.MetricPoint,
    scalar=st.none() | st.floats(),
    step=st.none() | st.integers(-(2**63) + 1, 2**63 - 1),
    text=st.none() | st.text(max_size=5),
    description=st.text(max_size=5),
)


class Stored:
    """The read model of metrics without a stream."""

    def __init__(self, path: Path, **limits: int) -> None:
        self.view = MetricsProjection(str(path), MetricLimits(**limits))
        self.sequence = 0

    def log(self, *logged: pb.MetricPoint, run: str = "r", attempt: int = 1) -> None:
        self.sequence += 1
        self.view.db.execute("BEGIN")
        batch = pb.MetricBatch(points=logged, attempt=attempt)
        self.view.apply(Event("", Key("w", "metrics", run), "logged", batch, self.sequence, 0.0))
        self.view.flush()
        self.view.db.execute("COMMIT")

    def get(self, *runs: str, **query: object) -> list[pb.MetricSeries]:
        """Stretches of all pages."""
        found: list[pb.MetricSeries] = []
        begin: series.Token | None = series.Token()
        wanted = list(runs or ("r",))
        while begin is not None:
            stretches, begin = series.page(self.view.db, wanted, series.Query(**query), begin)  # type: ignore[arg-type]
            found += stretches
            if begin is not None:
                assert stretches, "a page without points"
                begin = series.Token.decode(begin.encode())
                wanted = wanted[wanted.index(begin.run) :]
        return found

    def values(self, name: str = "x", **query: object) -> list[float]:
        return [p.scalar for one in self.get(name=name, **query) for p in one.points]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path / "m.sqlite")


def at(value: float, step: int | None = None, name: str = "x") -> pb.MetricPoint:
    return pb.MetricPoint(name=name, scalar=value, step=step)


@given(st.lists(st.lists(POINT, min_size=1, max_size=30), min_size=1, max_size=20))
@settings(deadline=None, max_examples=40)
def test_points_come_back_as_they_were_logged_however_they_were_batched(logged: list[list[pb.MetricPoint]]) -> None:
    view = Stored(Path(":memory:"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "CHUNK", 16)
        patch.setattr(points, "CHUNK_EXTRA_BYTES", 40)
        patch.setattr("alveary_runs.metrics._PIECES", 3)
        patch.setattr(series, "_POINTS", 7)
        whole = []
        for batch in logged:
            for place, point in enumerate(batch):
                point.name = "x"
                point.time.seconds, point.time.nanos = 1_000_000 + place, 5000
                if point.WhichOneof("value") is None:
                    point.scalar = 0.0
                whole.append(point)
            view.log(*batch)
        found = [p.SerializeToString(deterministic=True) for one in view.get() for p in one.points]
    assert found == [p.SerializeToString(deterministic=True) for p in whole]
    view.view.close()


def test_columns_hold_the_same_numbers(stored: Stored) -> None:
    values = [random.Random(1).uniform(-1, 1) for _ in range(10_000)] + [math.inf, -0.0]
    stored.log(*(at(v, i if i % 2 else None) for i, v in enumerate(values)))
    found = stored.get(columns=True)
    assert [v for one in found for v in one.columns.values] == values == stored.values()
    assert [s for one in found for s in one.columns.steps] == [i if i % 2 else NO_STEP for i in range(len(values))]
    assert {one.point_count for one in found} == {len(values)}


def test_110_000_points_with_long_descriptions_are_read_in_pages_of_bounded_size(stored: Stored) -> None:
    text = "x" * 300
    for begin in range(0, 110_000, 5000):
        stored.log(*(pb.MetricPoint(name="x", scalar=i, description=f"{i} {text}") for i in range(begin, begin + 5000)))
    place: series.Token | None = series.Token()
    count, largest = 0, 0
    while place is not None:
        found, place = series.page(stored.view.db, ["r"], series.Query(), place)
        largest = max(largest, pb.GetMetricsResponse(series=found).ByteSize())
        for one in found:
            for point in one.points:
                assert point.scalar == count and point.description == f"{count} {text}"
                count += 1
    assert count == 110_000 and largest < 4 << 20


@pytest.mark.parametrize("count", [3, 100, 5000, 50_000])
@pytest.mark.parametrize("most", [4, 50, 1000])
def test_a_thinned_series_keeps_its_ends_and_extremes(stored: Stored, count: int, most: int) -> None:
    values = np.random.default_rng(0).normal(size=count).cumsum()
    peak, pit = count // 3, count // 2
    values[peak], values[pit] = 1e6, -1e6
    for begin in range(0, count, 1000):
        stored.log(*(at(v, begin + i) for i, v in enumerate(values[begin : begin + 1000].tolist())))
    found = stored.values(max_points=most)
    assert len(found) <= max(most, 4) and found[0] == values[0] and found[-1] == values[-1]
    assert max(found) == values.max() and min(found) == values.min()
    steps = [p.step for one in stored.get(max_points=most) for p in one.points]
    assert steps == sorted(set(steps))


def test_thinning_of_many_chunks_reads_their_summaries_alone(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "CHUNK", 10)
    stored.log(*(at(float(i % 97), i) for i in range(2000)))
    monkeypatch.setattr(Columns, "decode", lambda data: pytest.fail("a chunk was read"))
    found = stored.values(max_points=20)
    assert len(found) <= 20 and max(found) == 96.0 and min(found) == 0.0


def test_what_is_no_number_is_thinned_evenly_and_nan_only_where_there_is_nothing_else(stored: Stored) -> None:
    stored.log(*(pb.MetricPoint(name="t", text=str(i)) for i in range(1000)))
    found = [p.text for one in stored.get(name="t", max_points=10) for p in one.points]
    assert len(found) == 10 and found[0] == "0" and found[-1] == "999"
    stored.log(*(at(math.nan if i % 3 else float(i)) for i in range(999)), *(at(math.nan) for _ in range(1000)))
    values = stored.values(max_points=20)
    assert math.isnan(values[-1]) and sum(map(math.isnan, values)) < 15 and not any(map(math.isnan, values[:8]))


def test_a_later_attempt_replaces_what_it_logged_again_and_keeps_what_it_resumed_behind(stored: Stored) -> None:
    stored.log(*(at(float(i), i) for i in range(10)), at(1.0, name="once"), at(-1.0, name="lost"))
    stored.log(*(at(100.0 + i, i) for i in range(6, 12)), at(2.0, name="once"), attempt=2)
    stored.log(at(9.5, 9))  # a late word of the attempt that was lost
    assert stored.values() == [0, 1, 2, 3, 4, 5, *(100.0 + i for i in range(6, 12))]
    assert stored.values("once") == [2.0] and stored.values("lost") == [-1.0]
    assert stored.values(attempt=1) == [*map(float, range(10)), 9.5]
    assert stored.values(max_points=4) == [0.0, 5.0, 106.0, 111.0] or len(stored.values(max_points=4)) <= 8
    run = pb.Run(id="r")
    show(stored.view.db, run, [])
    assert dict(run.metrics) == {"x": 111.0, "once": 2.0, "lost": -1.0} and run.metric_count == 3


def test_a_run_shows_its_first_metrics_or_those_that_are_named_and_says_how_many_it_has(stored: Stored) -> None:
    stored.log(*(at(float(i), name=f"m{i}") for i in range(500)), pb.MetricPoint(name="t", text="no number"))
    run = pb.Run(id="r")
    show(stored.view.db, run, [])
    assert set(run.metrics) == {f"m{i}" for i in range(64)} and run.metric_count == 501
    chosen = pb.Run(id="r")
    show(stored.view.db, chosen, ["m499", "t", "none"])
    assert dict(chosen.metrics) == {"m499": 499.0}


async def test_limits_refuse_with_a_sentence_from_outside_and_hold_whatever_the_stream_brings(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "m.sqlite", metric_names=3, metric_points=10)
    stored.log(*(at(1.0, name=n) for n in ("a", "b", "c")))
    await stored.view.admit("r", [at(2.0, name="a")] * 7)
    with pytest.raises(ResourceExhausted, match="3 metrics.*ALVEARY_METRIC_NAMES"):
        await stored.view.admit("r", [at(1.0, name="d")])
    with pytest.raises(ResourceExhausted, match="10 points.*ALVEARY_METRIC_POINTS"):
        await stored.view.admit("r", [at(2.0, name="a")] * 8)
    for bad, words in (
        (at(1.0, name=""), "1 to 256"),
        (at(1.0, name="n" * 257), "257"),
        (pb.MetricPoint(name="a", text="x" * 2**20), "'a'"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            await stored.view.admit("r", [bad])
    stored.log(*(at(1.0, name="d") for _ in range(5)), *(at(float(i), name="a") for i in range(20)))
    assert stored.values("d") == [] and len(stored.values("a")) == 8
    assert tuple(stored.view.db.execute("SELECT names, points, refused FROM totals").fetchone()) == (3, 10, 18)
    await stored.view.admit("other", [at(1.0, name="d")])
    stored.view.close()


async def test_strange_batches_are_survived(stored: Stored) -> None:
    point = at(1.0)
    point.time.seconds, point.time.nanos = 2**62, -5
    stored.log(point, pb.MetricPoint(name="x"), pb.MetricPoint(name="x", list=pb.NumberList()))
    (found,) = stored.get()
    assert [p.WhichOneof("value") for p in found.points] == ["scalar", "scalar", "list"]
    from alveary_core.projection import Raw

    assert stored.view.decode(Raw("alveary-metrics.w.r", {}, b"\xff\xff", 1)) is None
    assert stored.view.decode(Raw("alveary-metrics.w.r.s", {}, b"", 1)) is None


def test_a_transaction_that_failed_leaves_no_counter_behind(stored: Stored) -> None:
    stored.log(at(1.0))
    stored.view.db.execute("BEGIN")
    stored.view.apply(Event("", Key("w", "metrics", "r"), "logged", pb.MetricBatch(points=[at(2.0), at(3.0, name="y")], attempt=1), 9, 0.0))
    stored.view.flush()
    stored.view.db.execute("ROLLBACK")
    stored.view.forget()
    stored.log(at(4.0), at(5.0, name="z"))
    assert stored.values() == [1.0, 4.0] and stored.values("z") == [5.0] and stored.values("y") == []


def test_points_from_outside_are_cut_into_messages_that_the_stream_takes() -> None:
    logged = [pb.MetricPoint(name="x", text="t" * 50_000) for _ in range(20)] + [at(float(i)) for i in range(1000)]
    cut = list(batches(logged, 3))
    assert [p for b in cut for p in b.points] == logged and {b.attempt for b in cut} == {3}
    assert max(b.ByteSize() for b in cut) < 256 << 10


@pytest.mark.parametrize("bad", ["x", "W10=", series.Token("r", -1, 0).encode(), series.Token("r", 2**70, 0).encode()])
def test_page_tokens_of_others_are_refused(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        series.Token.decode(bad)
    with pytest.raises(InvalidArgument, match="max_points"):
        series.checked(pb.GetMetricsRequest(max_points=3))
