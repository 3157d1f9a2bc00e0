"""What follows the tombstone of a run: everything else that is known of it goes. Each step is harmless to repeat."""

from __future__ import annotations

import asyncio

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import token
from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.eventlog import LOGS, METRICS, EventLog
from alveary_core.events import Event, Key
from alveary_core.objectstore import ObjectStore
from alveary_runs.metrics import MetricsProjection

BUCKET = "runs"
# How long a view of metrics that is being rebuilt is waited for, seconds; then the event comes again.
_PATIENCE = 60.0


class Erasure:
    """Erases what belongs to a run alone: files, checkpoints, archived log, log lines, metrics, events."""

    def __init__(self, log: EventLog, store: ObjectStore, metrics: MetricsProjection) -> None:
        self._log, self._store, self._metrics = log, store, metrics

    async def __call__(self, event: Event) -> None:
        """Handle run.deleted.

        Raises:
            Unavailable: something did not answer: the event must be handled again.
        """
        deleted = event.message
        assert isinstance(deleted, ev.RunDeleted)
        workspace, run = event.key.workspace, event.key.id
        objects = await self._objects(f"{run}/")
        for stream, name in ((LOGS, "alveary-logs"), (METRICS, "alveary-metrics")):
            await self._log.purge_subject(f"{name}.{token(workspace)}.{token(run)}", None, stream)
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._metrics.caught_up.wait()
        except TimeoutError as error:
            raise Unavailable("the view of metrics is still being rebuilt") from error
        await self._metrics.erase(run)
        for key in (Key(workspace, "log", run), Key(workspace, "placement", run), Key(workspace, "run", run)):
            await self._log.purge(key, event.sequence)
        for attempt in range(1, deleted.attempt + 1):
            await self._log.purge(Key(workspace, "attempt", f"{run}-{attempt}"), event.sequence)
        telemetry.logger().info("run.erased", run=run, objects=objects)

    async def _objects(self, prefix: str) -> int:
        count, after = 0, ""
        while page := await self._store.page(BUCKET, prefix, after):
            after = page[-1][0]
            await self._store.delete(BUCKET, [key for key, _, _ in page])
            count += len(page)
        for upload in await self._store.uploads(BUCKET, prefix):
            await self._store.abort(BUCKET, upload.key, upload.id)
        return count
