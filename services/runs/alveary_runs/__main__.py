"""The composition root: everything is wired here, in plain sight."""

from __future__ import annotations

import asyncio

from alveary_contracts.runs.v1 import runs_pb2, runs_pb2_grpc
from alveary_core.aggregates import Aggregates
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings, MetricLimits
from alveary_runs import domain
from alveary_runs.api import ExperimentService, RunService, WorkspaceService
from alveary_runs.compaction import Compaction
from alveary_runs.copies import Copies
from alveary_runs.dead_letters import DeadLetterService, measure
from alveary_runs.erasure import Erasure
from alveary_runs.handlers import SUBJECTS, Handlers, settle
from alveary_runs.metrics import MetricsProjection
from alveary_runs.projection import RunsProjection
from alveary_runs.subscriptions import EventService


async def start(service: Service) -> None:
    """Add run submission and history to `service`."""
    folder = service.settings.state_dir
    copies = {name: Copies(service.log, service.store, name, messages) for name, messages in (("runs", 50_000), ("metrics", 10_000))}
    await copies["runs"].restore(folder / "runs.sqlite", RunsProjection)
    await copies["metrics"].restore(folder / "metrics.sqlite", MetricsProjection)
    metrics = MetricsProjection(str(folder / "metrics.sqlite"), MetricLimits())
    projection = RunsProjection(str(folder / "runs.sqlite"), metrics)
    runs = Aggregates(service.log, "run", domain.Run, lambda run, event: domain.evolve(run, event.message))
    server = service.server
    runs_pb2_grpc.add_RunServiceServicer_to_server(RunService(service.log, service.store, runs, projection), server.server)
    runs_pb2_grpc.add_ExperimentServiceServicer_to_server(ExperimentService(projection), server.server)
    runs_pb2_grpc.add_WorkspaceServiceServicer_to_server(WorkspaceService(), server.server)
    runs_pb2_grpc.add_EventServiceServicer_to_server(EventService(service.log), server.server)
    runs_pb2_grpc.add_DeadLetterServiceServicer_to_server(DeadLetterService(service.log.dead_letters), server.server)
    server.add(runs_pb2.DESCRIPTOR.services_by_name.values())
    service.spawn(projection.run(service.log), "projection")
    service.spawn(metrics.run(service.log), "metrics")
    service.spawn(
        service.log.consume("runs", SUBJECTS, Handlers(runs, projection, Erasure(service.log, service.store, metrics))), "handlers"
    )
    service.spawn(settle(runs, projection), "settle")
    service.spawn(measure(service.log.dead_letters), "dead-letters")
    service.spawn(copies["runs"].keep(projection), "copies")
    service.spawn(copies["metrics"].keep(metrics), "copies-metrics")
    service.server.behind += [projection.behind, metrics.behind]
    settings = service.settings
    compaction = Compaction(service.log, projection, settings.compact_after_seconds, settings.compact_interval_seconds)
    service.spawn(compaction.run(), "compaction")
    await projection.settle()


if __name__ == "__main__":
    asyncio.run(serve("runs", CoreSettings(), start))
