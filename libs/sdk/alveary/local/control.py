"""The control plane as one process: all services behind one port. `python -m alveary.local.control`."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Awaitable, Callable

import alveary_archiver.__main__ as archiver
from prometheus_client import start_http_server
from pydantic import SecretStr

import alveary_images.__main__ as images
import alveary_logs.__main__ as logs
import alveary_registry.__main__ as registry
import alveary_runs.__main__ as runs
import alveary_scheduler.__main__ as scheduler
from alveary_core import stalls, telemetry
from alveary_core.server import Server
from alveary_core.service import Service, until
from alveary_core.settings import CoreSettings

_STARTS: dict[str, Callable[[Service], Awaitable[None]]] = {
    "runs": runs.start, "images": images.start, "scheduler": scheduler.start, "logs": logs.start, "registry": registry.start,
    "archiver": archiver.start,
}  # fmt: skip


async def main() -> None:
    """Serve until SIGTERM. Each service has its own connection, as its own NATS user."""
    base = CoreSettings()
    telemetry.configure(base.log_level, "control")
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = Server(base.token_secret.get_secret_value())
    services: list[Service] = []
    for name in _STARTS:
        password = SecretStr(os.environ.pop(f"ALVEARY_NATS_PASSWORD_{name.upper()}"))
        services.append(Service(name, base.model_copy(update={"nats_user": name, "nats_password": password}), server))
    await asyncio.gather(*(s.open() for s in services))
    await services[0].store.ensure_buckets()
    await asyncio.gather(*(start(s) for start, s in zip(_STARTS.values(), services, strict=True)))
    await server.start(base.listen)
    if base.metrics_port:
        start_http_server(base.metrics_port, base.listen.rpartition(":")[0])
    telemetry.logger().info("serving", port=server.port)
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look at it
    monitor = stalls.watch()
    await until(stop, *services)
    monitor.stop()
    await server.stop()
    await asyncio.gather(*(s.close() for s in services))
    for service in services:
        if service.failed.done():
            service.failed.result()


if __name__ == "__main__":
    asyncio.run(main())
