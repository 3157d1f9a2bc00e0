"""ListRuns on the read model: from a filter to one page, in a time that does not grow with the number of runs.

A page is read in its order from an index, and each run on the way is tested for the other conditions (probes). Which index is
decided by counting, up to `_FEW`, what each condition leaves: the rarest one drives. Where a condition leaves few runs but not in
the order that is asked for, they are collected and sorted.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alveary_runs.query import Condition

# So many runs are collected and sorted as fast as a page is found among a million by probing.
_FEW = 10_000
# Indexes of runs by columns, each in the order of submission; the first that a filter names is preferred.
_INDEXES = {"parent": "runs_parent", "name": "runs_name", "experiment": "runs_experiment", "target": "runs_target", "state": "runs_state"}
_LABELS = ("tags", "properties")


@dataclass(frozen=True)
class Listing:
    """What is asked for. `metric`: the name that orders, or "" for the time of submission."""

    workspace: str
    conditions: Sequence[Condition]
    metric: str
    direction: str
    archived: bool
    size: int
    after: tuple[int, float, str] | None = None


@dataclass(frozen=True)
class Found:
    """A run of a page, and its place in the order."""

    proto: bytes
    nan: int
    rank: float
    id: str


class _Sql:
    """Text and the parameters in it, in their order."""

    def __init__(self, text: str = "", *values: Any) -> None:
        self.text, self.values = text, list(values)

    def add(self, text: str, *values: Any) -> _Sql:
        self.text += text
        self.values += values
        return self

    def all(self, db: sqlite3.Connection) -> list[sqlite3.Row]:
        return db.execute(self.text, self.values).fetchall()


def page(db: sqlite3.Connection, ask: Listing) -> list[Found]:
    """At most `size` + 1 runs: one more than the page says that there is a next page."""
    driver, count = _driver(db, ask)
    if driver is not None and (not _ordered(driver) or (ask.metric and count < _FEW)):
        return _collected(db, ask, driver)
    return _by_metric(db, ask) if ask.metric else _by_time(db, ask, driver)


# ---- which condition drives ------------------------------------------------------------------------------------------


def _driver(db: sqlite3.Connection, ask: Listing) -> tuple[Condition | None, int]:
    """The condition that leaves the fewest runs, as far as an index can tell, and how many; None: none leaves few enough."""
    best: tuple[int, int, Condition] | None = None
    for place, condition in enumerate(ask.conditions):
        source = _source(ask, condition)
        if source is None:
            continue
        counted = _Sql("SELECT count(*) FROM (SELECT 1 FROM ").add(source.text, *source.values).add(" LIMIT ?)", _FEW)
        count = counted.all(db)[0][0]
        if count == _FEW and not _ordered(condition):
            continue
        if best is None or count < best[0]:
            best = (count, place, condition)
    return (best[2], best[0]) if best else (None, _FEW)


def _ordered(condition: Condition) -> bool:
    """Whether its index gives runs in the order of submission."""
    return condition.operator == "=" and (condition.kind in _LABELS or condition.name in _INDEXES)


def _source(ask: Listing, condition: Condition) -> _Sql | None:
    """Table and WHERE of the index that finds the runs of a condition; None: there is none."""
    kind, name, operator, value = condition.kind, condition.name, condition.operator, condition.value
    if operator == "!=":
        return None
    if kind in _LABELS:
        return _Sql(f"labels d WHERE d.workspace=? AND d.kind=? AND d.key=? AND d.value {operator} ?", ask.workspace, kind, name, value)
    if kind == "metrics":
        sql = _Sql("newest d INDEXED BY newest_order WHERE d.workspace=? AND d.name=? AND d.value IS NOT NULL", ask.workspace, name)
        return sql.add(" AND d.nan=1") if math.isnan(value) else sql.add(f" AND d.nan=0 AND d.value {operator} ?", value)
    if operator == "=" and name == "id":
        return _Sql("runs d WHERE d.id=?", value)
    if operator == "=" and name in _INDEXES:
        return _Sql(f"runs d INDEXED BY {_INDEXES[name]} WHERE d.workspace=? AND d.{name}=?", ask.workspace, value)
    return None


# ---- the page --------------------------------------------------------------------------------------------------------


def _probes(ask: Listing, but: Condition | None = None) -> _Sql:
    """Conditions on the run `r`, as AND ..., without `but`."""
    sql = _Sql()
    if not ask.archived:
        sql.add(" AND r.archived=0")
    for condition in ask.conditions:
        if condition is not but:
            probe = _probe(condition)
            sql.add(f" AND {probe.text}", *probe.values)
    return sql


def _probe(condition: Condition) -> _Sql:
    kind, name, operator, value = condition.kind, condition.name, condition.operator, condition.value
    if kind in _LABELS:
        exists = "EXISTS (SELECT 1 FROM labels l INDEXED BY labels_run WHERE l.run=r.id AND l.kind=? AND l.key=? AND l.value {} ?)"
        negated = operator == "!="
        return _Sql(("NOT " if negated else "") + exists.format("=" if negated else operator), kind, name, value)
    if kind == "metrics":
        number = _number("n", operator, value)
        return _Sql("EXISTS (SELECT 1 FROM newest n WHERE n.run=r.id AND n.name=? AND n.value IS NOT NULL", name).add(
            f" AND {number.text})", *number.values
        )
    return _Sql(f"r.{name} {operator} ?", value)


def _number(alias: str, operator: str, number: float) -> _Sql:
    """A comparison with a metric's value, as IEEE 754 has it; "= nan" asks whether it is NaN."""
    if math.isnan(number):
        return _Sql(f"{alias}.nan {operator} 1")
    if operator == "!=":
        return _Sql(f"({alias}.nan OR {alias}.value != ?)", number)
    return _Sql(f"({alias}.nan=0 AND {alias}.value {operator} ?)", number)


def _limit(sql: _Sql, ask: Listing, rank: str, ident: str, size: int) -> _Sql:
    return sql.add(f" ORDER BY {rank} {ask.direction}, {ident} {ask.direction} LIMIT ?", size)


def _behind(ask: Listing) -> str:
    return ">" if ask.direction == "ASC" else "<"


def _by_time(db: sqlite3.Connection, ask: Listing, driver: Condition | None) -> list[Found]:
    """In the order of submission, along the index of `driver` or of all runs."""
    place = ("r.submitted_at", "r.id")
    if driver is not None and driver.kind in _LABELS:
        sql = _Sql(
            "SELECT r.proto, r.id, l.submitted_at AS rank FROM labels l CROSS JOIN runs r ON r.id=l.run WHERE l.workspace=?", ask.workspace
        )
        sql.add(" AND l.kind=? AND l.key=? AND l.value=? AND r.workspace=l.workspace", driver.kind, driver.name, driver.value)
        place = ("l.submitted_at", "l.run")
    elif driver is not None:
        sql = _Sql(
            f"SELECT r.proto, r.id, r.submitted_at AS rank FROM runs r INDEXED BY {_INDEXES[driver.name]} WHERE r.workspace=?",
            ask.workspace,
        )
        sql.add(f" AND r.{driver.name}=?", driver.value)
    else:
        index = "runs_all" if ask.archived else "runs_shown"
        sql = _Sql(f"SELECT r.proto, r.id, r.submitted_at AS rank FROM runs r INDEXED BY {index} WHERE r.workspace=?", ask.workspace)
    probes = _probes(ask, driver)
    sql.add(probes.text, *probes.values)
    if ask.after is not None:
        sql.add(f" AND ({place[0]}, {place[1]}) {_behind(ask)} (?, ?)", ask.after[1], ask.after[2])
    return [Found(r["proto"], 0, r["rank"], r["id"]) for r in _limit(sql, ask, *place, ask.size + 1).all(db)]


def _by_metric(db: sqlite3.Connection, ask: Listing) -> list[Found]:
    """In the order of a metric, along its index: first what is a number, then NaN."""
    found: list[Found] = []
    # Conditions on the metric that orders bound the walk along its index.
    own = [x for x in ask.conditions if x.kind == "metrics" and x.name == ask.metric]
    others = Listing(ask.workspace, [x for x in ask.conditions if x not in own], ask.metric, ask.direction, ask.archived, ask.size)
    probes = _probes(others)
    for nan in (0, 1):
        if len(found) > ask.size or (ask.after is not None and ask.after[0] > nan):
            continue
        sql = _Sql(
            "SELECT r.proto, r.id, n.value AS rank FROM newest n INDEXED BY newest_order CROSS JOIN runs r ON r.id=n.run "
            f"WHERE n.workspace=? AND n.name=? AND n.value IS NOT NULL AND n.nan={nan} AND r.workspace=n.workspace",
            ask.workspace, ask.metric,
        )  # fmt: skip
        for condition in own:
            if nan == 0 and condition.operator != "!=" and not math.isnan(condition.value):
                sql.add(f" AND n.value {condition.operator} ?", condition.value)
            else:
                number = _number("n", condition.operator, condition.value)
                sql.add(f" AND {number.text}", *number.values)
        sql.add(probes.text, *probes.values)
        if ask.after is not None and ask.after[0] == nan:
            sql.add(f" AND (n.value, n.run) {_behind(ask)} (?, ?)", ask.after[1], ask.after[2])
        rows = _limit(sql, ask, "n.value", "n.run", ask.size + 1 - len(found)).all(db)
        found += [Found(r["proto"], nan, r["rank"], r["id"]) for r in rows]
    return found


def _collected(db: sqlite3.Connection, ask: Listing, driver: Condition) -> list[Found]:
    """All runs of a condition that leaves few, sorted."""
    source = _source(ask, driver)
    assert source is not None
    key = "d.id" if source.text.startswith("runs") else "d.run"
    if ask.metric:
        sql = _Sql("SELECT r.proto, r.id, n.nan AS nan, n.value AS rank FROM (SELECT DISTINCT ")
    else:
        sql = _Sql("SELECT r.proto, r.id, 0 AS nan, r.submitted_at AS rank FROM (SELECT DISTINCT ")
    sql.add(f"{key} AS run FROM {source.text}", *source.values).add(") x CROSS JOIN runs r ON r.id=x.run")
    if ask.metric:
        sql.add(" CROSS JOIN newest n ON n.run=r.id AND n.name=? AND n.value IS NOT NULL", ask.metric)
    probes = _probes(ask, driver)
    sql.add(" WHERE r.workspace=?", ask.workspace).add(probes.text, *probes.values)
    whole = _Sql("SELECT * FROM (").add(sql.text, *sql.values).add(")")
    if ask.after is not None:
        nan, rank, last = ask.after
        whole.add(f" WHERE nan > ? OR (nan = ? AND (rank, id) {_behind(ask)} (?, ?))", nan, nan, rank, last)
    whole.add(f" ORDER BY nan, rank {ask.direction}, id {ask.direction} LIMIT ?", ask.size + 1)
    return [Found(r["proto"], r["nan"], r["rank"], r["id"]) for r in whole.all(db)]
