"""The docker runtime: an attempt's processes in one container that can reach nothing but what it was given.

The first process of the container is the shim (see shim.py), with stdout and stderr on named pipes in a mounted folder:
so a script that prints faster than the network takes is slowed, as in the process runtime, and the daemon keeps no log
of its own. The shim's connection to the attempt's socket is its tie to the trainer: when it breaks, the container ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import posixpath
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import psutil
import requests

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import lock_key
from alveary_contracts.proxies import for_runs, host_of
from alveary_core import telemetry
from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_trainer.adapters.runtime import (
    MOST_PROCESSES,
    AttemptPaths,
    Host,
    Limits,
    Outcome,
    ProgressCallback,
    Staged,
    StagingFailed,
    Usage,
    View,
)
from alveary_trainer.settings import TrainerSettings

T = TypeVar("T")
NODE_LABEL, RUN_LABEL, IMAGE_LABEL = "org.alveary.node", "org.alveary.run", "org.alveary.environment"
# Of the network that the containers of one run on several nodes have to themselves.
GANG_LABEL = "org.alveary.gang"
_GANG_PORT = 29500
# Containers of different runs do not see each other on it, as they would on docker's own bridge.
NETWORK = "alveary-runs"
_WORK, _TMP, _LIB, _IO, _SOCKETS, _INPUTS = (
    "/alveary/work", "/tmp", "/alveary/lib", "/alveary/io", "/alveary/socket", "/alveary/inputs",
)  # fmt: skip
# /dev/shm is a limit, and holds nothing back: what is in it counts as the run's memory.
_LEAST_SHM = 2 << 30
_INSIST = 3.0
_FORGOTTEN = 120.0
_REFUSED = (docker.errors.DockerException, requests.exceptions.RequestException)


class DockerRuntime:
    """Containers of one daemon."""

    kind = "docker"

    def __init__(self, settings: TrainerSettings, cache: Path, store: ObjectStore, runs_dir: Path) -> None:
        self._settings, self._store = settings, store
        # Waiting for a container blocks a thread; there is one for each attempt that a node can hold.
        self._pool = ThreadPoolExecutor(256, thread_name_prefix="docker")
        self._api = docker.APIClient(timeout=120, **docker.utils.kwargs_from_env())
        self._owner = hashlib.sha256(str(runs_dir.resolve()).encode()).hexdigest()[:16]
        self._marks = cache / "images"
        self._marks.mkdir(parents=True, exist_ok=True)
        self._pulls: dict[str, asyncio.Lock] = {}
        me = os.getuid()
        self._uid, self._gid = (settings.run_uid, settings.run_uid) if me == 0 else (me, os.getgid())

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    # ---- images ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def stage(self, workspace: str, digest: str, environment: c.Environment, progress: ProgressCallback) -> AsyncIterator[Staged]:
        """See Runtime."""
        try:
            lock = json.loads(await self._store.get("images", lock_key(workspace, digest)))
        except NotFound as error:
            raise StagingFailed(f"the image of environment {digest[:12]} is gone from the object store") from error
        image = lock.get("image", "")
        if not image:
            raise StagingFailed(
                f"environment {digest[:12]} was built as a virtual environment, and this node runs containers: set the environment's rebuild_key"
            )
        if self._settings.registry_at and image.startswith(f"{self._settings.registry}/"):
            image = self._settings.registry_at + image.removeprefix(self._settings.registry)
        async with self._pulls.setdefault(image, asyncio.Lock()):
            if not await self._do(lambda: self._has(image)):
                await self._pull(image, progress)
                await self._do(self._evict)
        mark = self._marks / image.rpartition(":")[2]
        mark.touch()
        yield Staged(lock["python"], image)

    def _has(self, image: str) -> bool:
        try:
            self._api.inspect_image(image)
        except docker.errors.ImageNotFound:
            return False
        except _REFUSED as error:
            raise StagingFailed(f"the docker daemon of this node does not answer: {error}") from error
        return True

    async def _pull(self, image: str, progress: ProgressCallback) -> None:
        loop, stop = asyncio.get_running_loop(), threading.Event()
        await progress(f"pulling {image}")
        auth = None
        if self._settings.registry_user and image.startswith(f"{self._settings.registry_at or self._settings.registry}/"):
            auth = {"username": self._settings.registry_user, "password": self._settings.registry_password.get_secret_value()}

        def work() -> None:
            said = time.monotonic()
            layers: dict[str, tuple[int, int]] = {}
            try:
                for message in self._api.pull(image, stream=True, decode=True, auth_config=auth):
                    if stop.is_set():
                        return
                    if "error" in message:
                        raise StagingFailed(f"{image} cannot be pulled: {message['error']}")
                    detail = message.get("progressDetail") or {}
                    if "total" in detail:
                        layers[message.get("id", "")] = (detail.get("current", 0), detail["total"])
                    if layers and time.monotonic() - said > 2:
                        said = time.monotonic()
                        done, total = (sum(x) / 1e6 for x in zip(*layers.values(), strict=True))
                        asyncio.run_coroutine_threadsafe(_report(progress, f"pulled {done:.0f} of {total:.0f} MB"), loop)
            except _REFUSED as error:
                raise StagingFailed(f"{image} cannot be pulled: {error}") from error

        try:
            await self._do(work)
        finally:
            stop.set()  # cancelled: the thread ends with the next message
        await progress("the image is here")

    def _evict(self) -> None:
        """Images beyond the limit, least recently used first. Those without a registry cannot be had again: they stay."""
        found = []
        for image in self._api.images(filters={"label": IMAGE_LABEL}):
            for name in image.get("RepoDigests") or []:
                mark = self._marks / name.rpartition(":")[2]
                found.append((mark.stat().st_mtime if mark.exists() else 0.0, name, int(image["Size"])))
        total = sum(size for _, _, size in found)
        for _, name, size in sorted(found):
            if total <= self._settings.environments_bytes:
                return
            try:
                self._api.remove_image(name)
                total -= size
            except docker.errors.APIError as error:  # a container uses it
                telemetry.logger().info("image.kept", image=name, why=str(error.explanation or error))

    # ---- folders --------------------------------------------------------------------------------------------------

    def view(self, paths: AttemptPaths, staged: Staged) -> View:
        """Fixed paths inside the container; it inherits the image's own variables, and the node's proxies."""
        inputs = {name: f"{_INPUTS}/{name}" for name in paths.inputs}
        return View(_WORK, _TMP, f"{_SOCKETS}/{paths.socket.name}", _LIB, inputs, _reachable(for_runs(os.environ)))

    def shared_memory(self, resources: c.Resources) -> str:
        """See Runtime."""
        size = shm_bytes(resources, self._settings.node_memory_bytes) / 2**30
        return f"its /dev/shm had {size:g} GiB: ask for more with shm_size, or use fewer workers"

    def leave(self, paths: AttemptPaths) -> None:
        """Nothing: the paths are the container's own."""

    def host_path(self, paths: AttemptPaths, path: str) -> Path:
        """Of a path below the working directory or /tmp."""
        full = posixpath.normpath(posixpath.join(_WORK, path))
        for inside, here in ((_WORK, paths.work), (_TMP, paths.tmp)):
            if full.startswith(f"{inside}/"):
                return here / full.removeprefix(f"{inside}/")
        raise ValueError(f"{path} is neither below the working directory nor below {_TMP}")

    def readable_below(self, paths: AttemptPaths) -> Path:
        """The attempt's folders: a link that a script made must not make the trainer read what is the node's."""
        return paths.root

    def command(self, first: str, staged: Staged) -> str:
        """Whatever the image's PATH has."""
        return first

    # ---- runs on several nodes ------------------------------------------------------------------------------------

    async def host(self, gang: str, index: int, network: str) -> Host:
        """See Runtime. A name on the network that the containers share: docker's resolver knows it."""
        if not gang:
            return Host("localhost", "", _GANG_PORT)
        if network == "none":
            raise StagingFailed("the containers of this target have no network, and a run on several nodes needs one")
        network_scope = ""
        if network == "bridge":
            # A network of the run's own, on one daemon; trainers of another daemon would not find it.
            network_scope = str((await self._do(self._api.info))["ID"])
            if index == 0:
                await self._do(lambda: self._gang_network(gang))
        return Host(f"{gang.lower()}-{index:04d}", network_scope, _GANG_PORT)

    def _gang_network(self, gang: str) -> None:
        try:
            self._api.create_network(gang_network(gang), driver="bridge", check_duplicate=True, labels={GANG_LABEL: gang})
        except _REFUSED as error:
            raise StagingFailed(f"the network of this run's containers cannot be made: {error}") from error

    def _leave_gang(self, gang: str) -> None:
        """Remove the network, unless others of the run are still on it: the last one does it."""
        with contextlib.suppress(docker.errors.NotFound):
            if not self._api.inspect_network(gang_network(gang)).get("Containers"):
                with contextlib.suppress(docker.errors.APIError):  # somebody came meanwhile
                    self._api.remove_network(gang_network(gang))

    # ---- containers -----------------------------------------------------------------------------------------------

    async def launch(
        self, paths: AttemptPaths, staged: Staged, argv: Sequence[str], env: Mapping[str, str], limits: Limits
    ) -> ContainerTree:
        """See Runtime."""
        folder = paths.root / "io"
        folder.mkdir()
        order = {"argv": list(argv), "cwd": _WORK, "env": dict(env) | {"HOME": _TMP}}
        (folder / "order.json").write_text(json.dumps(order))
        for name in ("stdout", "stderr"):
            os.mkfifo(folder / name, 0o600)
        if os.getuid() == 0:
            await asyncio.to_thread(_give, [paths.root, paths.socket.parent], self._uid, self._gid)
        # Ends of our own keep the pipes from ending before the container has opened them.
        ends = {name: os.open(folder / name, os.O_RDWR | os.O_NONBLOCK) for name in ("stdout", "stderr")}
        readers = {name: os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK) for name in ("stdout", "stderr")}
        try:
            container = await self._do(lambda: self._start(paths, staged, limits, folder))
        except BaseException as error:
            for descriptor in (*ends.values(), *readers.values()):
                os.close(descriptor)
            await self._do(lambda: self._remove(self._name(paths)))
            if limits.gang and limits.network == "bridge":
                await self._do(lambda: self._leave_gang(limits.gang))
            if isinstance(error, _REFUSED):
                text = error.explanation if isinstance(error, docker.errors.APIError) and error.explanation else str(error)
                raise StagingFailed(f"the container cannot be started: {text}") from error
            raise
        return ContainerTree(self, container, folder, readers, list(ends.values()), limits.gang if limits.network == "bridge" else "")

    def _name(self, paths: AttemptPaths) -> str:
        return f"alveary-{paths.name.lower()}-{self._owner[:6]}"

    def _start(self, paths: AttemptPaths, staged: Staged, limits: Limits, folder: Path) -> str:
        api, resources = self._api, limits.resources
        if limits.network == "bridge":
            network = gang_network(limits.gang) if limits.gang else self._shared_network()
        else:
            network = limits.network
        aliases = None
        if limits.gang:
            aliases = api.create_networking_config({network: api.create_endpoint_config(aliases=[limits.host])})
        binds = {
            str(paths.work): {"bind": _WORK, "mode": "rw"}, str(paths.tmp): {"bind": _TMP, "mode": "rw"},
            str(folder): {"bind": _IO, "mode": "rw"}, str(paths.socket.parent): {"bind": _SOCKETS, "mode": "rw"},
            str(paths.lib): {"bind": _LIB, "mode": "ro"},
            **{str(path): {"bind": f"{_INPUTS}/{name}", "mode": "ro"} for name, path in paths.inputs.items()},
        }  # fmt: skip
        devices = [docker.types.DeviceRequest(device_ids=[str(g) for g in limits.gpus], capabilities=[["gpu"]])] if limits.gpus else None
        memory = resources.memory_bytes or None
        host = api.create_host_config(
            binds=binds, network_mode=network, read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges"],
            nano_cpus=int(resources.cpus * 1e9) or None, mem_limit=memory, memswap_limit=memory, shm_size=shm_bytes(resources, self._settings.node_memory_bytes),
            pids_limit=MOST_PROCESSES, device_requests=devices, log_config={"Type": "none"}, ipc_mode="private",
        )  # fmt: skip
        shim = [staged.python, "-I", "-S", f"{_LIB}/alveary_shim.py", _IO, f"{_SOCKETS}/{paths.socket.name}"]
        created = api.create_container(
            staged.image, entrypoint=shim, command=[], name=self._name(paths), user=f"{self._uid}:{self._gid}", working_dir=_WORK,
            host_config=host, labels={NODE_LABEL: self._owner, RUN_LABEL: paths.name}, stdin_open=False, tty=False,
            networking_config=aliases, hostname="alveary",
        )  # fmt: skip
        api.start(created["Id"])
        return str(created["Id"])

    def _shared_network(self) -> str:
        """A bridge whose containers reach the world, and not each other: made once on each docker host, and kept."""
        if not self._api.networks(names=[NETWORK]):
            try:
                self._api.create_network(
                    NETWORK, driver="bridge", check_duplicate=True, options={"com.docker.network.bridge.enable_icc": "false"}
                )
            except docker.errors.APIError:
                if not self._api.networks(names=[NETWORK]):  # else another trainer was faster
                    raise
        return NETWORK

    def _remove(self, container: str) -> None:
        with contextlib.suppress(docker.errors.NotFound):
            self._api.remove_container(container, v=True, force=True)

    async def sweep(self) -> None:
        """Containers of an earlier life of this node, started or not."""

        def work() -> None:
            for found in self._api.containers(all=True, filters={"label": f"{NODE_LABEL}={self._owner}"}):
                telemetry.logger().info("container.sweep", container=found["Id"][:12], run=found["Labels"].get(RUN_LABEL))
                self._remove(found["Id"])
            # Whoever ended long ago and is still here belonged to a node that is no more.
            for found in self._api.containers(all=True, filters={"label": NODE_LABEL, "status": ["exited", "dead"]}):
                with contextlib.suppress(docker.errors.NotFound):
                    ended = self._api.inspect_container(found["Id"])["State"]["FinishedAt"]
                    if time.time() - datetime.fromisoformat(ended[:19] + "+00:00").timestamp() > _FORGOTTEN:
                        self._remove(found["Id"])
            for network in self._api.networks(filters={"label": GANG_LABEL}):
                made = datetime.fromisoformat(network["Created"][:19] + "+00:00").timestamp()
                if time.time() - made > _FORGOTTEN:
                    self._leave_gang(network["Labels"][GANG_LABEL])

        await self._do(work)

    async def close(self) -> None:
        """Nothing: the daemon removes the containers."""


class ContainerTree:
    """One running container."""

    def __init__(
        self, runtime: DockerRuntime, container: str, folder: Path, readers: dict[str, int], ends: list[int], gang: str
    ) -> None:  # fmt: skip
        self._runtime, self._container, self._folder, self._ends, self._gang = runtime, container, folder, ends, gang
        self.stdout, self.stderr = readers["stdout"], readers["stderr"]
        self._killing: asyncio.Future[None] | None = None
        self._first_kill = 0.0
        self._last: tuple[float, float] | None = None

    async def wait(self) -> Outcome:
        """Until the container has ended; then it is removed."""
        try:
            state = await self._runtime._do(self._wait)
        finally:
            for end in self._ends:  # now the readers come to their end
                os.close(end)
            await self._runtime._do(lambda: self._runtime._remove(self._container))
            if self._gang:
                await self._runtime._do(lambda: self._runtime._leave_gang(self._gang))
        report: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError):  # the shim was killed, or could not begin
            for line in (self._folder / "report.json").read_text().splitlines():
                report |= json.loads(line)
        killed = bool(state.get("OOMKilled"))
        if not report.keys() & {"exit_code", "signal"} and killed:
            return Outcome(signal=9, out_of_memory=True)
        code = report.get("exit_code")
        return Outcome(code, report.get("signal"), killed and code != 0, str(report.get("problem", "")))

    def _wait(self) -> dict[str, Any]:
        api, pause = self._runtime._api, 0.1
        while True:
            try:
                api.wait(self._container, timeout=3600)
                return dict(api.inspect_container(self._container)["State"])
            except docker.errors.NotFound:
                return {}  # somebody removed it
            except _REFUSED as error:  # an hour is over, or the daemon is away: containers may outlive it
                telemetry.logger().info("container.wait", container=self._container[:12], error=str(error))
                time.sleep(pause)
                pause = min(pause * 2, 5.0)

    def _signal(self, name: str) -> asyncio.Future[None]:
        def work() -> None:
            with contextlib.suppress(*_REFUSED):  # it ended by itself; or the daemon is away, and it is asked again
                self._runtime._api.kill(self._container, name)

        return asyncio.get_running_loop().run_in_executor(self._runtime._pool, work)

    def terminate(self) -> None:
        """SIGTERM to the shim, which asks the main process, once."""
        self._signal("SIGTERM")

    def kill(self) -> None:
        """SIGKILL to all but the shim, which reports how the script ended; after three seconds to the shim as well."""
        now = time.monotonic()
        self._first_kill = self._first_kill or now
        if self._killing is None or self._killing.done():
            self._killing = self._signal("SIGUSR2" if now - self._first_kill < _INSIST else "SIGKILL")

    def usage(self) -> Usage:
        """From the daemon's statistics."""
        try:
            stats = self._runtime._api.stats(self._container, stream=False, one_shot=True)
        except _REFUSED:
            return Usage()
        now, spent = time.monotonic(), stats["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9
        memory = stats.get("memory_stats") or {}
        cache = (memory.get("stats") or {}).get("total_inactive_file", (memory.get("stats") or {}).get("inactive_file", 0))
        usage = Usage(memory_bytes=max(memory.get("usage", 0) - cache, 0))
        if self._last is not None and now > self._last[0]:
            usage.cpu_percent = max(spent - self._last[1], 0.0) / (now - self._last[0]) * 100
        self._last = (now, spent)
        return usage


def _reachable(proxies: Mapping[str, str]) -> dict[str, str]:
    """Without those that listen on this machine's loopback: in a container that is another."""
    lost = {
        name
        for name, value in proxies.items()
        if not name.lower().startswith("no_") and host_of(value) in ("localhost", "127.0.0.1", "::1")
    }
    return {name: value for name, value in proxies.items() if name not in lost}


def shm_bytes(resources: c.Resources, node_memory: int) -> int:
    """How large a run's /dev/shm may grow: what it asked for, else its memory, and at least 2 GiB; never beyond the node's memory.

    `node_memory`: bytes that the node gives to runs; 0: all that the machine has. Without a limit of its own a run has half
    of that, as on a machine of its own (tmpfs(5)).
    """
    whole = node_memory or psutil.virtual_memory().total
    return resources.shm_bytes or min(max(resources.memory_bytes or whole // 2, _LEAST_SHM), whole)


def gang_network(gang: str) -> str:
    """The name of the network that a run on several nodes has to itself."""
    return f"alveary-gang-{gang.lower()}"


def _give(folders: Sequence[Path], uid: int, gid: int) -> None:
    """Let the container's user own its folders; links are given themselves, never what they point at."""
    for folder in folders:
        os.lchown(folder, uid, gid)
        for root, names, files in os.walk(folder):
            for name in (*names, *files):
                os.lchown(os.path.join(root, name), uid, gid)


async def _report(progress: ProgressCallback, text: str) -> None:
    await progress(text)
