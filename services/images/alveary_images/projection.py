"""The read model of images."""

from __future__ import annotations

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_core.events import Event, Key
from alveary_core.projection import Projection

_WAITING = ("submitted", "preparing")


class ImagesProjection(Projection):
    """Images, and which runs wait for them."""

    subjects = ("alveary.*.image.>", "alveary.*.run.>")
    version = 1
    schema = """
    CREATE TABLE IF NOT EXISTS images (workspace TEXT, digest TEXT, state INTEGER, asked INTEGER, proto BLOB,
      PRIMARY KEY (workspace, digest));
    CREATE TABLE IF NOT EXISTS waiting (workspace TEXT, run TEXT PRIMARY KEY, digest TEXT);
    CREATE INDEX IF NOT EXISTS waiting_digest ON waiting (digest);
    """

    def apply(self, event: Event) -> None:
        """Write the rows of one event."""
        key = event.key
        if key.aggregate == "run":
            if isinstance(event.message, ev.RunSubmitted):
                row = (key.workspace, key.id, event.message.image_digest)
                self.db.execute("INSERT OR REPLACE INTO waiting VALUES (?,?,?)", row)
            elif event.name in ("prepared", "failed", "canceled", "cancel_requested", "completed"):
                self.db.execute("DELETE FROM waiting WHERE run=?", (key.id,))
            return
        image = self.get(key.workspace, key.id) or pb.Image(digest=key.id)
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
            case ev.ImageFailed() as failed:
                image.state, image.reason = pb.IMAGE_STATE_FAILED, failed.reason
            case ev.ImageEvicted():
                image.state = pb.IMAGE_STATE_EVICTED
        asked_directly = isinstance(event.message, ev.ImageRequested) and not event.message.run_id
        self.db.execute(
            "INSERT INTO images VALUES (?,?,?,?,?) ON CONFLICT DO UPDATE SET state=excluded.state, "
            "asked=max(asked, excluded.asked), proto=excluded.proto",
            (key.workspace, key.id, image.state, int(asked_directly), image.SerializeToString()),
        )

    def get(self, workspace: str, digest: str) -> pb.Image | None:
        """One image."""
        row = self.row("SELECT proto FROM images WHERE workspace=? AND digest=?", (workspace, digest))
        return pb.Image.FromString(row["proto"]) if row else None

    def all(self, workspace: str) -> list[pb.Image]:
        """All images of a workspace."""
        rows = self.rows("SELECT proto FROM images WHERE workspace=? ORDER BY digest", (workspace,))
        return [pb.Image.FromString(r["proto"]) for r in rows]

    def waiting(self, workspace: str, digest: str) -> list[str]:
        """Runs that wait for an image."""
        return [r["run"] for r in self.rows("SELECT run FROM waiting WHERE workspace=? AND digest=?", (workspace, digest))]

    def wanted_anyway(self, key: Key) -> bool:
        """Whether somebody asked for the image without a run."""
        row = self.row("SELECT asked FROM images WHERE workspace=? AND digest=?", (key.workspace, key.id))
        return bool(row and row["asked"])

    def unfinished(self) -> list[tuple[str, str]]:
        """(workspace, digest) of images that are requested or being built."""
        sql = "SELECT workspace, digest FROM images WHERE state IN (?,?)"
        rows = self.rows(sql, (pb.IMAGE_STATE_REQUESTED, pb.IMAGE_STATE_BUILDING))
        return [(r["workspace"], r["digest"]) for r in rows]
