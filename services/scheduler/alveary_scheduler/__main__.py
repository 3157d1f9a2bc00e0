"""The composition root."""

from __future__ import annotations

import asyncio
import os

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from alveary_core.events import Key
from alveary_core.service import Service, serve
from alveary_scheduler.api import ComputeService, NodeService, QueueService
from alveary_scheduler.joining import Joining
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.providers.local import LocalNodes
from alveary_scheduler.service import Scheduler
from alveary_scheduler.settings import SchedulerSettings
from alveary_scheduler.targets import kind_of, validate_and_default

_PREFIX = "ALVEARY_TRAINER_"


def trainer_environment() -> dict[str, str]:
    """What local trainers are started with: ALVEARY_TRAINER_X becomes ALVEARY_X, the scheduler's own ALVEARY_* stay here."""
    theirs = {f"ALVEARY_{k.removeprefix(_PREFIX)}": v for k, v in os.environ.items() if k.startswith(_PREFIX)}
    return {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY_")} | theirs


async def start(service: Service) -> None:
    """Add scheduling to `service`."""
    settings = SchedulerSettings()
    projection = SchedulerProjection(str(service.settings.state_dir / "scheduler.sqlite"))
    local = LocalNodes(service.settings.state_dir, trainer_environment())
    joining = Joining(settings, trainer_environment())
    scheduler = Scheduler(service, projection, local, joining)
    await scheduler.leadership.take_over()
    grpc_server = service.server.server
    scheduler_pb2_grpc.add_ComputeServiceServicer_to_server(ComputeService(scheduler, kind_of(settings.default_kind)), grpc_server)
    scheduler_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(scheduler, joining), grpc_server)
    scheduler_pb2_grpc.add_QueueServiceServicer_to_server(QueueService(scheduler), grpc_server)
    service.server.add(scheduler_pb2.DESCRIPTOR.services_by_name.values())
    await service.connection.subscribe("alveary-heartbeat.*.*", cb=scheduler.heartbeats.on_heartbeat)
    service.spawn(projection.run(service.log), "projection")
    service.spawn(scheduler.loop.run(), "decide")
    service.spawn(scheduler.heartbeats.watch(), "nodes")
    await projection.caught_up.wait()
    await ensure_target(scheduler, settings)


async def ensure_target(scheduler: Scheduler, settings: SchedulerSettings) -> None:
    """Make the target that the settings name, where it is missing: trainers that are started beside the platform join it."""
    name = settings.default_target
    if not name or (settings.default_workspace, name) in scheduler.state.targets:
        return
    asked = ev.ComputeSpec(kind=c.TARGET_KIND_NODES, description="trainers that were started with the platform")
    spec = validate_and_default(name, asked)
    await scheduler.append(Key(settings.default_workspace, "target", name), ev.TargetCreated(spec=spec))


if __name__ == "__main__":
    asyncio.run(serve("scheduler", SchedulerSettings(), start))
