"""The composition root."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
from pathlib import Path

from prometheus_client import start_http_server

from alveary_contracts.ids import new_id
from alveary_contracts.trainer.v1 import trainer_pb2, trainer_pb2_grpc
from alveary_core import stalls, telemetry
from alveary_core.objectstore import ObjectStore
from alveary_core.service import Service, until
from alveary_trainer.adapters.cgroups import Groups
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.gpus import gpu_models
from alveary_trainer.adapters.process import ProcessRuntime, address_towards, become_subreaper
from alveary_trainer.adapters.runtime import Runtime
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.agent import Agent, TrainerService
from alveary_trainer.content_cache import ContentCache
from alveary_trainer.node import NodeContext
from alveary_trainer.settings import TrainerSettings
from alveary_trainer.short_paths import ShortLinks, sockets

# mpirun splits its launch agent at spaces, and paths may have some: it finds this one on the PATH.
_RSH = '#!/bin/sh\nexec "$ALVEARY_PYTHON" -I -S "$ALVEARY_LIB/alveary_mpi_agent.py" "$@"\n'


def library(cache: Path) -> Path:
    """A folder that holds a copy of the `alveary` package and the shim and nothing else, named by its content.

    Training processes get it on PYTHONPATH: their environments need not contain it, and it always fits the trainer.
    """
    spec = importlib.util.find_spec("alveary")
    if spec is None or spec.origin is None:
        raise RuntimeError("the distribution `alveary` (libs/sdk) is not installed beside the trainer")
    source = Path(spec.origin).parent
    files = sorted(f for f in source.rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(source)).encode() + b"\0" + file.read_bytes())
    ours = Path(__file__).parent / "adapters"
    names = {
        "alveary_shim.py": "shim.py",
        "alveary_rank.py": "rank.py",
        "alveary_mpi_agent.py": "mpi_agent.py",
        "alveary_exec.py": "alveary_exec.py",
    }
    scripts = {name: ours / file for name, file in names.items()}
    for script in scripts.values():
        digest.update(script.read_bytes())
    digest.update(_RSH.encode())
    final = cache / "runtime" / digest.hexdigest()[:16]
    wanted = {f"alveary/{file.relative_to(source)}": file.read_bytes() for file in files}
    wanted |= {name: script.read_bytes() for name, script in scripts.items()} | {"alveary-rsh": _RSH.encode()}
    # A run that changed it where trainers run as root would speak for all that come after it.
    if final.exists() and any(not (final / name).is_file() or (final / name).read_bytes() != data for name, data in wanted.items()):
        final.rename(cache / "runtime" / f".changed.{final.name}.{new_id()}")
    if not final.exists():
        part = final.with_name(f".{final.name}.{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part / "alveary", ignore=shutil.ignore_patterns("__pycache__"))
        for name, script in scripts.items():
            shutil.copy(script, part / name)
        (part / "alveary-rsh").write_text(_RSH)
        (part / "alveary-rsh").chmod(0o755)
        try:
            part.rename(final)
        except OSError:  # another trainer of this machine was faster
            shutil.rmtree(part)
    return final


def runs_dir_of(settings: TrainerSettings) -> Path:
    """The folder of this node's attempts, without symbolic links: its path in their variables tells a later life whose they were."""
    return (settings.state_dir / "work" / settings.node).resolve()


def claimed(runs_dir: Path) -> int:
    """An empty folder for this node's attempts, held by a lock that goes with this process.

    Raises:
        RuntimeError: another trainer of the same node has it.
    """
    runs_dir.parent.mkdir(parents=True, exist_ok=True)
    mark = os.open(runs_dir.parent / f".{runs_dir.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(f"another trainer already is node {runs_dir.name} on this machine") from error
    remove_tree(runs_dir)
    runs_dir.mkdir()
    return mark


def remove_unclaimed(folder: Path) -> None:
    """Folders of nodes that are no more: containers get new host names, and leave their folders behind."""
    for runs_dir in folder.iterdir():
        if runs_dir.name.startswith("."):
            continue
        mark = os.open(folder / f".{runs_dir.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(runs_dir)
            (folder / f".{runs_dir.name}.lock").unlink(missing_ok=True)
        except BlockingIOError:
            continue  # it lives
        finally:
            os.close(mark)


def runtime_of(settings: TrainerSettings, cache: Path, store: ObjectStore, runs_dir: Path) -> Runtime:
    """The runtime that the settings name."""
    if settings.runtime == "docker":
        from alveary_trainer.adapters.containers import DockerRuntime  # needs a package that a process node may lack

        return DockerRuntime(settings, cache, store, runs_dir)
    address = settings.address or address_towards(settings.nats_url)
    groups = Groups(runs_dir)
    for sentence in groups.support.sentences():
        telemetry.logger().info("processes", how=sentence)
    return ProcessRuntime(Environments(cache / "environments", settings.environments_bytes, store), groups, ShortLinks(runs_dir), address)


async def main() -> None:
    """Serve as a node until SIGTERM, or until the target shrinks."""
    os.umask(0o022)  # folders that runs read are made here, by whoever started it with whatever mask
    settings = TrainerSettings()
    if settings.gpu_count < 0:
        settings = settings.model_copy(update={"gpu_count": len(gpu_models())})
    telemetry.configure(settings.log_level, "trainer")
    become_subreaper()
    service = Service("trainer", settings)
    await service.open()
    cache = settings.cache_dir or settings.state_dir / "cache"
    runs_dir = runs_dir_of(settings)
    claim = claimed(runs_dir)
    await asyncio.to_thread(remove_unclaimed, runs_dir.parent)
    limit = settings.data_bytes
    context = NodeContext(
        settings, new_id(), service.log, service.store,
        runtime_of(settings, cache, service.store, runs_dir),
        ContentCache(cache / "snapshots", "snapshots", service.store, limit, read_only=False),
        ContentCache(cache / "datasets", "datasets", service.store, limit, read_only=True),
        ContentCache(cache / "models", "models", service.store, limit, read_only=True),
        runs_dir, sockets(runs_dir, settings.sockets_dir), library(cache),
    )  # fmt: skip
    await context.runtime.sweep()
    agent = Agent(context)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.leave)
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(TrainerService(agent, context), service.server.server)
    service.server.add(trainer_pb2.DESCRIPTOR.services_by_name.values())
    await service.server.start(settings.listen)
    if settings.metrics_port:
        start_http_server(settings.metrics_port)
    start = await service.log.last_sequence() + 1
    service.spawn(agent.follow(start), "follow")
    service.spawn(agent.disk.run(), "disk")
    agent.heartbeat.start()
    service.spawn(_whole(agent.heartbeat.over), "heartbeat")
    monitor = stalls.watch()
    await until(agent.done, service)
    monitor.stop()
    await agent.stop()
    await context.close()
    await service.close()
    await context.runtime.close()
    await asyncio.to_thread(shutil.rmtree, context.sockets_dir, ignore_errors=True)
    os.close(claim)
    if service.failed.done():
        service.failed.result()


async def _whole(future: asyncio.Future[None]) -> None:
    await future


if __name__ == "__main__":
    asyncio.run(main())
