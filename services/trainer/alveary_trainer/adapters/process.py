"""The process runtime: launching through the shim, signalling and measuring a process tree."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.runtime import Host, Limits, Outcome, Place, Say, Staged, StagingFailed, Usage, View

_SHIM = Path(__file__).with_name("shim.py")
# What a training process inherits of the trainer's environment; everything else is the run's own.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LD_LIBRARY_PATH")  # fmt: skip


class ProcessRuntime:
    """Processes of this machine, in virtual environments."""

    kind = "process"

    def __init__(self, environments: Environments, address: str = "127.0.0.1") -> None:
        """`address`: by which other nodes reach this one."""
        self._environments, self._address = environments, address

    @asynccontextmanager
    async def stage(self, workspace: str, digest: str, environment: c.Environment, say: Say) -> AsyncIterator[Staged]:
        """See Runtime."""
        async with self._environments.use(workspace, digest, environment.interpreter, environment.user_managed, say) as python:
            yield Staged(str(python))

    def view(self, place: Place, staged: Staged) -> View:
        """The node's own paths."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        inherited["PATH"] = f"{Path(staged.python).parent}:{inherited.get('PATH', '/usr/bin:/bin')}"
        inputs = {name: str(path) for name, path in place.inputs.items()}
        return View(str(place.work), str(place.tmp), str(place.socket), str(place.lib), inputs, inherited)

    def host_path(self, place: Place, path: str) -> Path:
        """The path itself; a relative one begins in the working directory."""
        return place.work / path

    def readable_below(self, place: Place) -> Path:
        """Anything: the processes run as the trainer's own user, so nothing is theirs to steal."""
        return Path("/")

    def command(self, first: str, staged: Staged) -> str:
        """See Runtime."""
        found = shutil.which(first, path=f"{Path(staged.python).parent}:{os.environ.get('PATH', '')}")
        if found is None:
            raise StagingFailed(f"command {first!r} is neither in the environment nor on this node")
        return found

    async def host(self, gang: str, index: int, network: str) -> Host:
        """See Runtime. The processes share the network of their node."""
        interface, subnet = interface_of(self._address)
        # A loopback address is good for the nodes of one machine.
        realm = Path("/proc/sys/kernel/random/boot_id").read_text().strip() if self._address.startswith("127.") else ""
        with socket.socket() as probe:
            try:
                probe.bind((self._address, 0))
            except OSError as error:
                raise StagingFailed(f"this node has no address {self._address}: set ALVEARY_ADDRESS ({error})") from error
            return Host(self._address, realm, probe.getsockname()[1], interface, subnet)

    async def launch(self, place: Place, staged: Staged, argv: Sequence[str], env: Mapping[str, str], limits: Limits) -> ProcessTree:
        """See Runtime."""
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(str(g) for g in limits.gpus)}
        return ProcessTree.launch(argv, place.work, dict(env) | gpus)

    async def sweep(self) -> None:
        """Nothing: what a dead trainer started died with it."""


class ProcessTree:
    """One launched process and all that descends from it."""

    def __init__(self, shim: subprocess.Popen[bytes], stdout: int, stderr: int, status: int) -> None:
        self._shim, self.stdout, self.stderr, self._status = shim, stdout, stderr, status
        self._cpu: dict[int, psutil.Process] = {}
        self._oom_before = oom_kills()

    @classmethod
    def launch(cls, argv: Sequence[str], cwd: Path, env: dict[str, str]) -> ProcessTree:
        """Start `argv` under a shim. The caller reads `stdout` and `stderr`, which are non-blocking."""
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        status_read, status_write = os.pipe()
        try:
            shim = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SHIM), str(status_write)], stdin=subprocess.PIPE, stdout=out_write,
                stderr=err_write, pass_fds=[status_write], env={"PATH": "/usr/bin:/bin"}, start_new_session=True,
            )  # fmt: skip
        finally:
            for fd in (out_write, err_write, status_write):
                os.close(fd)
        assert shim.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: wait() will say so
            shim.stdin.write(json.dumps({"argv": list(argv), "cwd": str(cwd), "env": env}).encode() + b"\n")
            shim.stdin.close()
        os.set_blocking(out_read, False)
        os.set_blocking(err_read, False)
        return cls(shim, out_read, err_read, status_read)

    async def wait(self) -> Outcome:
        """Until the process has ended and nothing of its tree is left."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._status, "rb"))
        report: dict[str, int] = {}
        try:
            while line := await reader.readline():
                report |= json.loads(line)
        finally:
            transport.close()
        await asyncio.to_thread(self._shim.wait)
        self.kill()  # if the shim itself was killed, its orphans are the trainer's children now
        return Outcome(report.get("exit_code"), report.get("signal"), oom_kills() > self._oom_before)

    def _tree(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._shim.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        """SIGTERM to every process of the tree."""
        with contextlib.suppress(ProcessLookupError):
            self._shim.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process of the tree; the shim reports and goes."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def usage(self) -> Usage:
        """CPU since the last call and resident memory now."""
        usage = Usage()
        alive: dict[int, psutil.Process] = {}
        for process in self._tree():
            known = self._cpu.get(process.pid, process)
            with contextlib.suppress(psutil.Error):  # it ended while it was measured
                usage.cpu_percent += known.cpu_percent(None)
                usage.memory_bytes += known.memory_info().rss
                alive[process.pid] = known
        self._cpu = alive
        usage.pids = tuple(alive)
        return usage


def address_towards(url: str) -> str:
    """The address of this machine that connections to a server leave from.

    Raises:
        OSError: there is no way to it.
    """
    parts = urlsplit(url if "//" in url else f"//{url}")
    family, kind, protocol, _, where = socket.getaddrinfo(parts.hostname or "127.0.0.1", parts.port or 4222, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> tuple[str, str]:
    """Name and subnet (CIDR) of the interface that has an address; empty: none has."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.address.partition("%")[0] == address and one.netmask:
                return name, str(ipaddress.ip_network(f"{address}/{one.netmask}", strict=False)) if one.family == socket.AF_INET else ""
    return "", ""


def become_subreaper() -> None:
    """Let orphans of killed shims come to this process."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since boot (/proc/vmstat oom_kill)."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0
