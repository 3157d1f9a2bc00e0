"""The read model of metrics: a file of its own, folded from the stream ALVEARY_METRICS.

A series is what one attempt of a run logged under one name. Its points lie in `chunks`, as columns: full ones of 4,096 points,
each with a summary, and behind them up to 32 short pieces, which are merged when they are more. `newest` has a row for each
name of a run, for lists, filters and orders.
"""

from __future__ import annotations

import math
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from alveary_contracts.names import untoken
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import InvalidArgument, ResourceExhausted
from alveary_core.eventlog import METRICS
from alveary_core.events import Event, Key
from alveary_core.metrics import TooManyMetrics, check
from alveary_core.projection import Projection, Raw
from alveary_core.settings import MetricLimits
from alveary_runs import points
from alveary_runs.points import NO_STEP, Columns

# Pieces behind the full chunks of a series, at most.
_PIECES = 32
# Series and runs whose counters are kept in memory.
_KEPT = 20_000
# Times are kept as µs in an int64; what lies outside is no time.
_LATEST = 2**53
# One point, and the points of a message, bytes.
POINT_BYTES, _BATCH_BYTES = 1 << 20, 192 << 10
# Metrics of a run that GetRun and ListRuns show unless they are told which.
SHOWN = 64


@dataclass
class _Series:
    """Counters of a series. `chunked`: points in full chunks; `pieces`: short ones behind them."""

    id: int
    points: int = 0
    chunked: int = 0
    pieces: int = 0
    # The smallest step, and how many points have none.
    first_step: int | None = None
    stepless: int = 0


@dataclass
class _Totals:
    """Counters of a run."""

    workspace: str
    names: int = 0
    points: int = 0
    refused: int = 0


@dataclass
class _Pending:
    """Points that are not written yet."""

    values: list[float] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    extra: dict[int, bytes] = field(default_factory=dict)


class MetricsProjection(Projection):
    """Points of all runs."""

    stream = METRICS
    subjects = ("alveary-metrics.>",)
    version = 1
    schema = """
    CREATE TABLE IF NOT EXISTS series (
      id INTEGER PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL, attempt INTEGER NOT NULL, points INTEGER NOT NULL,
      chunked INTEGER NOT NULL, pieces INTEGER NOT NULL, first_step INTEGER, stepless INTEGER NOT NULL);
    CREATE UNIQUE INDEX IF NOT EXISTS series_name ON series (run, name, attempt);
    CREATE TABLE IF NOT EXISTS chunks (series INTEGER NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL, summary BLOB, data BLOB NOT NULL);
    CREATE UNIQUE INDEX IF NOT EXISTS chunks_start ON chunks (series, start);
    -- SQLite has no NaN: it is kept as value 0 with nan 1, which also gives every value its place in an order. A name
    -- without a number has value NULL.
    CREATE TABLE IF NOT EXISTS newest (
      run TEXT NOT NULL, name TEXT NOT NULL, workspace TEXT NOT NULL, nth INTEGER NOT NULL, attempt INTEGER NOT NULL, value REAL,
      nan INTEGER NOT NULL, PRIMARY KEY (run, name)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS newest_order ON newest (workspace, name, nan, value, run) WHERE value IS NOT NULL;
    CREATE INDEX IF NOT EXISTS newest_nth ON newest (run, nth);
    CREATE TABLE IF NOT EXISTS totals (
      run TEXT PRIMARY KEY, workspace TEXT NOT NULL, names INTEGER NOT NULL, points INTEGER NOT NULL, refused INTEGER NOT NULL) WITHOUT ROWID;
    """

    def __init__(self, path: str, limits: MetricLimits | None = None) -> None:
        self.limits = limits or MetricLimits()
        self.forget()
        super().__init__(path)

    def forget(self) -> None:
        """Nothing is known but what the file says."""
        self._series: OrderedDict[tuple[str, int, str], _Series] = OrderedDict()
        self._totals: OrderedDict[str, _Totals] = OrderedDict()
        self._pending: dict[tuple[str, int, str], _Pending] = {}
        self._newest: dict[tuple[str, str], tuple[int, float]] = {}

    def decode(self, raw: Raw) -> Event | None:
        """A batch of points as an event."""
        try:
            _, workspace, run = raw.subject.split(".")
            key = Key(untoken(workspace), "metrics", untoken(run))
            return Event("", key, "logged", pb.MetricBatch.FromString(raw.data), raw.sequence, 0.0)
        except (DecodeError, ValueError) as error:
            telemetry.logger().warning("metrics.unknown", subject=raw.subject, sequence=raw.sequence, error=str(error))
            return None

    async def admit(self, run: str, logged: Sequence[pb.MetricPoint]) -> None:
        """Return where a run may log these points.

        Raises:
            InvalidArgument: a point has no name, or is too large.
            ResourceExhausted: the run has as much as it may have.
        """
        for point in logged:
            if problem := point_problem(point):
                raise InvalidArgument(("points", problem))
        names = sorted({point.name for point in logged})

        def count(db: sqlite3.Connection) -> tuple[int, int]:
            row = db.execute("SELECT names, points FROM totals WHERE run=?", (run,)).fetchone() or (0, 0)
            sql = "SELECT 1 FROM newest WHERE run=? AND name=?"
            fresh = sum(db.execute(sql, (run, name)).fetchone() is None for name in names)
            return row[0] + fresh, row[1] + len(logged)

        try:
            check(self.limits, *await self.read(count))
        except TooManyMetrics as error:
            raise ResourceExhausted(f"run {run}: {error}") from error

    async def erase(self, run: str) -> None:
        """Forget all that a run logged."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM chunks WHERE series IN (SELECT id FROM series WHERE run=?)", (run,))
            for table in ("series", "newest", "totals"):
                db.execute(f"DELETE FROM {table} WHERE run=?", (run,))
            self.forget()

        await self.write(work)

    # ---- writing --------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Take the points of a batch; `flush` writes them."""
        batch, run = event.message, event.key.id
        assert isinstance(batch, pb.MetricBatch)
        totals = self._totals_of(event.key)
        attempt = batch.attempt
        for point in batch.points:
            name = point.name
            pending = self._pending.get((run, attempt, name))
            if pending is None:
                if not self._admit(totals, run, attempt, name):
                    totals.refused += 1
                    continue
                pending = self._pending[run, attempt, name] = _Pending()
            if totals.points >= self.limits.metric_points:
                totals.refused += 1
                continue
            totals.points += 1
            kind = point.WhichOneof("value")
            value = point.scalar if kind == "scalar" else math.nan
            if kind != "scalar" or point.description:
                kept = pb.MetricPoint()
                kept.CopyFrom(point)
                for field_name in ("name", "time", "step", "scalar"):
                    kept.ClearField(field_name)
                pending.extra[len(pending.values)] = kept.SerializeToString()
            if kind == "scalar" and attempt >= self._newest.get((run, name), (attempt, 0.0))[0]:
                self._newest[run, name] = (attempt, value)
            time = point.time
            pending.values.append(value)
            pending.times.append(max(-_LATEST, min(time.seconds * 1_000_000 + time.nanos // 1000, _LATEST)))
            pending.steps.append(point.step if point.HasField("step") else NO_STEP)

    def _totals_of(self, key: Key) -> _Totals:
        if key.id not in self._totals:
            row = self.db.execute("SELECT workspace, names, points, refused FROM totals WHERE run=?", (key.id,)).fetchone()
            self._totals[key.id] = _Totals(*row) if row else _Totals(key.workspace)
        return self._totals[key.id]

    def _admit(self, totals: _Totals, run: str, attempt: int, name: str) -> bool:
        """Whether points of a series are taken; makes the rows of a new one."""
        if self._find(run, attempt, name) is not None:
            return True
        known = self.db.execute("SELECT 1 FROM newest WHERE run=? AND name=?", (run, name)).fetchone()
        if not known:
            if totals.names >= self.limits.metric_names:
                return False
            totals.names += 1
            row = (run, name, totals.workspace, totals.names, attempt)
            self.db.execute("INSERT INTO newest VALUES (?,?,?,?,?,NULL,0)", row)
        made = self.db.execute(
            "INSERT INTO series (run, name, attempt, points, chunked, pieces, stepless) VALUES (?,?,?,0,0,0,0)", (run, name, attempt)
        )
        assert made.lastrowid is not None
        self._series[run, attempt, name] = _Series(made.lastrowid)
        return True

    def _find(self, run: str, attempt: int, name: str) -> _Series | None:
        key = (run, attempt, name)
        if key in self._series:
            self._series.move_to_end(key)
        else:
            sql = "SELECT id, points, chunked, pieces, first_step, stepless FROM series WHERE run=? AND name=? AND attempt=?"
            row = self.db.execute(sql, (run, name, attempt)).fetchone()
            if row is None:
                return None
            self._series[key] = _Series(*row)
        return self._series[key]

    def flush(self) -> None:
        """Write the points that `apply` took."""
        rows = []
        for (run, attempt, name), pending in self._pending.items():
            if not pending.values:
                continue
            series = self._find(run, attempt, name)
            assert series is not None
            columns = Columns.of(pending.values, pending.times, pending.steps, pending.extra)
            with_step = columns.steps[columns.steps != NO_STEP]
            if len(with_step):
                first = int(with_step.min())
                series.first_step = first if series.first_step is None else min(first, series.first_step)
            series.stepless += len(columns) - len(with_step)
            self._append(series, columns)
            rows.append((series.points, series.chunked, series.pieces, series.first_step, series.stepless, series.id))
        self.db.executemany("UPDATE series SET points=?, chunked=?, pieces=?, first_step=?, stepless=? WHERE id=?", rows)
        newest = [(*stored(value), attempt, run, name, attempt) for (run, name), (attempt, value) in self._newest.items()]
        self.db.executemany("UPDATE newest SET value=?, nan=?, attempt=? WHERE run=? AND name=? AND (attempt<=? OR value IS NULL)", newest)
        totals = [(run, t.workspace, t.names, t.points, t.refused) for run, t in self._totals.items()]
        self.db.executemany("INSERT OR REPLACE INTO totals VALUES (?,?,?,?,?)", totals)
        self._totals.clear()
        self._pending.clear()
        self._newest.clear()
        while len(self._series) > _KEPT:
            self._series.popitem(last=False)

    def _append(self, series: _Series, columns: Columns) -> None:
        begin = series.points
        series.points += len(columns)
        if series.pieces < _PIECES and series.points - series.chunked < points.CHUNK and not points.full(columns):
            self._put(series.id, begin, columns)
            series.pieces += 1
            return
        tail = self.db.execute("SELECT data FROM chunks WHERE series=? AND start>=? ORDER BY start", (series.id, series.chunked))
        whole = points.concatenate([*(Columns.decode(row["data"]) for row in tail.fetchall()), columns])
        self.db.execute("DELETE FROM chunks WHERE series=? AND start>=?", (series.id, series.chunked))
        while size := points.full(whole):
            self._put(series.id, series.chunked, whole.slice(0, size), full=True)
            series.chunked += size
            whole = whole.slice(size, len(whole))
        series.pieces = 0
        if len(whole):
            self._put(series.id, series.chunked, whole)
            series.pieces = 1

    def _put(self, series: int, start: int, columns: Columns, *, full: bool = False) -> None:
        summary = columns.summary() if full else None
        self.db.execute("INSERT INTO chunks VALUES (?,?,?,?,?)", (series, start, len(columns), summary, columns.encode()))


def point_problem(point: pb.MetricPoint) -> str | None:
    """Why a point cannot be taken, as a sentence that names it."""
    if not 1 <= len(point.name) <= 256:
        return f"a metric's name has 1 to 256 characters, {point.name[:80]!r} has {len(point.name):,}"
    if point.ByteSize() > POINT_BYTES:
        return f"metric {point.name!r}: a point of {point.ByteSize():,} bytes is more than the {POINT_BYTES:,} allowed; store it as a file"
    return None


def batches(logged: Sequence[pb.MetricPoint], attempt: int) -> Iterator[pb.MetricBatch]:
    """Points as messages that the stream takes."""
    batch, size = pb.MetricBatch(attempt=attempt), 0
    for point in logged:
        if batch.points and size + point.ByteSize() > _BATCH_BYTES:
            yield batch
            batch, size = pb.MetricBatch(attempt=attempt), 0
        batch.points.append(point)
        size += point.ByteSize()
    if batch.points:
        yield batch


def stored(value: float) -> tuple[float, int]:
    """`value` and `nan` of a number, as the table `newest` keeps them: SQLite would make NaN a NULL."""
    return (0.0, 1) if math.isnan(value) else (value, 0)


def show(db: sqlite3.Connection, run: pb.Run, names: Sequence[str]) -> None:
    """Fill in the newest values of a run: those that are named, else the first that it logged."""
    sql = "SELECT name, value, nan FROM newest WHERE run=? AND value IS NOT NULL"
    if names:
        found = db.execute(f"{sql} AND name IN ({','.join('?' * len(names))})", (run.id, *names))
    else:
        found = db.execute(f"{sql} ORDER BY nth LIMIT {SHOWN}", (run.id,))
    for name, value, nan in found:
        run.metrics[name] = math.nan if nan else value
    total = db.execute("SELECT names FROM totals WHERE run=?", (run.id,)).fetchone()
    run.metric_count = total[0] if total else 0
