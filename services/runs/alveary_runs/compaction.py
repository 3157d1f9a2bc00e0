"""Keeps the log and its replay short: a run that has been final for long becomes one event, and the earlier ones are purged.

Two steps, each harmless to repeat: append RunCompacted, which says all that the run's events say together; then purge what lies
before. A death in between leaves superfluous events, until the next pass.

A purge of one subject costs nats-server more the longer the stream is, and there are three for a run. So one purge serves all runs:
every event of runs, placements and attempts before the submission of the oldest run that is not compacted belongs to runs
that are. A run that lasts for weeks holds this up; runs that wait for more than a day are purged one by one, a tenth of
the time.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import event_name
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import AlvearyError, InvalidArgument
from alveary_core.eventlog import Conflict, EventLog
from alveary_core.events import Key
from alveary_runs.projection import RunsProjection, whole

# Runs of one pass, how many are appended at once, and runs a second at most: other work must not suffer.
_BATCH, _AT_ONCE, _RATE = 200, 10, 250.0
# Purges may take this part of the time.
_SHARE = 0.1
_PATIENCE_SECONDS = 86400.0
# What may follow when a run is final: a purge for all runs would take away what is newer than the run's one event.
_LATER = ("tagged", "archived", "compacted", "deleted")
EVENTS = [name[1] for d in ev.DESCRIPTOR.message_types_by_name if (name := event_name(d)) and name[0] == "run"]
WIDE = [
    "alveary.*.placement.>", "alveary.*.attempt.>", *(f"alveary.*.run.*.{name}" for name in EVENTS if name not in _LATER)
]  # fmt: skip


class Compaction:
    """Compacts runs that ended more than `after` seconds ago, looking every `interval` seconds."""

    def __init__(self, log: EventLog, view: RunsProjection, after: float, interval: float) -> None:
        self._log, self._view = log, view
        self._after, self._interval = after, interval
        # Runs, as they are, that cannot become one event; others are compacted all the same.
        self._refused: set[bytes] = set()
        # When purging may go on, and up to which sequence everything is purged.
        self._purge_again, self._purged = 0.0, 0

    async def run(self) -> None:
        """For ever."""
        await self._view.caught_up.wait()
        while True:
            started, done = time.monotonic(), 0
            try:
                done = await self.compact(time.time())
                await self.purge(time.time())
            except AlvearyError as error:  # the log does not answer: next time
                telemetry.logger().warning("compaction", error=str(error))
            pace = done / _RATE - (time.monotonic() - started)
            await asyncio.sleep(max(pace, 0.01) if done >= _BATCH else self._interval)

    async def compact(self, now: float) -> int:
        """Append the one event of runs that are due; returns of how many."""
        sql = "SELECT workspace, idempotency, canceled, proto FROM runs WHERE compacted IS NULL AND ended_at < ? ORDER BY ended_at LIMIT ?"
        rows = await self._view.rows(sql, (now - self._after, _BATCH + len(self._refused)), slow=True)
        rows = [row for row in rows if row["proto"] not in self._refused]
        last = 0
        for begin in range(0, len(rows), _AT_ONCE):
            done = await asyncio.gather(*(self._append(row) for row in rows[begin : begin + _AT_ONCE]))
            last = max(last, *done)
        if last:
            await self._view.wait_for(last)
        return len(rows)

    async def _append(self, row: sqlite3.Row) -> int:
        shown = pb.Run.FromString(row["proto"])
        event = whole(shown, row["idempotency"], bool(row["canceled"]))
        try:
            return (await self._log.append(Key(row["workspace"], "run", shown.id), [event], shown.sequence)).sequence
        except Conflict:  # it was tagged a moment ago: next time
            return 0
        except InvalidArgument as error:  # an earlier version let values into it that no event may have: it stays as it is
            telemetry.logger().error("compaction.refused", run=shown.id, error=str(error))
            self._refused.add(row["proto"])
            return 0

    async def purge(self, now: float) -> int:
        """Remove what compacted runs no longer need; returns of how many."""
        started = time.monotonic()
        if started < self._purge_again:
            return 0
        count = 0
        try:
            oldest = await self._view.read(_oldest, slow=True)
            sql = "SELECT count(*) FROM runs WHERE purged=0 AND compacted IS NOT NULL AND last < ?"
            if oldest > self._purged and (count := (await self._view.rows(sql, (oldest,), slow=True))[0][0]):
                for subject in WIDE:
                    await self._log.purge_subject(subject, oldest)
                await self._view.write(
                    lambda db: db.execute(
                        "UPDATE runs SET purged=1 WHERE purged=0 AND compacted IS NOT NULL AND last < ? AND tagged=0", (oldest,)
                    )
                )
                self._purged = oldest
            count += await self._one_by_one("compacted IS NOT NULL AND last < ? AND tagged > 0", (self._purged,), ("tagged", "archived"))
            late = now - self._after - _PATIENCE_SECONDS
            count += await self._one_by_one("compacted IS NOT NULL AND ended_at < ?", (late,), ("*",))
        finally:
            self._purge_again = time.monotonic() + (time.monotonic() - started) / _SHARE
        return count

    async def _one_by_one(self, condition: str, parameters: tuple[float], names: tuple[str, ...]) -> int:
        """Purge `names` of runs, at most a batch of them."""
        sql = f"SELECT id, workspace, compacted, proto FROM runs WHERE purged=0 AND {condition} ORDER BY last LIMIT ?"
        done: list[tuple[str]] = []
        for row in await self._view.rows(sql, (*parameters, _BATCH), slow=True):
            workspace, run_id, before = row["workspace"], row["id"], row["compacted"]
            for name in names:
                await self._log.purge_subject(Key(workspace, "run", run_id).subject(name), before)
            if names == ("*",):
                await self._log.purge(Key(workspace, "placement", run_id), before)
                for attempt in range(1, pb.Run.FromString(row["proto"]).attempt + 1):
                    await self._log.purge(Key(workspace, "attempt", f"{run_id}-{attempt}"), before)
            done.append((run_id,))
        if done:
            await self._view.write(lambda db: db.executemany("UPDATE runs SET purged=1 WHERE id=?", done))
        return len(done)


def _oldest(db: sqlite3.Connection) -> int:
    """The sequence before which every event belongs to runs that are compacted."""
    first = db.execute("SELECT min(first) FROM runs WHERE compacted IS NULL").fetchone()[0]
    position = db.execute("SELECT sequence FROM position").fetchone()
    return int(first) if first is not None else (position[0] + 1 if position else 0)
