"""The composition root."""

from __future__ import annotations

import asyncio

from alveary_contracts.images.v1 import images_pb2, images_pb2_grpc
from alveary_core.aggregates import Aggregates
from alveary_core.service import Service, serve
from alveary_images import domain
from alveary_images.adapters.builder import Builder
from alveary_images.adapters.credentials import Credentials
from alveary_images.adapters.resolve import work_below
from alveary_images.adapters.venv import VenvBuilder
from alveary_images.api import ImageService
from alveary_images.handlers import SUBJECTS, Handlers
from alveary_images.projection import ImagesProjection
from alveary_images.settings import ImagesSettings


async def start(service: Service) -> None:
    """Add image building to `service`."""
    projection = ImagesProjection(str(service.settings.state_dir / "images.sqlite"))
    images = Aggregates(service.log, "image", domain.Image, lambda image, event: domain.evolve(image, event.message))
    settings = ImagesSettings()
    work_below(settings.state_dir / "builds")
    credentials = Credentials(settings, service.store)
    builder: Builder = VenvBuilder(service.store)
    if settings.builder == "docker":
        from alveary_images.adapters.docker import DockerBuilder  # needs packages that a venv platform may lack

        builder = DockerBuilder(settings, service.store, credentials)
    handlers = Handlers(service, images, projection, builder, settings)
    images_pb2_grpc.add_ImageServiceServicer_to_server(ImageService(handlers, projection, credentials), service.server.server)
    service.server.add(images_pb2.DESCRIPTOR.services_by_name.values())
    service.on_close(handlers.stop)
    service.spawn(projection.run(service.log), "projection")
    service.spawn(service.log.consume("images", SUBJECTS, handlers), "handlers")
    service.spawn(handlers.recover(), "recover")
    service.spawn(handlers.collect(), "collect")
    service.spawn(handlers.stop_unwanted(), "unwanted")
    service.server.behind.append(projection.behind)
    await projection.settle()


if __name__ == "__main__":
    asyncio.run(serve("images", ImagesSettings(), start))
