"""The composition root."""

from __future__ import annotations

import asyncio

from alveary_contracts.logs.v1 import logs_pb2, logs_pb2_grpc
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings
from alveary_logs.service import SUBJECTS, Archiver, LogService, LogsProjection


async def start(service: Service) -> None:
    """Add log streaming to `service`."""
    projection = LogsProjection(str(service.settings.state_dir / "logs.sqlite"))
    logs_pb2_grpc.add_LogServiceServicer_to_server(LogService(service.log, service.store, projection), service.server.server)
    service.server.add(logs_pb2.DESCRIPTOR.services_by_name.values())
    service.spawn(projection.run(service.log), "projection")
    service.spawn(service.log.consume("logs", SUBJECTS, Archiver(service.log, service.store)), "archiver")
    await projection.caught_up.wait()


if __name__ == "__main__":
    asyncio.run(serve("logs", CoreSettings(), start))
