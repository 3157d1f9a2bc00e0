"""The supervisor behind `alveary up`: starts, watches, restarts and stops the processes of one stack."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import psutil

from alveary.errors import AlvearyError
from alveary.local.layout import SERVICES, Layout, write_private
from alveary.local.replay import positions, slowest
from alveary.local.upkeep import ServerWatch, cut, last_lines
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.proxies import DIRECT
from alveary_contracts.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from alveary_core import disk
from alveary_core.auth import Principal, issue
from alveary_core.settings import CoreSettings

# How long a start may take in which nothing moves: no service answers, and no read model comes further.
READY_SECONDS = 60.0
# How often a process may end before the start is given up.
_DEATHS = 5
_TOLD_SECONDS = 10.0
# How long a server has to end when it is restarted after the disk was full, in seconds. What it acknowledged survives SIGKILL;
# SeaweedFS ends late or never once a write has failed, and the supervisor tends no other process meanwhile.
_SERVER_ENDS_SECONDS = 3.0
_FOR_TRAINERS = ("ALVEARY_REGISTRY", "ALVEARY_ENVIRONMENTS_", "ALVEARY_DATA_", "ALVEARY_DISK_", "ALVEARY_METRIC_")
# Open files of a process.
_FILES = 65_536
_libc = ctypes.CDLL(None)
Say = Callable[[str], None]


def _die_with_parent() -> None:
    _libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = field(default=0.1)
    again: float = 0.0
    deaths: int = 0


class Stack:
    """One embedded stack. `run` returns after SIGTERM, SIGINT or `stop`."""

    def __init__(self, layout: Layout, say: Say = lambda text: None) -> None:
        self.layout, self._say = layout, say
        self._logs = layout.state_dir / "logs"
        self._logs.mkdir(exist_ok=True)
        self._stopping = False
        self._lock: int | None = None
        self.children = self._make_children()
        self._settings = CoreSettings()
        self._watches = {name: ServerWatch(self._logs / f"{name}.log") for name in ("nats", "objects")}
        self._status_due, self._upkeep_at, self._cut_at = False, 0.0, 0.0
        self._trouble = ""

    # ---- what there is --------------------------------------------------------------------------------------------

    def _make_children(self) -> list[Child]:
        layout, inherited = self.layout, dict(os.environ)
        conf = layout.state_dir / "nats-server.conf"
        write_private(conf, layout.nats_config())
        (layout.state_dir / "objects").mkdir(exist_ok=True)
        weed = inherited | {"AWS_ACCESS_KEY_ID": layout.secrets["s3_access"], "AWS_SECRET_ACCESS_KEY": layout.secrets["s3_secret"]}
        children = [
            Child("nats", [_binary("nats-server"), "-c", str(conf)], inherited),
            Child("objects", layout.weed_command(_binary("weed")), weed),
        ]
        trainer = {f"ALVEARY_TRAINER_{k.removeprefix('ALVEARY_')}": v for k, v in self._trainer().items()}
        if layout.separate:
            for name in SERVICES:
                env = inherited | layout.environment(name) | (trainer if name == "scheduler" else {})
                children.append(Child(name, [sys.executable, "-m", f"alveary_{name}"], env))
        else:
            env = inherited | layout.environment("runs") | trainer | {"ALVEARY_LISTEN": layout.endpoint}
            env |= {f"ALVEARY_NATS_PASSWORD_{s.upper()}": layout.secrets[s] for s in SERVICES}
            children.append(Child("control", [sys.executable, "-m", "alveary.local.control"], env))
        if layout.bind:
            command = [
                sys.executable,
                "-m",
                "alveary.local.relay",
                layout.bind,
                *(f"{port}:{inner}" for port, inner in layout.outside.items()),
            ]
            children.append(Child("relay", command, inherited))
        return children

    def _trainer(self) -> dict[str, str]:
        layout = self.layout
        env = layout.environment("trainer")
        token = issue(layout.secrets["tokens"], Principal("node", "default", "writer"))
        env |= {
            "ALVEARY_ENDPOINT": layout.endpoint_of("runs"), "ALVEARY_REGISTRY_ENDPOINT": layout.endpoint_of("registry"),
            "ALVEARY_NODE_TOKEN": token, "ALVEARY_STATE_DIR": str(layout.state_dir / "trainer"), "ALVEARY_LISTEN": "127.0.0.1:0",
            "ALVEARY_RUNTIME": layout.runtime,
        }  # fmt: skip
        # What was said to the stack about registries, images and disks is for the trainers as well.
        env |= {k: v for k, v in os.environ.items() if k.startswith(_FOR_TRAINERS)}
        env |= {"ALVEARY_REGISTRY_ENDPOINT": layout.endpoint_of("registry")}
        del env["ALVEARY_TOKEN_SECRET"]
        return env

    # ---- its life -------------------------------------------------------------------------------------------------

    def acquire(self) -> None:
        """Own the directory.

        Raises:
            AlvearyError: another stack does, or ports are taken.
        """
        self._lock = os.open(self.layout.state_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(self._lock, 64).decode().strip()
            raise AlvearyError(
                f"another stack (pid {owner}) owns {self.layout.state_dir}: stop it with `alveary down`, or choose another --state-dir",
                "ALREADY_EXISTS",
            ) from error
        deadline = time.monotonic() + 5  # servers of a stack that was killed go with it, but not at once
        while taken := self.layout.ports.taken():
            if time.monotonic() > deadline:
                raise AlvearyError(
                    f"these ports are taken: {', '.join(taken)}; choose others with --port, or stop what uses them", "ALREADY_EXISTS"
                )
            time.sleep(0.1)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def start(self) -> None:
        """Start everything and wait until it serves.

        Raises:
            AlvearyError: something does not come up; names its log.
        """
        for child in self.children:
            self._launch(child)
        self._wait_ready()
        token = issue(self.layout.secrets["tokens"], Principal("owner", "default", "owner"))
        write_private(self.layout.state_dir / "config.json", self.layout.client_config(token))
        if self.layout.bind:
            write_private(self.layout.state_dir / "config.outside.json", self.layout.client_config(token, outside=True))
        self._ensure_target(token)

    def _launch(self, child: Child) -> None:
        with (self._logs / f"{child.name}.log").open("ab") as log:
            child.process = subprocess.Popen(
                child.command, env=child.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=_die_with_parent, start_new_session=True,
            )  # fmt: skip
        child.started = time.monotonic()
        self._write_status()

    def _write_status(self) -> None:
        """For `alveary status` and `alveary down`. On a full disk it stays what it was, and is written later."""
        pids = {c.name: c.process.pid for c in self.children if c.process}
        known = {"supervisor": os.getpid(), "pids": pids, "endpoint": self.layout.endpoint, "trouble": self._trouble}
        try:
            write_private(self.layout.state_dir / "status.json", json.dumps(known))
            self._status_due = False
        except OSError as error:
            if not self._status_due:
                self._say(f"status.json could not be written, and will be: {error}")
            self._status_due = True

    def _wait_ready(self) -> None:
        """Until all services answer. There is no limit to it while they come further: a long event log takes a while.

        Raises:
            AlvearyError: nothing has moved for READY_SECONDS, or a process ends again and again.
        """
        services = SERVICES if self.layout.separate else ("runs",)
        moved = told = looked = time.monotonic()
        known, reads = dict[str, int](), 0
        for service in services:
            with grpc.insecure_channel(
                self.layout.endpoint_of(service),
                options=[("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200), *DIRECT],
            ) as channel:
                ready = grpc.channel_ready_future(channel)
                while True:
                    try:
                        ready.result(timeout=0.2)
                        moved = time.monotonic()
                        break
                    except grpc.FutureTimeoutError:
                        self._tend()
                    now = time.monotonic()
                    if now - looked > 2.0:
                        looked, found = now, positions(self.layout.state_dir / "services")
                        if (found, self._server_reads()) != (known, reads):
                            moved, known, reads = now, found, self._server_reads()
                    if now - told > _TOLD_SECONDS:
                        told = now
                        self._say(f"still starting: {service} does not answer yet; {slowest(known)}")
                    self._give_up(service, now - moved)

    def _server_reads(self) -> int:
        """Bytes that the message bus has read: with a long log it takes a while before it answers."""
        process = next((c.process for c in self.children if c.name == "nats"), None)
        try:
            return int(psutil.Process(process.pid).io_counters().read_chars) if process is not None else 0
        except psutil.Error:
            return 0

    def _give_up(self, service: str, still: float) -> None:
        dying = next((c for c in self.children if c.deaths >= _DEATHS), None)
        if dying is not None:
            raise AlvearyError(
                f"the stack does not come up: {dying.name} ended {dying.deaths} times; its log ({self._logs / dying.name}.log) ends with:\n"
                f"{last_lines(self._logs / f'{dying.name}.log')}", "UNAVAILABLE",
            )  # fmt: skip
        if still > READY_SECONDS:
            raise AlvearyError(
                f"the stack did not come up: {service} has not answered, and nothing has moved, for {READY_SECONDS:g} s: see {self._logs}",
                "UNAVAILABLE",
            )

    def _ensure_target(self, token: str) -> None:
        spec = ev.ComputeSpec(min_nodes=1, max_nodes=1, idle_seconds_before_scaledown=1800, description="this machine")
        with grpc.insecure_channel(self.layout.endpoint_of("scheduler"), options=DIRECT) as channel:
            stub = scheduler_pb2_grpc.ComputeServiceStub(channel)
            metadata = (("authorization", f"Bearer {token}"),)
            deadline = time.monotonic() + READY_SECONDS
            while True:
                try:
                    stub.CreateTarget(scheduler_pb2.CreateTargetRequest(name="local", spec=spec), metadata=metadata, timeout=30)
                    return
                except grpc.RpcError as error:
                    code, details = error.code(), error.details()
                    # Another machine size than when it was made: what is there is kept.
                    if code == grpc.StatusCode.ALREADY_EXISTS:
                        return
                    if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) or time.monotonic() > deadline:
                        raise AlvearyError(f"the target 'local' cannot be made: {details}", "UNAVAILABLE") from error
                self._tend()
                time.sleep(0.2)

    def _tend(self) -> None:
        """Start again what died, later and later while it keeps dying, and look after disk and logs.

        Nothing that fails here ends the supervisor, for everything else would end with it.
        """
        now = time.monotonic()
        for child in self.children:
            if child.process is not None and child.process.poll() is None:
                continue
            if not child.again:
                child.deaths = 1 if now - child.started > 30 else child.deaths + 1
                child.pause = 0.1 if now - child.started > 30 else min(child.pause * 2, 10.0)
                child.again = now + child.pause
                how = f"ended with code {child.process.returncode}" if child.process is not None else "is not started"
                self._say(f"{child.name} {how}; starting it again (see {self._logs / child.name}.log)")
            if now >= child.again:
                child.again = 0.0
                try:
                    self._launch(child)
                except OSError as error:  # no memory, no more processes, no space
                    child.pause = min(child.pause * 2, 10.0)
                    child.again = now + child.pause
                    self._say(f"{child.name} could not be started, and will be in {child.pause:.1f} s: {error}")
        if now >= self._upkeep_at:
            self._upkeep_at = now + 0.5
            self._upkeep(now)

    def _upkeep(self, now: float) -> None:
        try:
            found = disk.look(self.layout.state_dir, self._settings.disk_reserve_bytes, self._settings.disk_reserve_fraction)
            trouble = found.problem
            for child in self.children:
                if (watch := self._watches.get(child.name)) is not None and watch.look(found):
                    self._say(f"{child.name} refused to write while the disk was full, and there is space again: starting it anew")
                    if child.process is not None:
                        _end([child.process], _SERVER_ENDS_SECONDS)
                    self._launch(child)
                    watch.restarted()
            if now >= self._cut_at:
                self._cut_at = now + 30
                for log in (
                    self.layout.state_dir / "up.log",
                    *self._logs.glob("*.log"),
                    *(self.layout.state_dir / "services/nodes").glob("*.log"),
                ):
                    cut(log)
        except OSError as error:
            trouble = f"the state directory cannot be looked after: {error}"
        if trouble != self._trouble:
            self._say(trouble if trouble else "the disk has space again")
            self._trouble, self._status_due = trouble, True
        if self._status_due:
            self._write_status()

    def run(self) -> None:
        """Watch until a signal says to stop, then stop everything."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, on_signal)
        while not self._stopping:
            self._tend()
            time.sleep(0.1)
        self.stop()

    def stop(self) -> None:
        """Stop services, then trainers, then servers; each has 15 s before SIGKILL."""
        by_name = {c.name: c for c in self.children}
        servers = [by_name.pop("nats"), by_name.pop("objects")]
        # The scheduler first: it would start the trainers again.
        _end([c.process for c in by_name.values() if c.process])
        _end(trainers(self.layout.state_dir))
        _end([c.process for c in servers if c.process])
        (self.layout.state_dir / "status.json").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def usable() -> None:
    """Make this process's limits ones that a stack can live with: all that it starts has them too."""
    # Whatever masks the owner's own bits makes files that the next process cannot open.
    mask = os.umask(0o077)
    os.umask(mask & ~0o700)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextlib.contextmanager
def servers(layout: Layout) -> Iterator[None]:
    """The servers of a stack alone, without its services."""
    stack = Stack(layout)
    stack.children = [child for child in stack.children if child.name in ("nats", "objects")]
    stack.acquire()
    try:
        for child in stack.children:
            stack._launch(child)
        yield
    finally:
        stack.stop()


def trainers(state_dir: Path) -> list[psutil.Process]:
    """Trainer processes of a stack."""
    found = []
    for file in (state_dir / "services" / "nodes").glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, psutil.NoSuchProcess, FileNotFoundError):
            known = json.loads(file.read_text())
            process = psutil.Process(known["pid"])
            if abs(process.create_time() - known["created"]) < 2:
                found.append(process)
    return found


def _end(processes: Sequence[subprocess.Popen[bytes] | psutil.Process], patience: float = 15.0) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        if _has_ended(process, max(deadline - time.monotonic(), 0.1)):
            continue
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.kill()
        _has_ended(process, 5.0)


def _has_ended(process: subprocess.Popen[bytes] | psutil.Process, seconds: float) -> bool:
    """Whether a process has ended, or does within `seconds`.

    What is not our child stays a zombie where its new parent does not reap it, as in a container without an init: it has ended.
    """
    if isinstance(process, subprocess.Popen):
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
    deadline = time.monotonic() + seconds
    while True:
        try:
            if process.status() == psutil.STATUS_ZOMBIE or not process.is_running():
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _binary(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise AlvearyError(f"{name} is not installed: pip install 'alveary[local]'", "FAILED_PRECONDITION")
    return found


def own_addresses() -> list[str]:
    """IPv4 addresses of this machine, without loopback."""
    every = (a for addresses in psutil.net_if_addrs().values() for a in addresses)
    return sorted({a.address for a in every if a.family == socket.AF_INET and not a.address.startswith("127.")})


def status(state_dir: Path) -> dict[str, Any] | None:
    """What a running stack says of itself; None: none runs there."""
    try:
        found: dict[str, Any] = json.loads((state_dir / "status.json").read_text())
        if psutil.Process(found["supervisor"]).status() != psutil.STATUS_ZOMBIE:
            return found
    except (FileNotFoundError, NotADirectoryError, psutil.NoSuchProcess):
        return None
    except (ValueError, KeyError) as error:
        raise AlvearyError(f"{state_dir / 'status.json'} cannot be read ({error!r}): is {state_dir} a stack's directory?") from error
    return None
