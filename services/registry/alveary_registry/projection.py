"""The read model of models and datasets, and what is known of the runs that made them."""

from __future__ import annotations

import sqlite3

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.registry.v1 import registry_pb2 as pb
from alveary_core.events import Event
from alveary_core.projection import Projection


class RegistryProjection(Projection):
    """One row a version; one row a final run."""

    subjects = (
        "alveary.*.model.>", "alveary.*.dataset.>", "alveary.*.run.*.submitted", "alveary.*.run.*.completed",
        "alveary.*.run.*.failed", "alveary.*.run.*.canceled", "alveary.*.run.*.compacted",
        "alveary.*.run.*.deleted",
    )  # fmt: skip
    version = 4
    schema = """
    CREATE TABLE IF NOT EXISTS models (workspace TEXT, name TEXT, version INTEGER, run TEXT, archived INTEGER, at REAL,
      proto BLOB, PRIMARY KEY (workspace, name, version));
    CREATE TABLE IF NOT EXISTS model_tags (workspace TEXT, name TEXT, version INTEGER, key TEXT, value TEXT);
    CREATE INDEX IF NOT EXISTS model_tags_name ON model_tags (workspace, name, version);
    CREATE TABLE IF NOT EXISTS datasets (workspace TEXT, name TEXT, version INTEGER, at REAL, proto BLOB,
      PRIMARY KEY (workspace, name, version));
    CREATE TABLE IF NOT EXISTS runs (run TEXT PRIMARY KEY, workspace TEXT, submitted BLOB, attempt INTEGER,
      manifest TEXT, state TEXT);
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        key, message = event.key, event.message
        if isinstance(message, ev.RunSubmitted):
            row = (key.id, key.workspace, message.SerializeToString())
            self.db.execute("INSERT OR IGNORE INTO runs (run, workspace, submitted) VALUES (?,?,?)", row)
        elif isinstance(message, (ev.RunCompleted, ev.RunFailed, ev.RunCanceled)):
            self.db.execute(
                "UPDATE runs SET attempt=?, manifest=?, state=? WHERE run=?",
                (message.attempt, message.manifest_digest, event.name, key.id),
            )
        elif isinstance(message, ev.RunDeleted):
            self.db.execute("DELETE FROM runs WHERE run=?", (key.id,))
        elif isinstance(message, ev.RunCompacted):
            known = c.RunState.DESCRIPTOR.values_by_number.get(message.state)  # a newer version may know more
            state = known.name.removeprefix("RUN_STATE_").lower() if known else str(message.state)
            self.db.execute(
                "INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?)",
                (key.id, key.workspace, message.submitted.SerializeToString(), message.attempt, message.manifest_digest, state),
            )
        elif isinstance(message, ev.DatasetRegistered):
            self.db.execute(
                "INSERT OR IGNORE INTO datasets VALUES (?,?,?,?,?)",
                (key.workspace, key.id, message.version, event.time, message.SerializeToString()),
            )
        elif isinstance(message, ev.ModelRegistered):
            shown = pb.ModelVersion(
                name=key.id, version=message.version, description=message.description, tags=message.tags,
                properties=message.properties, lineage=message.lineage, framework=message.framework,
                framework_version=message.framework_version, registered_by=message.registered_by,
                manifest=message.manifest if message.HasField("manifest") else None, manifest_digest=message.manifest_digest, file_count=message.file_count,
                total_size=message.total_size,
            )  # fmt: skip
            if not shown.manifest_digest:  # written before these fields were there
                shown.manifest_digest, shown.file_count = manifest_digest(message.manifest), len(message.manifest.files)
                shown.total_size = sum(f.size for f in message.manifest.files)
            shown.registered_at.FromNanoseconds(int(event.time * 1e6) * 1000)
            self._put(key.workspace, shown, event.time)
        elif isinstance(message, ev.ModelAliasSet):
            for model in _versions(self.db, key.workspace, key.id):
                aliases = [a for a in model.aliases if a != message.alias]
                aliases += [message.alias] if model.version == message.version else []
                if list(model.aliases) != aliases:
                    model.aliases[:] = aliases
                    self._put(key.workspace, model)
        elif key.aggregate == "model":
            shown_now = _model(self.db, key.workspace, key.id, message.version)  # type: ignore[attr-defined]
            if shown_now is not None:
                self._change(shown_now, message)
                self._put(key.workspace, shown_now)

    @staticmethod
    def _change(shown: pb.ModelVersion, message: object) -> None:
        match message:
            case ev.ModelTagged():
                for name in message.removed:
                    shown.tags.pop(name, None)
                shown.tags.update(message.set)
                shown.properties.update(message.properties)
                if message.HasField("description"):
                    shown.description = message.description
            case ev.ModelExportRequested():
                shown.export_pending, shown.export_error = message.export_id, ""
            case ev.ModelExported():
                shown.export_pending, shown.export_error = "", ""
                shown.export.CopyFrom(message)
            case ev.ModelExportFailed():
                shown.export_pending, shown.export_error = "", message.reason
            case ev.ModelArchived():
                shown.archived = True

    def _put(self, workspace: str, shown: pb.ModelVersion, at: float | None = None) -> None:
        at = at if at is not None else shown.registered_at.ToNanoseconds() / 1e9
        name = (workspace, shown.name, shown.version)
        self.db.execute(
            "INSERT OR REPLACE INTO models VALUES (?,?,?,?,?,?,?)",
            (*name, shown.lineage.run_id, int(shown.archived), at, shown.SerializeToString()),
        )
        self.db.execute("DELETE FROM model_tags WHERE workspace=? AND name=? AND version=?", name)
        self.db.executemany("INSERT INTO model_tags VALUES (?,?,?,?,?)", [(*name, k, v) for k, v in shown.tags.items()])

    async def model(self, workspace: str, name: str, version: int = 0) -> pb.ModelVersion | None:
        """A version; 0: the latest."""
        return await self.read(lambda db: _model(db, workspace, name, version))

    async def versions(self, workspace: str, name: str) -> list[pb.ModelVersion]:
        """All versions of a name."""
        return await self.read(lambda db: _versions(db, workspace, name), slow=True)

    async def dataset(self, workspace: str, name: str, version: int = 0) -> tuple[ev.DatasetRegistered, float] | None:
        """A version and when it was registered; 0: the latest."""
        row = await self.row(
            "SELECT proto, at FROM datasets WHERE workspace=? AND name=? AND (?=0 OR version=?) ORDER BY version DESC LIMIT 1",
            (workspace, name, version, version),
        )
        return (ev.DatasetRegistered.FromString(row["proto"]), row["at"]) if row else None


def _model(db: sqlite3.Connection, workspace: str, name: str, version: int = 0) -> pb.ModelVersion | None:
    row = db.execute(
        "SELECT proto FROM models WHERE workspace=? AND name=? AND (?=0 OR version=?) ORDER BY version DESC LIMIT 1",
        (workspace, name, version, version),
    ).fetchone()
    return pb.ModelVersion.FromString(row["proto"]) if row else None


def _versions(db: sqlite3.Connection, workspace: str, name: str) -> list[pb.ModelVersion]:
    rows = db.execute("SELECT proto FROM models WHERE workspace=? AND name=? ORDER BY version", (workspace, name))
    return [pb.ModelVersion.FromString(r["proto"]) for r in rows]
