"""Which runs exist, which are final, and which parts of their logs are archived."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event
from alveary_core.projection import Projection
from alveary_logs.archive import last_of

FINAL_SUBJECTS = ("alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled")


@dataclass(frozen=True, slots=True)
class LogState:
    """A run's log: its archived parts, whether the run is final (all that it said is stored then), whether all is archived."""

    parts: list[ev.LogArchived]
    final: bool
    complete: bool


class LogsProjection(Projection):
    """The logs service's read model."""

    subjects = ("alveary.*.run.*.submitted", "alveary.*.run.*.compacted", "alveary.*.run.*.deleted", *FINAL_SUBJECTS, "alveary.*.log.>")
    version = 4
    schema = """
    CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, workspace TEXT, final INTEGER DEFAULT 0) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS parts (run TEXT, event INTEGER, last INTEGER, open INTEGER, archived BLOB, PRIMARY KEY (run, event))
        WITHOUT ROWID;
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        match event.message:
            case ev.RunSubmitted():
                self.db.execute("INSERT OR IGNORE INTO runs (run, workspace) VALUES (?,?)", (event.key.id, event.key.workspace))
            case ev.LogArchived() as archived:
                # It may come before the run's first event, where that was compacted: the row is made here then.
                self.db.execute("INSERT OR IGNORE INTO runs (run, workspace) VALUES (?,?)", (event.key.id, event.key.workspace))
                self.db.execute(
                    "INSERT OR REPLACE INTO parts VALUES (?,?,?,?,?)",
                    (event.key.id, event.sequence, last_of(archived), archived.open, archived.SerializeToString()),
                )
            case ev.RunDeleted():
                for table in ("runs", "parts"):
                    self.db.execute(f"DELETE FROM {table} WHERE run=?", (event.key.id,))
            case _:
                self.db.execute(
                    "INSERT INTO runs (run, workspace, final) VALUES (?,?,1) ON CONFLICT DO UPDATE SET final=1",
                    (event.key.id, event.key.workspace),
                )

    async def workspace_of(self, run_id: str) -> str | None:
        """The workspace of a run; None: the view knows no such run."""
        row = await self.row("SELECT workspace FROM runs WHERE run=?", (run_id,))
        return row["workspace"] if row else None

    async def parts(self, run_id: str, after: int = 0) -> list[ev.LogArchived]:
        """The archived parts of a run's log, in order, of those that have lines behind a cursor."""
        return (await self.state(run_id, after)).parts

    async def state(self, run_id: str, after: int = 0) -> LogState:
        """What is known of a run's log at one moment, with those parts that have lines behind a cursor."""

        def work(db: sqlite3.Connection) -> LogState:
            rows = db.execute("SELECT archived FROM parts WHERE run=? AND last>? ORDER BY event", (run_id, after)).fetchall()
            run = db.execute("SELECT final FROM runs WHERE run=?", (run_id,)).fetchone()
            newest = db.execute("SELECT open FROM parts WHERE run=? ORDER BY event DESC LIMIT 1", (run_id,)).fetchone()
            complete = newest is not None and not newest[0]
            return LogState([ev.LogArchived.FromString(row[0]) for row in rows], bool(run and run[0]) or complete, complete)

        return await self.read(work)
