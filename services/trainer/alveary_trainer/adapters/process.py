"""The process runtime: launching through the shim, signalling and measuring a process tree."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import psutil

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import new_id
from alveary_contracts.proxies import for_runs
from alveary_core import telemetry
from alveary_trainer.adapters import alveary_exec
from alveary_trainer.adapters.cgroups import Group, Groups
from alveary_trainer.adapters.environments import Environments
from alveary_trainer.adapters.memory import used_bytes
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
from alveary_trainer.hints import shared_memory_here
from alveary_trainer.short_paths import ShortLinks

_SHIM = Path(__file__).with_name("shim.py")
# What a training process inherits of the trainer's environment; everything else is the run's own.
_INHERITED = ("PATH", "HOME", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LD_LIBRARY_PATH")  # fmt: skip

# How long after a launch the next shim is started.
_SPARE_DELAY_SECONDS = 0.3
# How long killed processes may take to be gone, and a shim to report them, seconds.
_REST_SECONDS, _INSIST_SECONDS = 10.0, 30.0
_NO_GROUPS = "the control groups of this node cannot be used any more"
_NO_PROCESS = "this node cannot start a process"
# Too many processes, too little memory, too many open files: whatever was tried.
_SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class ProcessRuntime:
    """Processes of this machine, in virtual environments."""

    kind = "process"

    def __init__(self, environments: Environments, groups: Groups, links: ShortLinks, address: str = "127.0.0.1") -> None:
        """`address`: by which other nodes reach this one."""
        self._environments, self._groups, self._links, self._address = environments, groups, links, address
        # A shim that waits for the next attempt.
        self._spare: ProcessTree | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._replenishing: asyncio.TimerHandle | None = None
        self._closed = False

    @asynccontextmanager
    async def stage(self, workspace: str, digest: str, environment: c.Environment, progress: ProgressCallback) -> AsyncIterator[Staged]:
        """See Runtime."""
        async with self._environments.use(workspace, digest, environment.interpreter, environment.user_managed, progress) as python:
            yield Staged(str(python))

    def view(self, paths: AttemptPaths, staged: Staged) -> View:
        """The node's own paths; the temporary folder has a short name, see short_paths.py."""
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ} | locale_of(os.environ) | for_runs(os.environ)
        inherited["PATH"] = f"{Path(staged.python).parent}:{inherited.get('PATH', '/usr/bin:/bin')}"
        inputs = {name: str(path) for name, path in paths.inputs.items()}
        return View(str(paths.work), str(self._links.make(paths.tmp)), str(paths.socket), str(paths.lib), inputs, inherited)

    def shared_memory(self, resources: c.Resources) -> str:
        """See Runtime."""
        return shared_memory_here()

    def leave(self, paths: AttemptPaths) -> None:
        """See Runtime."""
        self._links.remove(paths.tmp)

    def host_path(self, paths: AttemptPaths, path: str) -> Path:
        """The path itself; a relative one begins in the working directory."""
        return paths.work / path

    def readable_below(self, paths: AttemptPaths) -> Path:
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
        network_scope = Path("/proc/sys/kernel/random/boot_id").read_text().strip() if is_loopback(self._address) else ""
        with socket.socket(socket.AF_INET6 if ":" in self._address else socket.AF_INET) as probe:
            try:
                probe.bind((self._address, 0))
            except OSError as error:
                raise StagingFailed(f"this node has no address {self._address}: set ALVEARY_ADDRESS ({error})") from error
            return Host(self._address, network_scope, probe.getsockname()[1], interface, subnet)

    async def launch(self, paths: AttemptPaths, staged: Staged, argv: Sequence[str], env: Mapping[str, str], limits: Limits) -> ProcessTree:
        """See Runtime."""
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(str(g) for g in limits.gpus)}
        tree = await self._take_spare() or await self._prepare(paths.name)
        try:
            with _explained(_NO_GROUPS):
                await asyncio.to_thread(tree.group.limit_memory, limits.resources.memory_bytes)
            with _explained(_NO_PROCESS):
                tree.start(argv, paths.work, dict(env) | gpus)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(tree.discard))
            raise
        # Later: it would take CPU time from the program that starts.
        self._replenishing = asyncio.get_running_loop().call_later(_SPARE_DELAY_SECONDS, self._replenish)
        return tree

    async def _take_spare(self) -> ProcessTree | None:
        """The shim that is kept ready; None: there is none, or it was killed."""
        spare, self._spare = self._spare, None
        if spare is None or spare.is_ready():
            return spare
        await asyncio.to_thread(spare.discard)
        return None

    async def _prepare(self, name: str) -> ProcessTree:
        """A shim that waits, in groups of its own.

        Raises:
            StagingFailed: it cannot be had; nothing of it is left.
        """
        making = asyncio.ensure_future(asyncio.to_thread(self._groups.make, name, 0, MOST_PROCESSES))
        with _explained(_NO_GROUPS):
            try:
                group = await asyncio.shield(making)
            except asyncio.CancelledError:  # the thread goes on
                with contextlib.suppress(OSError):
                    await asyncio.to_thread((await making).remove)
                raise
        try:
            with _explained(_NO_PROCESS):
                # On this thread: the kernel tells the shim of the end of the thread that started it.
                return ProcessTree.prepare(group, self._links)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(group.remove))
            raise

    def _replenish(self) -> None:
        """Have a shim ready for the next attempt: starting one, and entering control groups, takes longer than the rest of a launch."""
        if self._closed or self._spare is not None or (self._preparing is not None and not self._preparing.done()):
            return
        self._preparing = asyncio.create_task(self._prepare_spare(), name="processes.spare")

    async def _prepare_spare(self) -> None:
        try:
            made = await self._prepare(f"spare-{new_id()}")
        except StagingFailed as error:  # the next launch says so, where it is needed
            telemetry.logger().warning("processes.spare", error=str(error))
            return
        if self._closed or self._spare is not None:
            await asyncio.to_thread(made.discard)
        else:
            self._spare = made

    async def sweep(self) -> None:
        """End what an earlier life of this node left: what killed its shim and outlived the trainer too."""
        await asyncio.to_thread(self._groups.sweep)
        await asyncio.to_thread(end_strays, self._links.runs_dir)
        self._links.sweep()
        self._replenish()

    async def close(self) -> None:
        """The node is no more."""
        self._closed = True
        if self._replenishing is not None:
            self._replenishing.cancel()
        if self._preparing is not None:  # it discards what it makes
            await asyncio.wait({self._preparing})
        if self._spare is not None:
            await asyncio.to_thread(self._spare.discard)
            self._spare = None
        await asyncio.to_thread(self._groups.close)


@contextlib.contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Turn an error of the operating system into a failure to stage: `problem`, unless the node is merely short of something.

    Raises:
        StagingFailed: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise StagingFailed(f"{_NO_PROCESS if error.errno in _SHORTAGES else problem}: {error}") from error


class ProcessTree:
    """One launched process and all that descends from it."""

    # Those that this process started and that have not ended; whatever else is its child was an orphan.
    _shims: ClassVar[set[int]] = set()
    _starting: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self, shim: subprocess.Popen[bytes], stdout: int, stderr: int, status: int, program: int, go: int, group: Group,
        links: ShortLinks | None,
    ) -> None:  # fmt: skip
        self._shim, self.stdout, self.stderr, self._status = shim, stdout, stderr, status
        self._program, self._go = program, go
        self._group, self._links = group, links
        self._cpu: dict[int, psutil.Process] = {}
        self._spent: tuple[float, float] | None = None
        self._oom_before = 0
        self._first_kill = 0.0

    @classmethod
    def launch(
        cls, argv: Sequence[str], cwd: Path, env: Mapping[str, str], group: Group | None = None, links: ShortLinks | None = None
    ) -> ProcessTree:
        """Start `argv` under a shim. The caller reads `stdout` and `stderr`, which are non-blocking."""
        tree = cls.prepare(group, links)
        tree.start(argv, cwd, env)
        return tree

    @classmethod
    def prepare(cls, group: Group | None = None, links: ShortLinks | None = None) -> ProcessTree:
        """A shim whose child, in its control groups, waits for `start`, or for `discard`.

        Raises:
            OSError: there are no more processes, or no memory.
        """
        group = group or Group()
        # A shim that its script stopped cannot hear of the trainer's end: the next trainer finds it by this, see end_strays.
        marked = {"PATH": "/usr/bin:/bin", "ALVEARY_WORK_DIR": f"{links.runs_dir}/shim" if links else ""}
        with contextlib.ExitStack() as own, contextlib.ExitStack() as passed:
            # A file: a pipe would block here until the shim reads it, where the environment is large.
            order, program = _memory_file("alveary-order", passed), _memory_file("alveary-program", own)
            out_read, out_write = _pipe(own, passed)
            err_read, err_write = _pipe(own, passed)
            status_read, status_write = _pipe(own, passed)
            go_read, go_write = _pipe(passed, own)
            os.set_blocking(out_read, False)
            os.set_blocking(err_read, False)
            _write_json(order, {"group": group.order, "trainer": os.getpid()})
            inherited = [status_write, order, program, go_read]
            with cls._starting:
                shim = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_SHIM), *map(str, inherited)], stdin=subprocess.DEVNULL, stdout=out_write,
                    stderr=err_write, pass_fds=inherited, env=marked, start_new_session=True,
                )  # fmt: skip
                cls._shims.add(shim.pid)
            own.pop_all()
        return cls(shim, out_read, err_read, status_read, program, go_write, group, links)

    @property
    def group(self) -> Group:
        """Its control groups."""
        return self._group

    def is_ready(self) -> bool:
        """Whether the shim lives, as far as is known, and `start` can be called."""
        return self._go >= 0 and self._shim.poll() is None

    def start(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        """Let the child become the program. Where shim or child were killed meanwhile, `wait` reports an end without an exit code."""
        self._oom_before = oom_kills()
        _write_json(self._program, {"argv": list(argv), "cwd": str(cwd), "env": dict(env)})
        program, self._program = self._program, -1
        os.close(program)
        go, self._go = self._go, -1
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it: both are dead
            os.write(go, b"1")
        os.close(go)
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        """Another script may have stopped the shim or its child while they waited, and a stopped one never reads its order."""
        self._shim.send_signal(signal.SIGCONT)
        for pid in children_of(self._shim.pid):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(pid, signal.SIGCONT)

    def discard(self) -> None:
        """End a shim whose program nobody waits for."""
        for fd in (self._go, self._program, self.stdout, self.stderr, self._status):
            if fd >= 0:  # `start` closes some
                os.close(fd)
        self._go = self._program = self.stdout = self.stderr = self._status = -1
        self._shim.kill()
        self._shim.wait()
        self._end_rest()

    async def wait(self) -> Outcome:
        """Until the process has ended and nothing of its tree is left."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._status, "rb"))
        report: dict[str, Any] = {}
        try:
            while line := await reader.readline():
                report |= json.loads(line)
        finally:
            transport.close()
        await asyncio.to_thread(self._shim.wait)
        ooms = self._group.oom_kills()
        left = await asyncio.to_thread(self._end_rest)
        code, number = report.get("exit_code"), report.get("signal")
        if ooms is None:  # the whole machine's: it may have been another's
            out_of_memory = number == signal.SIGKILL and oom_kills() > self._oom_before
        else:
            out_of_memory = ooms > 0 and code != 0
        return Outcome(code, number, out_of_memory, str(report.get("problem", "")), tuple(left))

    def _end_rest(self) -> list[int]:
        """Kill what the shim did not, because it was killed itself; returns what would not die in time."""
        with self._starting:
            self._shims.discard(self._shim.pid)
        deadline = time.monotonic() + _REST_SECONDS
        self._group.kill()
        while True:
            left = sorted({*(self._group.pids() or ()), *end_orphans(self._shims, self._starting)})
            if not left or time.monotonic() > deadline:
                break
            self._group.kill()
            time.sleep(0.005)
        self._group.remove()
        return left

    def terminate(self) -> None:
        """Ask the main process to end: SIGTERM, which the shim sends once."""
        with contextlib.suppress(ProcessLookupError):
            self._shim.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to every process of the tree; the shim reports and goes, or is killed too once it had the time."""
        now = time.monotonic()
        self._first_kill = self._first_kill or now
        self._group.kill()
        with contextlib.suppress(ProcessLookupError):
            self._shim.send_signal(signal.SIGUSR2)
            self._shim.send_signal(signal.SIGCONT)
            if now - self._first_kill > _INSIST_SECONDS:
                self._shim.kill()

    def usage(self) -> Usage:
        """CPU since the last call and memory now: of the control group where there is one, else of every process of the tree."""
        if self._links is not None:
            self._links.touch()
        self._wake_shim()
        usage = Usage(oom_kills=self._group.oom_kills() or 0)
        known = self._group.pids()
        try:
            tree = psutil.Process(self._shim.pid).children(recursive=True) if known is None else []
        except psutil.NoSuchProcess:
            tree = []
        usage.pids = tuple(p.pid for p in tree) if known is None else tuple(known)
        if len(usage.pids) > MOST_PROCESSES:  # nothing but this counts them where there is no control group
            usage.excess = f"it had {len(usage.pids)} processes, and one run may have {MOST_PROCESSES}"
        memory, spent = self._group.memory_bytes(), self._group.cpu_seconds()
        usage.memory_bytes = memory if memory is not None else sum(_unless_gone(used_bytes, pid) for pid in usage.pids)
        if spent is not None:
            now = time.monotonic()
            if self._spent is not None and now > self._spent[0]:
                usage.cpu_percent = max(spent - self._spent[1], 0.0) / (now - self._spent[0]) * 100
            self._spent = (now, spent)
            return usage
        alive: dict[int, psutil.Process] = {}
        for pid in usage.pids:
            with contextlib.suppress(psutil.Error):  # it ended while it was measured
                process = self._cpu.get(pid) or psutil.Process(pid)
                usage.cpu_percent += process.cpu_percent(None)
                alive[pid] = process
        self._cpu = alive
        return usage

    def _wake_shim(self) -> None:
        """A script may stop what it finds; without its shim nobody would learn of its end."""
        with contextlib.suppress(OSError, IndexError):  # it has ended
            if Path(f"/proc/{self._shim.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                self._shim.send_signal(signal.SIGCONT)


def children_of(pid: int) -> list[int]:
    """Children of a process that has one thread; where the kernel keeps no list of them (CONFIG_PROC_CHILDREN), found among all processes."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return alveary_exec.parents().get(pid, []) if Path(f"/proc/{pid}").exists() else []


def _memory_file(name: str, closing: contextlib.ExitStack) -> int:
    """A file in memory, which `closing` closes."""
    descriptor = os.memfd_create(name)
    closing.callback(os.close, descriptor)
    return descriptor


def _pipe(reading: contextlib.ExitStack, writing: contextlib.ExitStack) -> tuple[int, int]:
    """Both ends of a pipe, each closed by its stack."""
    read, write = os.pipe()
    reading.callback(os.close, read)
    writing.callback(os.close, write)
    return read, write


def _write_json(file: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], written)


def _unless_gone(measure: Callable[[int], int], pid: int) -> int:
    try:
        return measure(pid)
    except OSError:
        return 0


def end_orphans(shims: Collection[int], starting: threading.Lock) -> list[int]:
    """Kill and collect the children of this process that it did not start itself; returns those that it found.

    Only when it finds none is there none: who reads /proc while processes end misses the children of what ended just then,
    which come to this process a moment later.

    They come to it, a child subreaper, when their shim is killed. They are known by their session: what the trainer starts
    beside shims stays in its own, and a process cannot enter the session of another.
    """
    me, session, found = os.getpid(), os.getsid(0), []
    with starting:
        for pid in alveary_exec.parents().get(me, []):
            if pid in shims:
                continue
            try:
                if os.getsid(pid) == session:
                    continue
                for one in (*alveary_exec.descendants(pid), pid):
                    os.kill(one, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended meanwhile: it is collected all the same
            found.append(pid)
            with contextlib.suppress(ChildProcessError):  # it was no child of this process any more
                os.waitpid(pid, os.WNOHANG)
    return found


def end_strays(runs_dir: Path) -> int:
    """Kill processes of this user whose working directory is a run's below `runs_dir`; returns how many.

    They outlived both their shim and their trainer, and the variable that every process of a run has tells whose they were.
    """
    mark, killed = f"ALVEARY_WORK_DIR={runs_dir}/".encode(), 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # another user's, or it ended
            if any(one.startswith(mark) for one in Path(f"/proc/{name}/environ").read_bytes().split(b"\0")):
                os.kill(int(name), signal.SIGKILL)
                killed += 1
    return killed


def locale_of(environ: Mapping[str, str]) -> dict[str, str]:
    """The locale of runs: the trainer's, if its characters are UTF-8; else C.UTF-8, as what a run prints is read as UTF-8."""
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    effective = next((environ[name] for name in names if environ.get(name)), "")
    if effective.lower().replace("-", "").partition(".")[2].partition("@")[0] == "utf8":
        return {name: environ[name] for name in names if environ.get(name)}
    return {"LANG": "C.UTF-8"}


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


def is_loopback(host: str) -> bool:
    """Whether an address, or a name, is that of the machine that says it, whichever that is."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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
