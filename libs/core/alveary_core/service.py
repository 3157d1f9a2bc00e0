"""What the composition roots share: connections up, tasks running, everything down again in order."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import nats.errors
from nats.aio.client import Client
from prometheus_client import start_http_server

from alveary_contracts.proxies import exempt
from alveary_core import stalls, telemetry
from alveary_core.disk import DiskGuard
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.objectstore import ObjectStore
from alveary_core.server import Server
from alveary_core.settings import CoreSettings

# Longest wait of each step of closing, seconds.
_CLOSING = 10.0
# All of it, seconds.
_LEAVING = 60.0
# How long a thread may hold the interpreter while another wants it.
_SWITCH_SECONDS = 0.0005


class Service:
    """One running service. `start` functions of the services receive it and add what they are."""

    def __init__(self, name: str, settings: CoreSettings, server: Server | None = None) -> None:
        self.name, self.settings = name, settings
        self.server = server or Server(settings.token_secret.get_secret_value())
        self._own_server = server is None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Awaitable[None]]] = []
        # Queries run in threads beside the event loop, which shall not wait 5 ms for each of them to let go.
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.disk = DiskGuard(settings.state_dir, settings.disk_reserve_bytes, settings.disk_reserve_fraction)
        self.server.interceptor.disk = self.disk
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: Client
        self.log: EventLog
        self.store: ObjectStore

    async def open(self, *, streams: bool = True) -> None:
        """Connect to the bus and the object store; create the streams where they are missing, unless told not to."""
        s = self.settings
        s.state_dir.mkdir(parents=True, exist_ok=True)
        # Of its own clients none reads the variables; what it starts, and the docker SDK, do.
        exempt(os.environ, (s.nats_url, s.s3_endpoint, s.s3_public_endpoint, os.environ.get("DOCKER_HOST", "")))
        self.connection = await connect(s.nats_url, s.nats_user, s.nats_password.get_secret_value(), f"alveary-{self.name}", ca=s.ca)
        if streams:
            await ensure_streams(self.connection)
        self.log = EventLog(self.connection, self.name)
        self.store = ObjectStore(
            s.s3_endpoint, s.s3_access_key.get_secret_value(), s.s3_secret_key.get_secret_value(),
            secure=s.s3_secure, public_endpoint=s.s3_public_endpoint, public_secure=s.s3_public_secure, ca=s.ca,
        )  # fmt: skip

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a task for the service's life; its failure is the service's."""
        task = asyncio.create_task(work, name=f"{self.name}.{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            telemetry.logger().error("task.failed", task=task.get_name(), exc_info=error)
            if not self.failed.done():
                self.failed.set_exception(error)

    def on_close(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Call `closer` when the service stops, last added first."""
        self._closers.append(closer)

    async def close(self) -> None:
        """Drain calls, stop tasks, close connections. No step takes longer than 10 s, whatever does not answer."""
        if self._own_server:
            await self._close_step("calls", self.server.stop())
        for closer in reversed(self._closers):
            await self._close_step(getattr(closer, "__qualname__", str(closer)), closer())
        await self._end_tasks()
        try:
            async with asyncio.timeout(_CLOSING):
                await self.connection.drain()
        except (TimeoutError, nats.errors.Error) as error:
            # What was acknowledged is stored; a server that is away cannot be told anything.
            telemetry.logger().info("close.connection", error=str(error) or type(error).__name__)
            await self._close_step("connection", self.connection.close())
        self.store.close()

    async def _close_step(self, what: str, step: Awaitable[Any]) -> None:
        try:
            async with asyncio.timeout(_CLOSING):
                await step
        except TimeoutError:
            telemetry.logger().error("close.stuck", step=what, seconds=_CLOSING)

    async def _end_tasks(self) -> None:
        # Repeatedly: a cancellation that coincides with the end of a wait may be lost (cpython issue 86296).
        deadline = asyncio.get_running_loop().time() + _CLOSING
        while pending := set(self._tasks):
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=0.2)
            if asyncio.get_running_loop().time() > deadline:
                telemetry.logger().error("tasks.left", tasks=sorted(t.get_name() for t in self._tasks))
                return


async def serve(name: str, settings: CoreSettings, start: Callable[[Service], Awaitable[None]]) -> None:
    """Run one service as a process of its own until SIGTERM or SIGINT."""
    telemetry.configure(settings.log_level, name)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = Service(name, settings)
    await service.open()
    if settings.create_buckets:
        await service.store.ensure_buckets()
    await start(service)
    port = await service.server.start(settings.listen)
    if settings.metrics_port:
        start_http_server(settings.metrics_port)
    telemetry.logger().info("serving", service=name, port=port)
    monitor = stalls.watch()
    await until(stop, service)
    monitor.stop()
    await service.close()
    if service.failed.done():
        service.failed.result()


async def until(stop: asyncio.Event, *services: Service) -> None:
    """Return when `stop` is set or one of the services failed; from then on the process has 60 s to end."""
    waiter = asyncio.create_task(stop.wait())
    waiting: list[asyncio.Future[Any]] = [waiter, *(s.failed for s in services)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    leave_within(_LEAVING)


def leave_within(seconds: float) -> None:
    """End this process after `seconds` if it has not ended by then, so that its supervisor can start it again.

    A process that hangs while it closes would hold its port without answering.
    """

    def leave() -> None:
        telemetry.logger().error("close.abandoned", seconds=seconds)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(70)  # EX_SOFTWARE, sysexits.h

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
