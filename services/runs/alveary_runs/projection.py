"""The read model of runs: what GetRun and ListRuns answer from."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.events import Event, Key
from alveary_core.projection import Projection
from alveary_runs import domain
from alveary_runs.metrics import MetricsProjection, show

# Runs that are kept in memory while events are folded.
_LIVE = 2000


def view(run_id: str, run: domain.Run) -> pb.Run:
    """A run as clients see it, without times."""
    return pb.Run(
        id=run_id, spec=run.spec, state=run.state, reason=run.reason, attempt=run.attempt, number=run.number,
        submitted_by=run.submitted_by, image_digest=run.image_digest, exit=run.exit, tags=run.tags,
        properties=run.properties, display_name=run.display_name, description=run.description, nodes=run.nodes,
        manifest_digest=run.manifest_digest, archived=run.archived,
    )  # fmt: skip


@dataclass
class _Entry:
    """A run while events are folded. `times`: seconds since 1970 by name of the field of Run."""

    workspace: str
    run: domain.Run = field(default_factory=domain.Run)
    times: dict[str, Timestamp] = field(default_factory=dict)
    sequence: int = 0
    key: str = ""
    # Sequence of the event that submitted it, of the last one before it was compacted, and of the one that then replaced them.
    first: int | None = None
    last: int = 0
    compacted: int | None = None
    # Events that change a final run too, which one purge for all runs must not remove.
    tagged: int = 0
    # Whether it has been submitted, is in the file, has events there, and has labels that are not.
    known: bool = False
    stored: bool = False
    events: bool = False
    labels: bool = False


class RunsProjection(Projection):
    """Runs, images that are ready, targets that exist.

    A run that is not final is folded from its events, which are kept until it is; what is known of a final one is its row.
    """

    subjects = ("alveary.*.run.>", "alveary.*.image.>", "alveary.*.target.>", "alveary.*.dataset.*.registered")
    version = 7
    schema = """
    CREATE TABLE IF NOT EXISTS runs (
      id TEXT PRIMARY KEY, workspace TEXT NOT NULL, experiment TEXT NOT NULL, state INTEGER NOT NULL, submitted_at REAL NOT NULL,
      ended_at REAL, parent TEXT NOT NULL, name TEXT NOT NULL, target TEXT NOT NULL, archived INTEGER NOT NULL, image TEXT NOT NULL,
      idempotency TEXT NOT NULL, canceled INTEGER NOT NULL, first INTEGER, last INTEGER NOT NULL, compacted INTEGER,
      tagged INTEGER NOT NULL,
      purged INTEGER NOT NULL DEFAULT 0, proto BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS runs_all ON runs (workspace, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_shown ON runs (workspace, submitted_at, id) WHERE archived=0;
    CREATE INDEX IF NOT EXISTS runs_state ON runs (workspace, state, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_experiment ON runs (workspace, experiment, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_target ON runs (workspace, target, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_name ON runs (workspace, name, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_parent ON runs (workspace, parent, submitted_at, id);
    CREATE INDEX IF NOT EXISTS runs_live ON runs (state, image) WHERE ended_at IS NULL;
    CREATE INDEX IF NOT EXISTS runs_due ON runs (ended_at) WHERE compacted IS NULL AND ended_at IS NOT NULL;
    CREATE INDEX IF NOT EXISTS runs_first ON runs (first) WHERE compacted IS NULL;
    CREATE INDEX IF NOT EXISTS runs_unpurged ON runs (last) WHERE purged=0 AND compacted IS NOT NULL;
    CREATE TABLE IF NOT EXISTS run_events (sequence INTEGER PRIMARY KEY, run TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS run_events_run ON run_events (run);
    CREATE TABLE IF NOT EXISTS experiments (
      workspace TEXT, name TEXT, runs INTEGER NOT NULL, newest REAL NOT NULL, PRIMARY KEY (workspace, name)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS labels (
      workspace TEXT, kind TEXT, key TEXT, value TEXT, submitted_at REAL, run TEXT,
      PRIMARY KEY (workspace, kind, key, value, submitted_at, run)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS labels_run ON labels (run, kind, key);
    CREATE TABLE IF NOT EXISTS images (workspace TEXT, digest TEXT, state TEXT, PRIMARY KEY (workspace, digest));
    CREATE TABLE IF NOT EXISTS targets (workspace TEXT, name TEXT, proto BLOB, PRIMARY KEY (workspace, name));
    CREATE TABLE IF NOT EXISTS datasets (
      workspace TEXT, name TEXT, version INTEGER, digest TEXT, PRIMARY KEY (workspace, name, version));
    """

    def __init__(self, path: str, metrics: MetricsProjection) -> None:
        self.forget()
        super().__init__(path, {"metrics": metrics.path})
        self.metrics = metrics

    def forget(self) -> None:
        """Nothing is known but what the file says."""
        self._live: OrderedDict[str, _Entry] = OrderedDict()
        self._changes: dict[str, _Entry] = {}
        self._events: list[tuple[int, str, str, bytes]] = []

    # ---- writing --------------------------------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Take one event; `flush` writes the runs that changed."""
        key = event.key
        match event.message:
            case _ if key.aggregate == "run":
                self._apply_run(event)
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

    def _apply_run(self, event: Event) -> None:
        run_id, message = event.key.id, event.message
        entry = self._entry(event.key)
        before = entry.run
        entry.run = domain.evolve(before, message)
        entry.sequence = event.sequence
        if entry.compacted is None and not isinstance(message, ev.RunCompacted):
            entry.last = event.sequence
        if entry.run.state != before.state:
            entry.times["state_since"] = _stamp(event.time)
        match message:
            case ev.RunSubmitted():
                entry.times["submitted_at"] = _stamp(event.time)
                entry.key, entry.first = message.idempotency_key, event.sequence
                entry.known = entry.labels = True
            case ev.RunStarted():
                entry.times["started_at"] = _stamp(event.time)
            case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
                entry.times["ended_at"] = _stamp(event.time)
            case ev.RunTagged() | ev.RunArchived():
                entry.labels = True
                entry.tagged += entry.compacted is None
            case ev.RunDeleted() as deleted:
                entry.times["submitted_at"] = deleted.submitted_at
                entry.known = True
            case ev.RunCompacted() as whole:
                for name in ("submitted_at", "started_at", "ended_at"):
                    if whole.HasField(name):
                        entry.times[name] = getattr(whole, name)
                entry.times["state_since"] = whole.ended_at
                entry.key, entry.compacted = whole.submitted.idempotency_key, event.sequence
                entry.known = entry.labels = True
        if not entry.run.final:
            self._events.append((event.sequence, run_id, message.DESCRIPTOR.name, message.SerializeToString()))
            entry.events = True
        self._changes[run_id] = entry

    def _entry(self, key: Key) -> _Entry:
        """A run as it is up to here, from memory or from the file."""
        if key.id in self._live:
            self._live.move_to_end(key.id)
            return self._live[key.id]
        entry = _Entry(key.workspace)
        row = self.db.execute(
            "SELECT workspace, idempotency, canceled, first, last, compacted, tagged, proto FROM runs WHERE id=?", (key.id,)
        ).fetchone()
        if row is not None:
            shown = pb.Run.FromString(row["proto"])
            entry = _Entry(
                row["workspace"], key=row["idempotency"], first=row["first"], last=row["last"], compacted=row["compacted"], tagged=row["tagged"], known=True,
                stored=True,
            )  # fmt: skip
            names = ("submitted_at", "started_at", "ended_at", "state_since")
            entry.times = {name: getattr(shown, name) for name in names if shown.HasField(name)}  # type: ignore[arg-type]
            entry.sequence = shown.sequence
            if shown.state in domain.FINAL:
                entry.run = domain.evolve(entry.run, whole(shown, row["idempotency"], bool(row["canceled"])))
        if not entry.run.final:
            for name, body in self.db.execute("SELECT name, body FROM run_events WHERE run=? ORDER BY sequence", (key.id,)):
                message = getattr(ev, name)()
                message.ParseFromString(body)
                entry.run = domain.evolve(entry.run, message)
                entry.events = True
        self._live[key.id] = entry
        return entry

    def flush(self) -> None:
        """Write the runs that changed."""
        rows, labels, counts, superfluous = [], [], [], []
        for run_id, entry in self._changes.items():
            run = entry.run
            if run.final and entry.events:
                superfluous.append(run_id)
                entry.events = False
            if not entry.known:
                continue  # the first of its events that is left is none that begins a run
            if run.deleted_by:
                for table, column in (("runs", "id"), ("labels", "run"), ("run_events", "run")):
                    self.db.execute(f"DELETE FROM {table} WHERE {column}=?", (run_id,))
                if not entry.stored:  # numbers of an experiment's runs are not given twice
                    counts.append((entry.workspace, run.spec.experiment, _seconds(entry.times["submitted_at"])))
                entry.stored = True
                continue
            shown = view(run_id, run)
            shown.sequence = entry.sequence
            for name, stamp in entry.times.items():
                getattr(shown, name).CopyFrom(stamp)
            submitted_at = _seconds(shown.submitted_at)
            ended_at = _seconds(shown.ended_at) if run.final else None
            rows.append((
                run_id, entry.workspace, run.spec.experiment, run.state, submitted_at, ended_at, run.spec.parent_run_id, run.display_name,
                run.spec.compute_target, int(run.archived), run.image_digest, entry.key, int(run.cancel_requested), entry.first,
                entry.last, entry.compacted, entry.tagged, shown.SerializeToString(),
            ))  # fmt: skip
            if not entry.stored:
                counts.append((entry.workspace, run.spec.experiment, submitted_at))
            if entry.labels:
                if entry.stored:
                    self.db.execute("DELETE FROM labels WHERE run=?", (run_id,))
                for kind, pairs in (("tags", run.tags), ("properties", run.properties)):
                    labels += [(entry.workspace, kind, k, v, submitted_at, run_id) for k, v in pairs.items()]
            entry.stored, entry.labels = True, False
        gone = set(superfluous)
        self.db.executemany("INSERT OR IGNORE INTO run_events VALUES (?,?,?,?)", [e for e in self._events if e[1] not in gone])
        self.db.executemany("DELETE FROM run_events WHERE run=?", [(run_id,) for run_id in superfluous])
        self.db.executemany(
            "INSERT INTO runs (id, workspace, experiment, state, submitted_at, ended_at, parent, name, target, archived, image, idempotency, "
            "canceled, first, last, compacted, tagged, proto) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET state=excluded.state, "
            "submitted_at=excluded.submitted_at, ended_at=excluded.ended_at, name=excluded.name, archived=excluded.archived, "
            "canceled=excluded.canceled, last=excluded.last, compacted=excluded.compacted, tagged=excluded.tagged, proto=excluded.proto",
            rows,
        )
        self.db.executemany("INSERT OR IGNORE INTO labels VALUES (?,?,?,?,?,?)", labels)
        self.db.executemany(
            "INSERT INTO experiments VALUES (?,?,1,?) ON CONFLICT DO UPDATE SET runs=runs+1, newest=max(newest, excluded.newest)", counts
        )
        self._changes.clear()
        self._events.clear()
        while len(self._live) > _LIVE:
            self._live.popitem(last=False)

    # ---- reading --------------------------------------------------------------------------------------------------

    async def next_number(self, workspace: str, experiment: str) -> int:
        """The place that the next run of an experiment has among its runs, from 1."""
        row = await self.row("SELECT runs FROM experiments WHERE workspace=? AND name=?", (workspace, experiment))
        return (row[0] if row else 0) + 1

    async def get(self, workspace: str, run_id: str, names: Sequence[str] = ()) -> pb.Run | None:
        """A run with its newest metrics, those of `names` where any are named."""

        def find(db: sqlite3.Connection) -> pb.Run | None:
            row = db.execute("SELECT proto FROM runs WHERE id=? AND workspace=?", (run_id, workspace)).fetchone()
            return self.complete(db, row["proto"], names) if row else None

        return await self.read(find)

    @staticmethod
    def complete(db: sqlite3.Connection, proto: bytes, names: Sequence[str] = (), run: pb.Run | None = None) -> pb.Run:
        """A stored run, with its newest metrics; in `run`, where one is given."""
        run = pb.Run() if run is None else run
        run.ParseFromString(proto)
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
        sql = "SELECT id FROM runs WHERE ended_at IS NULL AND state IN (?,?) AND image=? AND workspace=? ORDER BY id"
        return [r["id"] for r in await self.rows(sql, (c.RUN_STATE_NOT_STARTED, c.RUN_STATE_PREPARING, digest, workspace))]


def whole(shown: pb.Run, key: str, canceled: bool) -> ev.RunCompacted:
    """All events of a final run in one, from its row. `key`: its idempotency key; `canceled`: whether its cancellation was requested."""
    submitted = ev.RunSubmitted(
        spec=shown.spec, submitted_by=shown.submitted_by, image_digest=shown.image_digest, number=shown.number, idempotency_key=key
    )
    made = ev.RunCompacted(
        submitted=submitted, state=shown.state, reason=shown.reason, attempt=shown.attempt, nodes=shown.nodes, cancel_requested=canceled,
        exit=shown.exit if shown.HasField("exit") else None, manifest_digest=shown.manifest_digest, tags=shown.tags,
        properties=shown.properties, display_name=shown.display_name, description=shown.description, archived=shown.archived,
    )  # fmt: skip
    for name in ("submitted_at", "started_at", "ended_at"):
        if shown.HasField(name):
            getattr(made, name).CopyFrom(getattr(shown, name))
    return made


def _stamp(seconds: float) -> Timestamp:
    whole_seconds, micros = divmod(round(seconds * 1e6), 1_000_000)
    return Timestamp(seconds=whole_seconds, nanos=micros * 1000)


def _seconds(stamp: Timestamp) -> float:
    return stamp.seconds + stamp.nanos / 1e9
