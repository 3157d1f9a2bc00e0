"""The read model of images."""

from __future__ import annotations

import sqlite3

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_core.events import Event, Key
from alveary_core.projection import Projection


class ImagesProjection(Projection):
    """Images, and which runs wait for them."""

    subjects = (
        "alveary.*.image.>", "alveary.*.run.*.submitted", "alveary.*.run.*.prepared", "alveary.*.run.*.cancel_requested",
        "alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled",
    )  # fmt: skip
    version = 3
    schema = """
    CREATE TABLE IF NOT EXISTS images (workspace TEXT, digest TEXT, state INTEGER, asked INTEGER, used REAL, size INTEGER, proto BLOB,
      PRIMARY KEY (workspace, digest));
    CREATE TABLE IF NOT EXISTS runs (workspace TEXT, run TEXT PRIMARY KEY, digest TEXT, waits INTEGER);
    CREATE INDEX IF NOT EXISTS runs_image ON runs (workspace, digest);
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        key = event.key
        if key.aggregate == "run":
            if isinstance(event.message, ev.RunSubmitted):
                row = (key.workspace, key.id, event.message.image_digest)
                self.db.execute("INSERT OR REPLACE INTO runs VALUES (?,?,?,1)", row)
                sql = "UPDATE images SET used=? WHERE workspace=? AND digest=?"
                self.db.execute(sql, (event.time, key.workspace, event.message.image_digest))
            elif event.name in ("prepared", "cancel_requested"):
                self.db.execute("UPDATE runs SET waits=0 WHERE run=?", (key.id,))
            elif event.name in ("failed", "canceled", "completed"):
                self.db.execute("DELETE FROM runs WHERE run=?", (key.id,))
            return
        image = self._one(self.db, key.workspace, key.id) or pb.Image(digest=key.id)
        match event.message:
            case ev.ImageRequested() as asked:
                image.state = pb.IMAGE_STATE_REQUESTED
                image.environment.CopyFrom(asked.environment)
                image.reason = ""
            case ev.ImageBuildStarted():
                image.state = pb.IMAGE_STATE_BUILDING
            case ev.ImageReady() as ready:
                image.state = pb.IMAGE_STATE_READY
                image.packages[:] = ready.packages
                image.python_version, image.build_seconds = ready.python_version, ready.build_seconds
                image.lock_key, image.lock_sha256 = ready.lock_key, ready.lock_sha256
                image.builder, image.image, image.size = ready.builder, ready.image, ready.size
                image.ready_at.FromNanoseconds(int(event.time * 1e6) * 1000)
            case ev.ImageFailed() as failed:
                image.state, image.reason = pb.IMAGE_STATE_FAILED, failed.reason
            case ev.ImageEvicted():
                image.state = pb.IMAGE_STATE_EVICTED
        asked_directly = isinstance(event.message, ev.ImageRequested) and not event.message.run_id
        self.db.execute(
            "INSERT INTO images VALUES (?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET state=excluded.state, "
            "asked=max(asked, excluded.asked), used=max(used, excluded.used), size=excluded.size, proto=excluded.proto",
            (
                key.workspace,
                key.id,
                image.state,
                int(asked_directly),
                event.time,
                0 if image.environment.image else image.size,
                image.SerializeToString(),
            ),
        )

    @staticmethod
    def _shown(row: sqlite3.Row) -> pb.Image:
        image = pb.Image.FromString(row["proto"])
        image.last_used_at.FromNanoseconds(int(row["used"] * 1e6) * 1000)
        return image

    @classmethod
    def _one(cls, db: sqlite3.Connection, workspace: str, digest: str) -> pb.Image | None:
        sql = "SELECT proto, used FROM images WHERE workspace=? AND digest BETWEEN ? AND ? LIMIT 2"
        rows = db.execute(sql, (workspace, digest, digest + "g")).fetchall() if digest else []
        return cls._shown(rows[0]) if len(rows) == 1 else None

    async def get(self, workspace: str, digest: str) -> pb.Image | None:
        """One image; the beginning of its digest is enough where only one begins so."""
        return await self.read(lambda db: self._one(db, workspace, digest))

    async def all(self, workspace: str) -> list[pb.Image]:
        """All images of a workspace, newest use first."""

        def find(db: sqlite3.Connection) -> list[pb.Image]:
            return [self._shown(r) for r in db.execute("SELECT proto, used FROM images WHERE workspace=? ORDER BY used DESC", (workspace,))]

        return await self.read(find, slow=True)

    async def superfluous(self, before: float, limit: int) -> list[tuple[str, str, str]]:
        """(workspace, digest, why) of ready images that may go: not used since `before`, or beyond `limit` bytes in all.

        Those of runs that are not over stay. A ready image counts nothing: its layers are others' as well.
        """
        sql = (
            "SELECT workspace, digest, used, size FROM images i WHERE state=? "
            "AND NOT EXISTS (SELECT 1 FROM runs r WHERE r.workspace = i.workspace AND r.digest = i.digest) ORDER BY used DESC"
        )
        found, total = [], 0
        for workspace, digest, used, size in await self.rows(sql, (pb.IMAGE_STATE_READY,), slow=True):
            total += size
            if used < before:
                found.append((workspace, digest, "no run asked for it in long"))
            elif size and total > limit:
                found.append((workspace, digest, "room is needed, and others were used since"))
        return found

    async def waiting(self, workspace: str, digest: str) -> list[str]:
        """Runs that wait for an image."""
        rows = await self.rows("SELECT run FROM runs WHERE workspace=? AND digest=? AND waits", (workspace, digest))
        return [r["run"] for r in rows]

    async def wanted_anyway(self, key: Key) -> bool:
        """Whether the image was requested without a run."""
        row = await self.row("SELECT asked FROM images WHERE workspace=? AND digest=?", (key.workspace, key.id))
        return bool(row and row["asked"])

    async def unfinished(self) -> list[tuple[str, str]]:
        """(workspace, digest) of images that are requested or being built."""
        sql = "SELECT workspace, digest FROM images WHERE state IN (?,?)"
        rows = await self.rows(sql, (pb.IMAGE_STATE_REQUESTED, pb.IMAGE_STATE_BUILDING))
        return [(r["workspace"], r["digest"]) for r in rows]
