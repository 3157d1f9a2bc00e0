"""Launching through the shim, signalling and measuring a process tree."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SHIM = Path(__file__).with_name("shim.py")


@dataclass
class Usage:
    """What a tree uses now."""

    cpu_percent: float = 0.0
    memory_bytes: int = 0
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How the main process ended; neither where the shim was killed."""

    exit_code: int | None = None
    signal: int | None = None


class ProcessTree:
    """One launched process and all that descends from it."""

    def __init__(self, shim: subprocess.Popen[bytes], stdout: int, stderr: int, status: int) -> None:
        self._shim, self.stdout, self.stderr, self._status = shim, stdout, stderr, status
        self._cpu: dict[int, psutil.Process] = {}

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
        return Outcome(report.get("exit_code"), report.get("signal"))

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
