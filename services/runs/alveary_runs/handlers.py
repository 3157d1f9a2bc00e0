"""Which event makes this service do what."""

from __future__ import annotations

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import image_digest
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core import telemetry
from alveary_core.aggregates import Aggregates
from alveary_core.events import Event
from alveary_runs import domain
from alveary_runs.erasure import Erasure
from alveary_runs.projection import RunsProjection
from alveary_runs.validation import with_defaults

SUBJECTS = (
    "alveary.*.run.*.submitted",
    "alveary.*.run.*.not_responding",
    "alveary.*.run.*.deleted",
    "alveary.*.image.>",
    "alveary.*.placement.>",
    "alveary.*.attempt.>",
    "alveary.*.model.*.export_requested",
)


class Handlers:
    """Moves runs when the other services say what happened."""

    def __init__(self, runs: Aggregates[domain.Run], projection: RunsProjection, erasure: Erasure) -> None:
        self._runs, self._projection, self._erasure = runs, projection, erasure

    async def __call__(self, event: Event) -> None:
        """Handle one event; idempotent."""
        match event.key.aggregate:
            case "run":
                await self._on_run(event)
            case "image":
                await self._on_image(event)
            case "placement":
                await self._on_placement(event)
            case "attempt":
                await self._on_attempt(event)
            case "model":
                await self._on_export(event)

    async def _do(self, event: Event, run_id: str, decide: object) -> None:
        await self._runs.execute(self._runs.key(event.key.workspace, run_id), decide)  # type: ignore[arg-type]

    async def _on_run(self, event: Event) -> None:
        if isinstance(event.message, ev.RunNotResponding):
            await self._do(event, event.key.id, domain.resume_after_loss)
            return
        if isinstance(event.message, ev.RunDeleted):
            await self._erasure(event)
            return
        # A cached image: the images service has nothing to do, and nothing to say.
        await self._projection.wait_for(event.sequence)
        digest = event.message.image_digest  # type: ignore[attr-defined]
        if await self._projection.image_state(event.key.workspace, digest) == "ready":
            await self._do(event, event.key.id, lambda run: domain.prepared(run, digest, cached=True))

    async def _on_image(self, event: Event) -> None:
        # Every run that asked before this event is in the view once the view includes it.
        await self._projection.wait_for(event.sequence)
        digest = event.key.id
        for run_id in await self._projection.waiting_for_image(event.key.workspace, digest):
            key = self._runs.key(event.key.workspace, run_id)
            match event.message:
                case ev.ImageBuildStarted():
                    await self._runs.execute(
                        key,
                        lambda run: domain.preparing(run, digest, "its environment is being built; the log's stream 'prepare' shows how"),
                    )
                case ev.ImageReady():
                    await self._runs.execute(key, lambda run: domain.prepared(run, digest, cached=False))
                case ev.ImageFailed(canceled=False) as failed:
                    reason = failed.reason
                    await self._runs.execute(key, lambda run, reason=reason: domain.image_failed(run, digest, reason))  # type: ignore[misc]

    async def _on_placement(self, event: Event) -> None:
        match event.message:
            case ev.PlacementWaiting(reason=reason):
                await self._do(event, event.key.id, lambda run: domain.queued(run, reason))
            case ev.PlacementProvisioning(reason=reason):
                await self._do(event, event.key.id, lambda run: domain.provisioning(run, reason))
            case ev.PlacementMade() as made:
                nodes = [n.node for n in made.nodes]
                await self._do(event, event.key.id, lambda run: domain.starting(run, made.attempt, nodes))
            case ev.PlacementRevoked() as gone:
                await self._do(event, event.key.id, lambda run: domain.revoked(run, gone.attempt, gone.reason))
            case ev.PlacementReleased(attempt=0):
                await self._do(event, event.key.id, domain.released)

    async def _on_attempt(self, event: Event) -> None:
        run_id, _, number = event.key.id.rpartition("-")
        attempt = int(number)
        match event.message:
            case ev.AttemptStarted():
                await self._do(event, run_id, lambda run: domain.started(run, attempt))
            case ev.AttemptFinalizing():
                await self._do(event, run_id, lambda run: domain.finalizing(run, attempt))
            case ev.AttemptFinished() as finished:
                await self._do(event, run_id, lambda run: domain.finished(run, attempt, finished))

    async def _on_export(self, event: Event) -> None:
        """The registry asks for a run that exports a model; its id is the export's, so it is submitted once."""
        request = event.message
        assert isinstance(request, ev.ModelExportRequested)
        spec = with_defaults(request.run)
        digest = image_digest(spec.environment, request.export_id)
        submitted = ev.RunSubmitted(spec=spec, submitted_by=request.requested_by, image_digest=digest, number=0)
        try:
            await self._do(event, request.export_id, lambda run: domain.submit(run, submitted))
        except domain.Rejected as error:
            telemetry.logger().error("export.rejected", export=request.export_id, error=str(error))


async def settle(runs: Aggregates[domain.Run], projection: RunsProjection) -> None:
    """At boot: end what a death between two events left half done."""
    await projection.caught_up.wait()
    for row in await projection.rows("SELECT workspace, id FROM runs WHERE ended_at IS NULL AND state=?", (c.RUN_STATE_NOT_RESPONDING,)):
        await runs.execute(runs.key(row["workspace"], row["id"]), domain.resume_after_loss)
