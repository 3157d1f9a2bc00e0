"""Which event makes this service do what, and the builds under way."""

from __future__ import annotations

import asyncio
import time

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import lock_key
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import token
from alveary_core import telemetry
from alveary_core.aggregates import Aggregates
from alveary_core.events import Event, Key
from alveary_core.service import Service
from alveary_images import domain
from alveary_images.adapters.builder import Build, Builder, Lock
from alveary_images.adapters.resolve import BUCKET, BuildFailed
from alveary_images.projection import ImagesProjection
from alveary_images.settings import ImagesSettings

SUBJECTS = ("alveary.*.run.*.submitted", "alveary.*.image.*.requested")
LEASE = 30.0
_PARALLEL = 2


class Handlers:
    """Builds images that runs wait for; one build for many runs, one builder for many replicas."""

    def __init__(
        self, service: Service, images: Aggregates[domain.Image], projection: ImagesProjection, builder: Builder, settings: ImagesSettings
    ) -> None:
        self._settings = settings
        self._service, self._images, self._view, self._builder = service, images, projection, builder
        self._me = new_id()
        self._builds: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(_PARALLEL)
        self._unwanted = asyncio.Event()
        projection.on_event(self.on_view)

    async def __call__(self, event: Event) -> None:
        """Handle one event; idempotent."""
        match event.message:
            case ev.RunSubmitted() as submitted:
                await self.request(event.key.workspace, submitted.image_digest, submitted.spec.environment, event.key.id)
            case ev.ImageRequested():
                self._start(event.key)

    def on_view(self, event: Event) -> None:
        """Stop builds that no run waits for. Called in every replica, so in the one that builds."""
        if event.key.aggregate == "run" and event.name in ("cancel_requested", "canceled", "failed") and self._builds:
            self._unwanted.set()

    async def stop_unwanted(self) -> None:
        """Until cancelled: stop builds that no run waits for any longer."""
        while True:
            await self._unwanted.wait()
            self._unwanted.clear()
            for key, task in list(self._builds.items()):
                if not await self._view.waiting(key.workspace, key.id) and not await self._view.wanted_anyway(key):
                    task.cancel("no run waits for it any more")

    async def request(self, workspace: str, digest: str, environment: c.Environment, run_id: str) -> domain.Image:
        """Make sure that an image is built."""
        key = self._images.key(workspace, digest)
        image, _ = await self._images.execute(key, lambda image: domain.request(image, environment, run_id))
        return image

    def _start(self, key: Key) -> None:
        if key not in self._builds:
            task = self._service.spawn(self._build(key), f"build.{key.id[:8]}")
            self._builds[key] = task
            telemetry.BUILDS.set(len(self._builds))
            task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: Key) -> None:
        self._builds.pop(key, None)
        telemetry.BUILDS.set(len(self._builds))

    async def _build(self, key: Key) -> None:
        async with self._slots:
            image, _ = await self._images.execute(key, lambda i: domain.claim(i, self._me, time.time(), LEASE))
            if not domain.holds(image, self._me):
                return
            renewal = asyncio.create_task(self._renew(key))
            started = time.monotonic()
            limit = self._settings.build_seconds
            try:
                async with asyncio.timeout(limit):
                    lock = await self._make(key, image.environment)
            except BuildFailed as error:
                reason = str(error)
                await self._images.execute(key, lambda i: domain.failed(i, self._me, reason))
            except TimeoutError:
                await self._images.execute(key, lambda i: domain.failed(i, self._me, f"the build took longer than {limit:g} s"))
            except asyncio.CancelledError:
                if not self._service.failed.done() and not self._stopping:
                    await asyncio.shield(self._images.execute(key, lambda i: domain.failed(i, self._me, "canceled", canceled=True)))
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                telemetry.logger().error("build.failed", digest=key.id, exc_info=error)
                await self._images.execute(key, lambda i: domain.failed(i, self._me, text))
            else:
                event = ev.ImageReady(
                    lock_key=lock_key(key.workspace, key.id), python_version=lock.python_version, packages=lock.packages,
                    build_seconds=time.monotonic() - started, environment=image.environment, builder=lock.builder,
                    image=lock.image, size=lock.size,
                )  # fmt: skip
                await self._images.execute(key, lambda i: domain.ready(i, self._me, event))
            finally:
                renewal.cancel()

    _stopping = False

    async def stop(self) -> None:
        """The service stops: builds end without a word, and are taken up again when their lease is over."""
        self._stopping = True

    async def _make(self, key: Key, environment: c.Environment) -> Lock:
        async def say(line: str) -> None:
            await self._say(key, line)

        lock = await self._builder.build(environment, Build(key.workspace, key.id, new_id().lower()), say)
        await self._service.store.put(BUCKET, lock_key(key.workspace, key.id), lock.to_json())
        await say("the environment is ready")
        return lock

    async def collect(self) -> None:
        """For ever: remove images that no run asked for in long, and the least recently used beyond the limit."""
        await self._view.caught_up.wait()
        settings = self._settings
        while True:
            for workspace, digest, reason in await self._view.superfluous(
                time.time() - settings.images_days * 86400, settings.images_bytes
            ):
                key = self._images.key(workspace, digest)
                evicted: list[str] = []

                def decide(image: domain.Image, reason: str = reason, evicted: list[str] = evicted) -> domain.Events:
                    evicted[:] = [image.ready.image] if image.ready is not None else []
                    return domain.evict(image, reason)

                # First the fact, so that no run is promised an image that is about to go.
                await self._images.execute(key, decide)
                for reference in filter(None, evicted):
                    try:
                        await self._builder.remove(reference)
                    except Exception as error:
                        telemetry.logger().error("image.remove", digest=digest, exc_info=error)
            await asyncio.sleep(settings.collect_seconds)

    async def _renew(self, key: Key) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            await self._images.execute(key, lambda i: domain.claim(i, self._me, time.time(), LEASE) if domain.holds(i, self._me) else [])

    async def _say(self, key: Key, text: str) -> None:
        """A line of the prepare log of every run that waits for the image."""
        line = logs_pb2.LogLine(stream="prepare", data=text.encode())
        line.time.GetCurrentTime()
        data = logs_pb2.LogChunk(lines=[line]).SerializeToString()
        for run_id in await self._view.waiting(key.workspace, key.id):
            subject = f"alveary-logs.{token(key.workspace)}.{token(run_id)}"
            await self._service.log.js.publish(subject, data, headers={"Nats-Msg-Id": new_id()})

    async def recover(self) -> None:
        """For ever: take up builds whose builder died."""
        await self._view.caught_up.wait()
        while True:
            for workspace, digest in await self._view.unfinished():
                key = self._images.key(workspace, digest)
                image, _ = await self._images.load(key)
                dead = image.state == pb.IMAGE_STATE_BUILDING and image.lease_until < time.time()
                if image.state == pb.IMAGE_STATE_REQUESTED or dead:
                    self._start(key)
            await asyncio.sleep(LEASE / 3)
