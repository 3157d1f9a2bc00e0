"""GetMetrics: pages of points, whole or thinned, from the read model of metrics."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.errors import InvalidArgument
from alveary_runs import points
from alveary_runs.points import NO_STEP, SUMMARY, Columns

# What makes a page full: points as messages, points in columns, bytes of descriptions and the like, and stretches.
_POINTS, _COLUMN_POINTS, _EXTRA_BYTES, _STRETCHES = 20_000, 100_000, 2 << 20, 2_000
LEAST, MOST = 4, 10_000


@dataclass(frozen=True)
class Query:
    """What is asked for."""

    name: str = ""
    attempt: int = 0
    max_points: int = 0
    columns: bool = False


@dataclass(frozen=True)
class Token:
    """Where a page begins: which run, behind which series or at which point of it."""

    run: str = ""
    series: int = 0
    start: int = 0

    def encode(self) -> str:
        """As clients carry it."""
        return base64.urlsafe_b64encode(json.dumps([self.run, self.series, self.start]).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> Token:
        """The inverse.

        Raises:
            InvalidArgument: it is none of ours.
        """
        try:
            found = json.loads(base64.urlsafe_b64decode(text.encode()))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or [type(x) for x in found] != [str, int, int] or not all(0 <= x < 2**63 for x in found[1:]):
            raise InvalidArgument(("page_token", "not a token that GetMetrics gave"))
        return cls(*found)


def checked(request: pb.GetMetricsRequest) -> Query:
    """What a request asks for.

    Raises:
        InvalidArgument: it makes no sense.
    """
    if request.max_points and not LEAST <= request.max_points <= MOST:
        raise InvalidArgument(("max_points", f"{request.max_points}: {LEAST} to {MOST}, or 0 for all points"))
    if request.attempt < 0:
        raise InvalidArgument(("attempt", f"{request.attempt}: the number of an attempt, or 0"))
    return Query(request.name, request.attempt, request.max_points, request.columns)


def page(db: sqlite3.Connection, runs: list[str], query: Query, begin: Token) -> tuple[list[pb.MetricSeries], Token | None]:
    """Stretches of the metrics of `runs`, and where the next page begins (None: there is none)."""
    found: list[pb.MetricSeries] = []
    count = extra = 0
    most = _COLUMN_POINTS if query.columns else _POINTS
    for run in runs:
        after = begin.series if run == begin.run else 0
        sql = "SELECT id, name, attempt, points, chunked FROM series WHERE run=? AND id>=? AND (?='' OR name=?) AND (?=0 OR attempt=?) ORDER BY id"
        for row in db.execute(sql, (run, after, query.name, query.name, query.attempt, query.attempt)):
            start = begin.start if run == begin.run and row["id"] == begin.series else 0
            cut = None if query.attempt else _cut(db, run, row["name"], row["attempt"])
            for place, columns in _stretches(db, row, cut, query, start):
                if count >= most or extra >= _EXTRA_BYTES or len(found) >= _STRETCHES:
                    return found, Token(run, row["id"], place)
                if len(columns):
                    found.append(_message(run, row, columns, query))
                    count += len(columns)
                    extra += sum(map(len, columns.extra.values()))
    return found, None


@dataclass(frozen=True)
class _Cut:
    """What of a series later attempts replaced: points from a step on, and points without a step."""

    step: int | None
    stepless: bool

    def keep(self, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        kept = np.ones(len(steps), bool)
        if self.step is not None:
            kept &= (steps < self.step) | (steps == NO_STEP)
        if self.stepless:
            kept &= steps != NO_STEP
        return kept


def _cut(db: sqlite3.Connection, run: str, name: str, attempt: int) -> _Cut | None:
    sql = "SELECT min(first_step), max(stepless) FROM series WHERE run=? AND name=? AND attempt>? AND points>0"
    step, stepless = db.execute(sql, (run, name, attempt)).fetchone()
    return None if step is None and not stepless else _Cut(step, bool(stepless))


def _stretches(db: sqlite3.Connection, row: sqlite3.Row, cut: _Cut | None, query: Query, start: int) -> Iterator[tuple[int, Columns]]:
    """(place, points) of a series from a point on, or all of it at once where it is thinned."""
    if query.max_points and row["points"] > query.max_points:
        yield 0, _thinned(db, row, cut, query.max_points)
        return
    # What was a piece when the token was given may have been merged with others since.
    sql = "SELECT start, data FROM chunks WHERE series=? AND start>=coalesce((SELECT max(start) FROM chunks WHERE series=? AND start<=?), 0) ORDER BY start"
    for place, data in db.execute(sql, (row["id"], row["id"], start)):
        columns = Columns.decode(data)
        if place < start:
            columns = columns.slice(start - place, len(columns))
        if cut is not None:
            columns = columns.take(np.flatnonzero(cut.keep(columns.steps)))
        yield max(place, start), columns


def _thinned(db: sqlite3.Connection, row: sqlite3.Row, cut: _Cut | None, most: int) -> Columns:
    """At most `most` points that draw as the whole series does.

    Where the chunks' summaries are finer than what is wanted, they are enough.
    """
    parts: list[Columns] = []
    summarized = row["chunked"] // points.CHUNK * points.SUMMARIES >= most
    sql = f"SELECT start, {'CASE WHEN summary IS NULL THEN data END, summary' if summarized else 'data, NULL'} FROM chunks WHERE series=? ORDER BY start"
    for place, data, summary in db.execute(sql, (row["id"],)):
        if summary is not None:
            short = np.frombuffer(summary, SUMMARY)
            columns = Columns(short["value"], short["time"], short["step"])
            if cut is not None and not cut.keep(columns.steps).all():  # which points remain only the chunk itself knows
                (data,) = db.execute("SELECT data FROM chunks WHERE series=? AND start=?", (row["id"], place)).fetchone()
                columns = Columns.decode(data)
        else:
            columns = Columns.decode(data)
        if cut is not None:
            columns = columns.take(np.flatnonzero(cut.keep(columns.steps)))
        parts.append(columns)
    whole = points.concatenate(parts)
    if len(whole) and np.isnan(whole.values).all():
        return whole.take(np.unique(np.linspace(0, len(whole) - 1, min(most, len(whole))).astype(np.int64)))
    return whole.take(points.thin(whole.values, most))


def _message(run: str, row: sqlite3.Row, columns: Columns, query: Query) -> pb.MetricSeries:
    made = pb.MetricSeries(name=row["name"], run_id=run, attempt=row["attempt"], point_count=row["points"])
    if query.columns and not columns.extra:
        made.columns.values.extend(columns.values.tolist())
        made.columns.times_us.extend(columns.times.tolist())
        if (columns.steps != NO_STEP).any():
            made.columns.steps.extend(columns.steps.tolist())
    else:
        made.points.extend(columns.points(row["name"]))
    return made
