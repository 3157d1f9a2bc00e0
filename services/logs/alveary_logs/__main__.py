"""The composition root."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alveary_contracts.logs.v1 import logs_pb2
from alveary_core.events import Event, Key
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings
from alveary_logs.archiver import Archiver
from alveary_logs.projection import FINAL_SUBJECTS, LogsProjection
from alveary_logs.reader import LogReader
from alveary_logs.service import LogService, add
from alveary_logs.stream import LogStream

_THREADS = 4
# Logs that are archived at once: a long one does not hold up the others.
_ARCHIVED_AT_ONCE = 3


def clean_scratch(state_dir: Path) -> Path:
    """An empty folder for temporary files, whatever an earlier process of this service, killed, left in it."""
    scratch = state_dir / "logs-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


async def start(service: Service) -> None:
    """Add log streaming to `service`."""
    folder = await asyncio.to_thread(clean_scratch, service.settings.state_dir)
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="logs")
    view = LogsProjection(str(service.settings.state_dir / "logs.sqlite"))
    stream = LogStream(service.log, executor)

    def changed(event: Event) -> None:
        stream.nudge(Key(event.key.workspace, "log", event.key.id))

    view.on_event(changed)
    archiver = Archiver(service.log, service.store, stream, view, folder)
    add(LogService(service.log, service.store, view, LogReader(stream, service.store, view, folder)), service.server.server)
    service.server.add(logs_pb2.DESCRIPTOR.services_by_name.values())
    service.spawn(view.run(service.log), "projection")
    service.spawn(service.log.consume("logs", FINAL_SUBJECTS, archiver, at_once=_ARCHIVED_AT_ONCE), "archiver")
    service.spawn(archiver.keep(), "keeper")
    service.server.behind.append(view.behind)
    await view.settle()


if __name__ == "__main__":
    asyncio.run(serve("logs", CoreSettings(), start))
