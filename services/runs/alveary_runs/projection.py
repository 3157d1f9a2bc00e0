"""The read model of runs: what GetRun and ListRuns answer from."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Sequence

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.events import Event
from alveary_core.projection import Projection
from alveary_runs import domain
from alveary_runs.metrics import MetricsProjection, show


def view(run_id: str, run: domain.Run) -> pb.Run:
    """A run as clients see it, without times."""
    return pb.Run(
        id=run_id, spec=run.spec, state=run.state, reason=run.reason, attempt=run.attempt, number=run.number,
        submitted_by=run.submitted_by, image_digest=run.image_digest, exit=run.exit, tags=run.tags,
        properties=run.properties, display_name=run.display_name, description=run.description, nodes=run.nodes,
        manifest_digest=run.manifest_digest, archived=run.archived,
    )  # fmt: skip


class RunsProjection(Projection):
    """Runs, images that are ready, targets that exist."""

    subjects = ("alveary.*.run.>", "alveary.*.image.>", "alveary.*.target.>", "alveary.*.dataset.*.registered")
    version = 5
    schema = """
    CREATE TABLE IF NOT EXISTS runs (
      id TEXT PRIMARY KEY, workspace TEXT, experiment TEXT, state INTEGER, submitted_at REAL, parent TEXT, name TEXT,
      target TEXT, archived INTEGER, image TEXT, idempotency TEXT, proto BLOB);
    CREATE INDEX IF NOT EXISTS runs_time ON runs (workspace, submitted_at);
    CREATE INDEX IF NOT EXISTS runs_live ON runs (state, image);
    CREATE UNIQUE INDEX IF NOT EXISTS runs_key ON runs (workspace, idempotency) WHERE idempotency <> '';
    CREATE TABLE IF NOT EXISTS run_events (run TEXT, sequence INTEGER PRIMARY KEY, name TEXT, time REAL, body BLOB);
    CREATE INDEX IF NOT EXISTS run_events_run ON run_events (run);
    CREATE TABLE IF NOT EXISTS compacted (run TEXT PRIMARY KEY, workspace TEXT, sequence INTEGER, purged INTEGER DEFAULT 0);
    CREATE INDEX IF NOT EXISTS compacted_left ON compacted (purged) WHERE purged = 0;
    CREATE TABLE IF NOT EXISTS labels (run TEXT, kind TEXT, key TEXT, value TEXT, PRIMARY KEY (run, kind, key));
    CREATE TABLE IF NOT EXISTS images (workspace TEXT, digest TEXT, state TEXT, PRIMARY KEY (workspace, digest));
    CREATE TABLE IF NOT EXISTS targets (workspace TEXT, name TEXT, proto BLOB, PRIMARY KEY (workspace, name));
    CREATE TABLE IF NOT EXISTS datasets (
      workspace TEXT, name TEXT, version INTEGER, digest TEXT, PRIMARY KEY (workspace, name, version));
    """

    def __init__(self, path: str, metrics: MetricsProjection) -> None:
        super().__init__(path, {"metrics": metrics.path})
        self.metrics = metrics
        self._live: OrderedDict[str, domain.Run] = OrderedDict()

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        key = event.key
        match event.message:
            case ev.TargetCreated(spec=spec) | ev.TargetUpdated(spec=spec):
                self.db.execute("INSERT OR REPLACE INTO targets VALUES (?,?,?)", (key.workspace, key.id, spec.SerializeToString()))
            case ev.TargetDeleted():
                self.db.execute("DELETE FROM targets WHERE workspace=? AND name=?", (key.workspace, key.id))
            case ev.DatasetRegistered() as registered:
                self.db.execute(
                    "INSERT OR REPLACE INTO datasets VALUES (?,?,?,?)",
                    (key.workspace, key.id, registered.version, registered.manifest_digest),
                )
            case _ if key.aggregate == "image":
                self.db.execute("INSERT OR REPLACE INTO images VALUES (?,?,?)", (key.workspace, key.id, event.name))
            case _ if key.aggregate == "run":
                self._apply_run(event)

    def _state(self, run_id: str) -> domain.Run:
        """The run's state up to here, from memory or from the rows of its events."""
        if run_id in self._live:
            return self._live[run_id]
        run = domain.Run()
        for row in self.db.execute("SELECT name, body FROM run_events WHERE run=? ORDER BY sequence", (run_id,)):
            message = getattr(ev, row["name"])()
            message.ParseFromString(row["body"])
            run = domain.evolve(run, message)
        return run

    def _apply_run(self, event: Event) -> None:
        run_id = event.key.id
        run = domain.evolve(self._state(run_id), event.message)
        self._live[run_id] = run
        self._live.move_to_end(run_id)
        while len(self._live) > 2000:
            self._live.popitem(last=False)
        if isinstance(event.message, ev.RunCompacted):
            self.db.execute("DELETE FROM run_events WHERE run=?", (run_id,))
            self.db.execute(
                "INSERT OR IGNORE INTO compacted (run, workspace, sequence) VALUES (?,?,?)", (run_id, event.key.workspace, event.sequence)
            )
        self.db.execute(
            "INSERT OR IGNORE INTO run_events VALUES (?,?,?,?,?)",
            (run_id, event.sequence, event.message.DESCRIPTOR.name, event.time, event.message.SerializeToString()),
        )
        shown = view(run_id, run)
        old = self.db.execute("SELECT proto FROM runs WHERE id=?", (run_id,)).fetchone()
        before = pb.Run.FromString(old["proto"]) if old else pb.Run()
        for name in ("submitted_at", "started_at", "ended_at", "state_since"):
            getattr(shown, name).CopyFrom(getattr(before, name)) if before.HasField(name) else None
        if before.state != shown.state:
            _set_time(shown.state_since, event.time)
        match event.message:
            case ev.RunSubmitted():
                _set_time(shown.submitted_at, event.time)
            case ev.RunStarted():
                _set_time(shown.started_at, event.time)
            case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
                _set_time(shown.ended_at, event.time)
            case ev.RunCompacted() as whole:
                for name in ("submitted_at", "started_at", "ended_at"):
                    if whole.HasField(name):  # type: ignore[arg-type]
                        getattr(shown, name).CopyFrom(getattr(whole, name))
                shown.state_since.CopyFrom(whole.ended_at)
        shown.sequence = event.sequence
        if isinstance(event.message, (ev.RunSubmitted, ev.RunCompacted)):
            first = event.message if isinstance(event.message, ev.RunSubmitted) else event.message.submitted
            self.db.execute(
                "INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    run_id, event.key.workspace, run.spec.experiment, run.state, shown.submitted_at.ToNanoseconds() / 1e9,
                    run.spec.parent_run_id, run.display_name, run.spec.compute_target, int(run.archived), run.image_digest,
                    first.idempotency_key, shown.SerializeToString(),
                ),
            )  # fmt: skip
        else:
            self.db.execute(
                "UPDATE runs SET state=?, name=?, archived=?, proto=? WHERE id=?",
                (run.state, run.display_name, int(run.archived), shown.SerializeToString(), run_id),
            )
        if isinstance(event.message, (ev.RunSubmitted, ev.RunTagged, ev.RunCompacted)):
            self.db.execute("DELETE FROM labels WHERE run=?", (run_id,))
            labels = [(run_id, "tags", k, v) for k, v in run.tags.items()]
            labels += [(run_id, "properties", k, v) for k, v in run.properties.items()]
            self.db.executemany("INSERT INTO labels VALUES (?,?,?,?)", labels)

    def forget(self) -> None:
        """The transaction was rolled back."""
        self._live.clear()

    async def submission(self, run_id: str) -> ev.RunSubmitted | None:
        """The first event of a run that is not compacted."""
        row = await self.row("SELECT body FROM run_events WHERE run=? AND name='RunSubmitted'", (run_id,))
        return ev.RunSubmitted.FromString(row["body"]) if row else None

    async def get(self, workspace: str, run_id: str, names: Sequence[str] = ()) -> pb.Run | None:
        """A run with its newest metrics, those of `names` where any are named."""

        def find(db: sqlite3.Connection) -> pb.Run | None:
            row = db.execute("SELECT proto FROM runs WHERE id=? AND workspace=?", (run_id, workspace)).fetchone()
            return self.complete(db, row["proto"], names) if row else None

        return await self.read(find)

    @staticmethod
    def complete(db: sqlite3.Connection, proto: bytes, names: Sequence[str] = ()) -> pb.Run:
        """A stored run, with its newest metrics."""
        run = pb.Run.FromString(proto)
        show(db, run, names)
        return run

    async def target(self, workspace: str, name: str) -> ev.ComputeSpec | None:
        """Specification of a target."""
        row = await self.row("SELECT proto FROM targets WHERE workspace=? AND name=?", (workspace, name))
        return ev.ComputeSpec.FromString(row["proto"]) if row else None

    async def image_state(self, workspace: str, digest: str) -> str:
        """Name of the newest event of an image; empty: none."""
        row = await self.row("SELECT state FROM images WHERE workspace=? AND digest=?", (workspace, digest))
        return str(row["state"]) if row else ""

    async def waiting_for_image(self, workspace: str, digest: str) -> list[str]:
        """Runs that wait for an image."""
        sql = "SELECT id FROM runs WHERE state IN (?,?) AND image=? AND workspace=? ORDER BY id"
        return [r["id"] for r in await self.rows(sql, (c.RUN_STATE_NOT_STARTED, c.RUN_STATE_PREPARING, digest, workspace))]


def _set_time(stamp: object, seconds: float) -> None:
    stamp.FromNanoseconds(int(seconds * 1e6) * 1000)  # type: ignore[attr-defined]
