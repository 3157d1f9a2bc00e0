"""Keeps replay short: a run that has been final for long becomes one event, and the earlier ones are purged.

Two steps, each harmless to repeat: append RunCompacted, which says all that the run's events say together; then purge
what lies before it. A death in between leaves events that nobody needs, until the next pass.
"""

from __future__ import annotations

import asyncio
import time

from google.protobuf.timestamp_pb2 import Timestamp

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core import telemetry
from alveary_core.aggregates import Aggregates
from alveary_core.errors import AlvearyError
from alveary_core.eventlog import EventLog
from alveary_core.events import Key
from alveary_runs import domain
from alveary_runs.projection import RunsProjection

# Work of one pass, so that a pass after long idleness does not hold up anything.
_BATCH = 200
_FINAL = (c.RUN_STATE_COMPLETED, c.RUN_STATE_FAILED, c.RUN_STATE_CANCELED)


class Compaction:
    """Compacts runs that ended more than `after` seconds ago, looking every `interval` seconds."""

    def __init__(self, log: EventLog, runs: Aggregates[domain.Run], view: RunsProjection, after: float, interval: float) -> None:
        self._log, self._runs, self._view = log, runs, view
        self._after, self._interval = after, interval

    async def run(self) -> None:
        """For ever."""
        await self._view.caught_up.wait()
        while True:
            try:
                done = await self.compact(time.time()) + await self.purge()
            except AlvearyError as error:  # the log does not answer: next time
                telemetry.logger().warning("compaction", error=str(error))
                done = 0
            await asyncio.sleep(0.1 if done >= _BATCH else self._interval)

    async def compact(self, now: float) -> int:
        """Append the one event of runs that are due; returns how many."""
        sql = (
            "SELECT r.workspace, r.id FROM runs r LEFT JOIN compacted x ON x.run = r.id "
            "WHERE r.state IN (?,?,?) AND x.run IS NULL AND r.submitted_at < ? ORDER BY r.submitted_at LIMIT ?"
        )
        count = 0
        for workspace, run_id in await self._view.rows(sql, (*_FINAL, now - self._after, _BATCH), slow=True):
            shown, first = await self._view.get(workspace, run_id), await self._view.submission(run_id)
            if shown is None or first is None or shown.ended_at.ToNanoseconds() / 1e9 > now - self._after:
                continue
            names = [name for name in ("submitted_at", "started_at", "ended_at") if shown.HasField(name)]  # type: ignore[arg-type]
            times: dict[str, Timestamp] = {name: getattr(shown, name) for name in names}
            key = self._runs.key(workspace, run_id)
            _, sequence = await self._runs.execute(key, lambda run, first=first, times=times: domain.compact(run, first, times))  # type: ignore[misc]
            await self._view.wait_for(sequence)
            count += 1
        return count

    async def purge(self) -> int:
        """Remove what compacted runs no longer need; returns of how many."""
        rows = await self._view.rows("SELECT run, workspace, sequence FROM compacted WHERE purged=0 LIMIT ?", (_BATCH,))
        done: list[tuple[str]] = []
        for run_id, workspace, sequence in rows:
            shown = await self._view.get(workspace, run_id)
            await self._log.purge(Key(workspace, "run", run_id), before=sequence)
            await self._log.purge(Key(workspace, "placement", run_id), before=sequence)
            for attempt in range(1, (shown.attempt if shown else 0) + 1):
                await self._log.purge(Key(workspace, "attempt", f"{run_id}-{attempt}"), before=sequence)
            done.append((run_id,))
        if done:
            await self._view.write(lambda db: db.executemany("UPDATE compacted SET purged=1 WHERE run=?", done))
        return len(rows)
