"""What goes wrong in a chaos trial: processes killed and stopped, links cut and slowed, the disk filled."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from support import launch
from tcp_proxy import Proxy

from alveary.local.stack import trainers

LEASE_SECONDS = 6.0


class Platform:
    """The platform under trial: an embedded stack, and one node behind links of its own."""

    def __init__(self, state_dir: Path, disk: Path | None) -> None:
        """`disk`: mount point of the file system that `state_dir` is on, where it may be filled."""
        self.state_dir, self.disk = state_dir, disk
        self.stack = launch(state_dir, separate=True, lease=LEASE_SECONDS)
        self.links: dict[str, Proxy] = {}
        self.far: subprocess.Popen[bytes] | None = None
        self._far_environment: dict[str, str] = {}
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._lock = threading.Lock()

    def add_far_node(self, target: str, folder: Path) -> None:
        """Start a trainer that reaches the message bus and the object store over links that can be cut."""
        like = trainers(self.state_dir)[0].environ()
        self.links["far-bus"] = Proxy(int(like["ALVEARY_NATS_URL"].rpartition(":")[2]))
        self.links["far-store"] = Proxy(int(like["ALVEARY_S3_ENDPOINT"].rpartition(":")[2]))
        self._far_environment = like | {
            "ALVEARY_TARGET": target, "ALVEARY_NODE": f"{target}-0", "ALVEARY_STATE_DIR": str(folder), "ALVEARY_NODE_CPUS": "2",
            "ALVEARY_NATS_URL": f"nats://127.0.0.1:{self.links['far-bus'].port}",
            "ALVEARY_S3_ENDPOINT": f"127.0.0.1:{self.links['far-store'].port}",
        }  # fmt: skip
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        """What a machine's own supervisor does: start what died again."""
        while not self._stopping.is_set():
            with self._lock:
                if self.far is None or self.far.poll() is not None:
                    log = (self.state_dir.parent.parent / "far.log").open("ab")
                    with log:
                        self.far = subprocess.Popen(
                            [sys.executable, "-m", "alveary_trainer"], env=self._far_environment, stdin=subprocess.DEVNULL,
                            stdout=log, stderr=log, start_new_session=True,
                        )  # fmt: skip
                if self.stack.process.poll() is not None:
                    # It says why it cannot start, on a full disk for example, and is started again.
                    with suppress(AssertionError, OSError):
                        self.stack = launch(self.state_dir, port=None, separate=True, lease=LEASE_SECONDS)
            self._stopping.wait(0.5)

    def processes(self) -> dict[str, int]:
        """Names and pids of what may be killed or stopped; empty while the stack is being started again."""
        found: dict[str, int] = {}
        with suppress(AssertionError, ValueError, FileNotFoundError):
            found = {name: pid for name, pid in self.stack.pids().items() if name != "relay"}
        found |= {f"trainer-{i}": p.pid for i, p in enumerate(trainers(self.state_dir))}
        if self.far is not None and self.far.poll() is None:
            found["trainer-far"] = self.far.pid
        return found

    def close(self) -> None:
        """Stop everything; returns when all of it is gone."""
        self._stopping.set()
        if self._keeper:
            self._keeper.join(120)
        if self.far is not None:
            self.far.terminate()
            self.far.wait(60)
        self.stack.process.terminate()
        self.stack.process.wait(90)
        for link in self.links.values():
            link.close()


class Faults:
    """Makes one fault at a time, at random; each is undone by itself some seconds later."""

    def __init__(self, platform: Platform, chance: random.Random, say: Callable[[str], None], without: Sequence[str] = ()) -> None:
        self._platform, self._chance, self._say, self._without = platform, chance, say, without
        self.count = 0
        self.kinds: dict[str, int] = {}
        # When the disk was full: (from, to) in seconds since 1970.
        self.full: list[tuple[float, float]] = []
        self._undoing: list[threading.Timer] = []
        self._stopped: dict[int, float] = {}

    def one(self) -> None:
        """Make a fault."""
        kinds: list[tuple[Callable[[], str | None], int]] = [(self._kill, 10), (self._stop, 6), (self._cut, 4), (self._slow, 3)]
        if self._platform.disk is not None:
            kinds.append((self._fill, 2))
        kinds.append((self._kill_all, 1))
        kinds = [(k, w) for k, w in kinds if k.__name__.strip("_") not in self._without]
        fault = self._chance.choices([k for k, _ in kinds], [w for _, w in kinds])[0]
        what = fault()
        if what is None:
            return
        self.count += 1
        name = fault.__name__.strip("_")
        self.kinds[name] = self.kinds.get(name, 0) + 1
        self._say(f"fault {self.count}: {what}")

    def undo(self) -> None:
        """End whatever still lasts."""
        for timer in self._undoing:
            timer.join(30)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, work)
        timer.start()
        self._undoing = [t for t in self._undoing if t.is_alive()] + [timer]

    def _pick(self) -> tuple[str, int] | None:
        there = sorted(self._platform.processes().items())
        return self._chance.choice(there) if there else None

    def _kill(self) -> str | None:
        picked = self._pick()
        if picked is None:
            return None
        with suppress(ProcessLookupError):
            os.kill(picked[1], signal.SIGKILL)
        return f"kill -9 {picked[0]}"

    def _kill_all(self) -> str | None:
        if self._platform.stack.process.poll() is not None:
            return None
        self._platform.stack.process.kill()
        return "kill -9 the supervisor, and with it all but the trainers"

    def _stop(self) -> str | None:
        picked = self._pick()
        if picked is None or (picked[1] in self._stopped and time.monotonic() < self._stopped[picked[1]]):
            return None
        name, pid = picked
        seconds = self._chance.uniform(1, 8)
        try:
            process = psutil.Process(pid)
            process.send_signal(signal.SIGSTOP)
        except psutil.NoSuchProcess:
            return None
        self._stopped[pid] = time.monotonic() + seconds

        def go_on() -> None:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

        self._later(seconds, go_on)
        return f"stop {name} for {seconds:.1f} s"

    def _cut(self) -> str | None:
        name, link = self._chance.choice(sorted(self._platform.links.items()))
        seconds = self._chance.uniform(0, 6)
        link.down = True
        link.cut()

        def repair() -> None:
            link.down = False

        self._later(seconds, repair)
        return f"cut link {name} for {seconds:.1f} s"

    def _slow(self) -> str | None:
        name, link = self._chance.choice(sorted(self._platform.links.items()))
        seconds, link.delay = self._chance.uniform(1, 8), self._chance.uniform(0.05, 0.5)

        def repair() -> None:
            link.delay = 0.0

        self._later(seconds, repair)
        return f"slow link {name} by {link.delay:.2f} s for {seconds:.1f} s"

    def _fill(self) -> str | None:
        disk = self._platform.disk
        assert disk is not None
        ballast = disk / "ballast"
        if ballast.exists():
            return None
        seconds, begun = self._chance.uniform(1, 6), time.time()
        left = self._chance.randrange(2 << 20)
        size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left
        with ballast.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))

        def free() -> None:
            ballast.unlink()
            self.full.append((begun, time.time()))

        self._later(seconds, free)
        return f"fill the disk but for {left >> 10} KiB for {seconds:.1f} s"
