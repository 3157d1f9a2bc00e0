"""Event loops that are never blocked: a monitor that runs in production, and a guard for tests.

The monitor measures how late a timer of the loop fires. It exports the longest delay as a metric, and logs the stack of the
loop's thread for each delay above `STALL_SECONDS`.

The guard (ALVEARY_GUARD_LOOP=1, set by the end-to-end tests; for trainers of a stack ALVEARY_TRAINER_GUARD_LOOP=1) is stricter. Calls that can block for an
unbounded time, such as `time.sleep`, connecting a blocking socket or copying a folder, raise BlockingCall on a loop's
thread. A loop that computes for longer than `GUARD_CPU_SECONDS` without a pause (hashing, JSON, compression, SQLite) logs
`loop.blocked`, which tests look for. CPU time decides, not the clock: a machine that is busy with other work fails no test.
"""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from alveary_core import telemetry

# A delay above this is logged with the stack that caused it, and counted.
STALL_SECONDS = 0.1
# The guard complains when the loop's thread has used this much CPU time in one delay.
GUARD_CPU_SECONDS = 0.25
_TICK_SECONDS = 0.05
_WINDOW_SECONDS = 60.0
_VARIABLE = "ALVEARY_GUARD_LOOP"
# Audit events (https://docs.python.org/3/library/audit_events.html) of calls that may take any time.
_BLOCKING = frozenset(
    {
        "time.sleep", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "os.system",
        "shutil.copyfile", "shutil.copytree", "shutil.move", "shutil.rmtree", "shutil.make_archive", "shutil.unpack_archive",
        "glob.glob", "os.walk", "os.fwalk", "urllib.Request", "http.client.connect",
    }
)  # fmt: skip


class BlockingCall(RuntimeError):
    """A call that can block for an unbounded time was made on the thread of a running event loop."""


def guarded() -> bool:
    """Whether this process was told to refuse blocking calls on its loops."""
    return os.environ.get(_VARIABLE, "") == "1"


def watch(loop: asyncio.AbstractEventLoop | None = None) -> Monitor:
    """Start to monitor a loop (default: the running one), and guard all loops of this process if ALVEARY_GUARD_LOOP is 1."""
    if guarded():
        refuse_blocking_calls()
    monitor = Monitor(loop or asyncio.get_running_loop())
    monitor.start()
    return monitor


class Monitor:
    """Measures the delays of one event loop. `start` and `stop` are called on its thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_stall: Callable[[float, float, str], None] | None = None) -> None:
        """`on_stall` is called on the loop after each delay above STALL_SECONDS, with its length and the CPU time that the
        loop's thread used in it, both in seconds, and the stack; by default it is logged."""
        self._loop = loop
        self._on_stall = on_stall or _log_stall
        self._due = self._cpu = 0.0
        self._thread_id = 0
        self._stopped = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._stack: str = ""
        self._recent: deque[tuple[float, float]] = deque()
        self.longest = 0.0

    def start(self) -> None:
        """Begin to measure."""
        self._thread_id = threading.get_ident()
        self._arm()
        threading.Thread(target=self._sample, name="alveary-stalls", daemon=True).start()

    def stop(self) -> None:
        """Stop measuring."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._cpu = time.thread_time()
        self._due = time.monotonic() + _TICK_SECONDS
        self._timer = self._loop.call_later(_TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        now = time.monotonic()
        delay, cpu, stack, self._stack = max(now - self._due, 0.0), time.thread_time() - self._cpu, self._stack, ""
        self._record(now, delay)
        if delay > STALL_SECONDS:
            telemetry.STALLS.inc()
            self._on_stall(delay, min(cpu, delay + _TICK_SECONDS), stack)
        if not self._stopped.is_set():
            self._arm()

    def _record(self, now: float, delay: float) -> None:
        self.longest = max(self.longest, delay)
        # Those that a later, longer one makes irrelevant go: the first is always the longest of the window.
        while self._recent and self._recent[-1][1] <= delay:
            self._recent.pop()
        self._recent.append((now, delay))
        while self._recent[0][0] < now - _WINDOW_SECONDS:
            self._recent.popleft()
        telemetry.STALL.labels("minute").set(self._recent[0][1])
        telemetry.STALL.labels("ever").set(self.longest)

    def _sample(self) -> None:
        """In a thread of its own: note what the loop does while its timer is late."""
        while not self._stopped.wait(_TICK_SECONDS):
            if self._stack or time.monotonic() - self._due < STALL_SECONDS:
                continue
            frame = sys._current_frames().get(self._thread_id)
            if frame is not None:
                self._stack = "".join(traceback.format_stack(frame, limit=25))


def _log_stall(seconds: float, cpu: float, stack: str) -> None:
    log = telemetry.logger()
    if guarded() and cpu >= GUARD_CPU_SECONDS:
        log.error("loop.blocked", seconds=round(seconds, 3), cpu=round(cpu, 3), stack=stack)
    else:
        log.warning("loop.stall", seconds=round(seconds, 3), cpu=round(cpu, 3), stack=stack)


_guard_lock = threading.Lock()
_guarding = False


def refuse_blocking_calls() -> None:
    """From now on, calls that can block for an unbounded time raise BlockingCall on threads whose event loop runs.

    Audit hooks cannot be removed: this holds until the process ends. Idempotent.
    """
    global _guarding
    with _guard_lock:
        if _guarding:
            return
        sys.addaudithook(_audit)
        # Starting a process is quick, and asyncio does it on the loop as well; waiting for its end is what blocks.
        subprocess.Popen.wait = _refusing("subprocess.Popen.wait", subprocess.Popen.wait)  # type: ignore[method-assign]
        if sys.version_info < (3, 13):  # no audit event
            time.sleep = _refusing("time.sleep", time.sleep)
        _guarding = True


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _BLOCKING or (event == "socket.connect" and arguments[0].getblocking()):
        _refuse(event, arguments)


def _refuse(what: str, arguments: tuple[Any, ...]) -> None:
    if asyncio._get_running_loop() is not None:
        raise BlockingCall(
            f"{what} {str(arguments)[:200]} was called on an event loop: use asyncio.to_thread or an asynchronous equivalent"
        )


def _refusing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        _refuse(name, arguments)
        return function(*arguments, **named)

    return call
