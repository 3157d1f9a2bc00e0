"""Replicas of the images service share builds through the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import SecretStr

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import lock_key
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_core.aggregates import Aggregates
from alveary_core.server import Server
from alveary_core.service import Service
from alveary_images import domain
from alveary_images.adapters.builder import Build, Lock, Say
from alveary_images.handlers import SUBJECTS, Handlers
from alveary_images.projection import ImagesProjection
from alveary_images.settings import ImagesSettings


class SlowBuilder:
    """Takes its time, and counts."""

    kind = "slow"

    def __init__(self, seconds: float, built: list[Build]) -> None:
        self.seconds, self.built = seconds, built

    async def build(self, environment: c.Environment, which: Build, say: Say) -> Lock:
        self.built.append(which)
        await asyncio.sleep(self.seconds)
        return Lock(which.digest, self.kind)

    async def remove(self, image: str) -> None:
        raise AssertionError("nothing is to be removed")


@asynccontextmanager
async def replica(layout: Layout, folder: Path, builder: SlowBuilder, build_seconds: float = 60.0) -> AsyncIterator[Handlers]:
    """The images service as its composition root makes it, but for the builder."""
    settings = ImagesSettings(
        nats_url=f"nats://127.0.0.1:{layout.ports.nats}", nats_user="images", nats_password=SecretStr(layout.secrets["images"]),
        s3_endpoint=f"127.0.0.1:{layout.ports.s3}", s3_access_key=SecretStr(layout.secrets["s3_access"]),
        s3_secret_key=SecretStr(layout.secrets["s3_secret"]), state_dir=folder, build_seconds=build_seconds,
    )  # fmt: skip
    service = Service("images", settings, Server("secret"))
    await service.open()
    await service.store.ensure_buckets()
    view = ImagesProjection(str(folder / "images.sqlite"))
    images = Aggregates(service.log, "image", domain.Image, lambda image, event: domain.evolve(image, event.message))
    handlers = Handlers(service, images, view, builder, settings)
    service.on_close(handlers.stop)
    service.spawn(view.run(service.log), "projection")
    service.spawn(service.log.consume("images", SUBJECTS, handlers), "handlers")
    service.spawn(handlers.recover(), "recover")
    service.spawn(handlers.stop_unwanted(), "unwanted")
    await view.caught_up.wait()
    try:
        yield handlers
    finally:
        await service.close()
        assert not service.failed.done()


async def state(handlers: Handlers, workspace: str, digest: str, *wanted: pb.ImageState.ValueType) -> domain.Image:
    deadline = time.monotonic() + 30
    while True:
        image = domain.Image()
        for event in await handlers._service.log.read(handlers._images.key(workspace, digest)):
            image = domain.evolve(image, event.message)
        if image.state in wanted:
            return image
        assert time.monotonic() < deadline, image
        await asyncio.sleep(0.02)


async def test_two_replicas_build_each_image_once(bare_servers: Layout, tmp_path: Path) -> None:
    built: list[Build] = []
    digests = [new_id().lower() for _ in range(6)]
    async with replica(bare_servers, tmp_path / "a", SlowBuilder(0.3, built)) as one, replica(bare_servers, tmp_path / "b", SlowBuilder(0.3, built)) as two:  # fmt: skip
        # Both are asked for all, as the handlers of two replicas may be, and both go through what is unfinished.
        await asyncio.gather(*(h.request("w", d, c.Environment(), "") for h in (one, two) for d in digests))
        for digest in digests:
            for handlers in (one, two):
                handlers._start(handlers._images.key("w", digest))
        for digest in digests:
            await state(one, "w", digest, pb.IMAGE_STATE_READY)
            events = await one._service.log.read(one._images.key("w", digest))
            assert [type(e.message) for e in events] == [ev.ImageRequested, ev.ImageBuildStarted, ev.ImageReady]
            assert await one._service.store.size("images", lock_key("w", digest))
    assert sorted(b.digest for b in built) == sorted(digests)
    assert len({b.name for b in built}) == len(digests)


async def test_workspaces_have_images_of_their_own(bare_servers: Layout, tmp_path: Path) -> None:
    built: list[Build] = []
    digest = new_id().lower()
    async with replica(bare_servers, tmp_path, SlowBuilder(0.0, built)) as handlers:
        for workspace in ("one", "two"):
            await handlers.request(workspace, digest, c.Environment(), "")
            await state(handlers, workspace, digest, pb.IMAGE_STATE_READY)
            assert await handlers._service.store.size("images", lock_key(workspace, digest))
    assert sorted(b.workspace for b in built) == ["one", "two"]


async def test_a_build_that_takes_too_long_is_stopped_and_can_be_asked_for_again(bare_servers: Layout, tmp_path: Path) -> None:
    built: list[Build] = []
    digest = new_id().lower()
    builder = SlowBuilder(3600.0, built)
    async with replica(bare_servers, tmp_path, builder, build_seconds=0.2) as handlers:
        await handlers.request("w", digest, c.Environment(), "")
        image = await state(handlers, "w", digest, pb.IMAGE_STATE_FAILED)
        assert image.reason == "the build took longer than 0.2 s"
        builder.seconds = 0.0
        await handlers.request("w", digest, c.Environment(), "")
        await state(handlers, "w", digest, pb.IMAGE_STATE_READY)
    assert len(built) == 2
