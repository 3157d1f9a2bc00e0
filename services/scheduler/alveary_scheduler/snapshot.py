"""Rows of what past events have left behind, so that a restart decides as a replay of all events would.

The projection drops events of runs and nodes that are gone. What they still bear on is kept here: average shares,
failures of nodes, the reservation, and the mix of requests that a policy has learnt.
"""

from __future__ import annotations

import json
import sqlite3

from alveary_scheduler.core.mix import WINDOW
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import Shape
from alveary_scheduler.state import State, TargetKey

SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (workspace TEXT, target TEXT, user TEXT, average REAL, at REAL,
  PRIMARY KEY (workspace, target, user)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (workspace TEXT, target TEXT, node TEXT, runs TEXT, until REAL,
  PRIMARY KEY (workspace, target, node)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reservation (workspace TEXT, target TEXT, run TEXT, nodes TEXT,
  PRIMARY KEY (workspace, target)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mix (workspace TEXT, target TEXT, arrivals INTEGER, current TEXT,
  PRIMARY KEY (workspace, target)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS arrival (workspace TEXT, target TEXT, number INTEGER, shape TEXT,
  PRIMARY KEY (workspace, target, number)) WITHOUT ROWID;
"""
_TABLES = ("usage", "failures", "reservation", "mix", "arrival")


def save(db: sqlite3.Connection, state: State) -> None:
    """Write what has changed since the last time."""
    for key, pool in state.pools.items():
        _save_usage(db, key, pool)
        _save_failures(db, key, pool)
        _save_reservation(db, key, pool)
        _save_mix(db, key, pool)


def forget(db: sqlite3.Connection, key: TargetKey) -> None:
    """Drop all rows of a target that was deleted."""
    for table in _TABLES:
        db.execute(f"DELETE FROM {table} WHERE workspace=? AND target=?", key)


def load(db: sqlite3.Connection, state: State) -> None:
    """Complete a state that was folded from the live rows."""
    for key, pool in state.pools.items():
        rows = db.execute("SELECT user, average, at FROM usage WHERE workspace=? AND target=?", key).fetchall()
        pool.ledger.restore({(key[0], row["user"]): (row["average"], row["at"]) for row in rows})
        rows = db.execute("SELECT node, runs, until FROM failures WHERE workspace=? AND target=?", key).fetchall()
        pool.quarantine.restore({row["node"]: (json.loads(row["runs"]), row["until"]) for row in rows})
        row = db.execute("SELECT run, nodes FROM reservation WHERE workspace=? AND target=?", key).fetchone()
        pool.reservations.restore(Reservation(row["run"], frozenset(json.loads(row["nodes"]))) if row else None)
        _load_mix(db, key, pool)


def _save_usage(db: sqlite3.Connection, key: TargetKey, pool: Pool) -> None:
    for account in pool.ledger.changed:
        usage = pool.ledger.accounts[account]
        db.execute("INSERT OR REPLACE INTO usage VALUES (?,?,?,?,?)", (*key, account[1], usage.average, usage.at))
    pool.ledger.changed.clear()


def _save_failures(db: sqlite3.Connection, key: TargetKey, pool: Pool) -> None:
    for node in pool.quarantine.changed:
        record = pool.quarantine.record(node)
        if record is None:
            db.execute("DELETE FROM failures WHERE workspace=? AND target=? AND node=?", (*key, node))
        else:
            db.execute("INSERT OR REPLACE INTO failures VALUES (?,?,?,?,?)", (*key, node, json.dumps(record[0]), record[1]))
    pool.quarantine.changed.clear()


def _save_reservation(db: sqlite3.Connection, key: TargetKey, pool: Pool) -> None:
    if not pool.reservations.changed:
        return
    current = pool.reservations.current
    if current is None:
        db.execute("DELETE FROM reservation WHERE workspace=? AND target=?", key)
    else:
        db.execute("INSERT OR REPLACE INTO reservation VALUES (?,?,?,?)", (*key, current.run, json.dumps(sorted(current.nodes))))
    pool.reservations.changed = False


def _save_mix(db: sqlite3.Connection, key: TargetKey, pool: Pool) -> None:
    mix = pool.mix
    if mix is None or not mix.unsaved:
        return
    newest = list(mix.window)[-mix.unsaved :]
    first = mix.arrivals - len(newest) + 1
    db.executemany("INSERT OR REPLACE INTO arrival VALUES (?,?,?,?)", [(*key, first + i, _text(shape)) for i, shape in enumerate(newest)])
    db.execute("DELETE FROM arrival WHERE workspace=? AND target=? AND number<=?", (*key, mix.arrivals - WINDOW))
    current = json.dumps([(_text(shape), weight) for shape, weight in mix.current])
    db.execute("INSERT OR REPLACE INTO mix VALUES (?,?,?,?)", (*key, mix.arrivals, current))
    mix.unsaved = 0


def _load_mix(db: sqlite3.Connection, key: TargetKey, pool: Pool) -> None:
    row = db.execute("SELECT arrivals, current FROM mix WHERE workspace=? AND target=?", key).fetchone()
    if pool.mix is None or row is None:
        return
    rows = db.execute("SELECT shape FROM arrival WHERE workspace=? AND target=? ORDER BY number", key).fetchall()
    current = [(_shape(text), weight) for text, weight in json.loads(row["current"])]
    pool.mix.restore([_shape(each["shape"]) for each in rows], row["arrivals"], current)
    pool.nodes.learn(current)


def _text(shape: Shape) -> str:
    parts = (shape.cpu_milli, shape.memory, shape.gpus, shape.gpu_milli, sorted(shape.models), sorted(shape.labels))
    return json.dumps(parts)


def _shape(text: str) -> Shape:
    cpu_milli, memory, gpus, gpu_milli, models, labels = json.loads(text)
    return Shape(cpu_milli, memory, gpus, gpu_milli, frozenset(models), frozenset((key, value) for key, value in labels))
