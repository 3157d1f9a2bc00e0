"""The scheduler's state on disk: rows of what is live, so that a restart need not replay all history."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from alveary_contracts import rules
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event, Key
from alveary_core.projection import Projection
from alveary_scheduler import snapshot
from alveary_scheduler.state import State, evolve


class SchedulerProjection(Projection):
    """Keeps the events that the live state is a fold of, and drops them when their aggregate is final."""

    subjects: Sequence[str] = (
        "alveary.*.target.>", "alveary.*.node.>", "alveary.*.placement.>", "alveary.*.run.*.prepared", "alveary.*.run.*.retrying",
        "alveary.*.run.*.cancel_requested", "alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled",
    )  # fmt: skip
    version = 2
    # The state belongs to the scheduler's decisions, which are made on the event loop.
    inline = True
    schema = (
        """
    CREATE TABLE IF NOT EXISTS live (sequence INTEGER PRIMARY KEY, workspace TEXT, aggregate TEXT, id TEXT, name TEXT,
      time REAL, message TEXT, body BLOB);
    CREATE INDEX IF NOT EXISTS live_id ON live (id);
    """
        + snapshot.SCHEMA
    )

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.state = State()
        self.specs: dict[str, Event] = {}
        self._load()

    def _load(self) -> None:
        """Fold the state from the rows of what is live."""
        self.state, self.specs = State(), {}
        for row in self.db.execute("SELECT * FROM live ORDER BY sequence").fetchall():
            key = Key(row["workspace"], row["aggregate"], row["id"])
            try:
                message = getattr(ev, row["message"])()
                message.ParseFromString(row["body"])
                self._fold(Event("", key, row["name"], message, row["sequence"], row["time"]))
            except Exception as error:  # an earlier version could fold it
                self.db.execute("DELETE FROM live WHERE sequence=?", (row["sequence"],))
                self.set_aside(row["sequence"], key.subject(row["name"]), error)
                self._load()
                return
        snapshot.load(self.db, self.state)

    def flush(self) -> None:
        """Write what the events of this transaction have left behind in the pools."""
        snapshot.save(self.db, self.state)

    def forget(self) -> None:
        """The transaction was rolled back, and with it what `apply` changed in the state."""
        self._load()

    def _wipe(self, db: sqlite3.Connection) -> None:
        super()._wipe(db)
        self.state, self.specs = State(), {}

    def _fold(self, event: Event) -> None:
        evolve(self.state, event)
        if isinstance(event.message, (ev.RunPrepared, ev.RunRetrying)):
            self.specs[event.key.id] = event
        elif event.key.aggregate == "run" and event.name in ("completed", "failed", "canceled"):
            self.specs.pop(event.key.id, None)

    def apply(self, event: Event) -> None:
        """Fold one event and keep or drop its row.

        Raises:
            ValueError: it holds numbers that nothing can be placed by; an earlier version let it into the log.
        """
        used = event.key.aggregate != "run" or isinstance(event.message, (ev.RunPrepared, ev.RunRetrying))
        if used and (found := rules.problems(event.message, texts=False)):
            raise ValueError("; ".join(f"{path}: {text}" for path, text in found))
        self._fold(event)
        key = event.key
        if key.aggregate == "run" and event.name in ("completed", "failed", "canceled"):
            self.db.execute("DELETE FROM live WHERE id=? AND aggregate IN ('run', 'placement')", (key.id,))
            return
        if key.aggregate == "node" and event.name in ("lost", "left") and key.id not in self.state.nodes:
            self.db.execute("DELETE FROM live WHERE id=? AND aggregate='node'", (key.id,))
            return
        if event.name == "created":  # whatever a target of that name left behind
            snapshot.forget(self.db, (key.workspace, key.id))
        if event.name == "deleted":
            self.db.execute("DELETE FROM live WHERE id=? AND aggregate='target' AND workspace=?", (key.id, key.workspace))
            snapshot.forget(self.db, (key.workspace, key.id))
            return
        if key.aggregate == "run" and event.name not in ("prepared", "retrying", "cancel_requested"):
            return
        if event.name == "reserved":  # a row of the snapshot
            return
        if event.name == "checkpointed":  # only the newest checkpoint counts
            self.db.execute("DELETE FROM live WHERE id=? AND name='checkpointed'", (key.id,))
        if event.name in ("waiting", "provisioning"):  # only the newest reason counts
            self.db.execute("DELETE FROM live WHERE id=? AND name IN ('waiting', 'provisioning')", (key.id,))
        self.db.execute(
            "INSERT OR IGNORE INTO live VALUES (?,?,?,?,?,?,?,?)",
            (
                event.sequence, key.workspace, key.aggregate, key.id, event.name, event.time,
                event.message.DESCRIPTOR.name, event.message.SerializeToString(),
            ),
        )  # fmt: skip
