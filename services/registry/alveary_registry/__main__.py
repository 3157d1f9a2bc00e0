"""The composition root."""

from __future__ import annotations

import asyncio

from alveary_contracts.registry.v1 import registry_pb2, registry_pb2_grpc
from alveary_core.aggregates import Aggregates
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings
from alveary_registry import domain
from alveary_registry.api import DatasetService, ModelService
from alveary_registry.export import SUBJECTS, ExportHandler
from alveary_registry.projection import RegistryProjection


async def start(service: Service) -> None:
    """Add models and datasets to `service`."""
    projection = RegistryProjection(str(service.settings.state_dir / "registry.sqlite"))
    models = Aggregates(service.log, "model", domain.Model, lambda m, event: domain.evolve(m, event.message))
    datasets = Aggregates(service.log, "dataset", domain.Dataset, lambda d, event: domain.evolve_dataset(d, event.message))
    server = service.server.server
    registry_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(service.store, models, projection), server)
    registry_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetService(service.store, datasets, projection), server)
    service.server.add(registry_pb2.DESCRIPTOR.services_by_name.values())
    service.spawn(projection.run(service.log), "projection")
    service.spawn(service.log.consume("registry", SUBJECTS, ExportHandler(service.store, models)), "exports")
    service.server.behind.append(projection.behind)
    await projection.settle()


if __name__ == "__main__":
    asyncio.run(serve("registry", CoreSettings(), start))
