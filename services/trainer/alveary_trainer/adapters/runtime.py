"""The port of runtimes: where the processes of an attempt live. `process` and `docker` implement it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from alveary_contracts.common.v1 import common_pb2 as c

ProgressCallback = Callable[[str], Awaitable[None]]
# Processes and threads that an attempt may have at a time.
MOST_PROCESSES = 8192


class StagingFailed(Exception):
    """Something a run needs cannot be had on this node; the text says what."""


@dataclass
class Usage:
    """What an attempt's processes use now."""

    cpu_percent: float = 0.0
    memory_bytes: int = 0
    pids: tuple[int, ...] = ()
    # How many of them the kernel killed because they reached the limit of memory.
    oom_kills: int = 0
    # Of what it has more than one run may have, a sentence.
    excess: str = ""


@dataclass(frozen=True)
class Outcome:
    """How the main process ended; neither code nor signal where its supervisor was killed, or it could not be set up."""

    exit_code: int | None = None
    signal: int | None = None
    # The kernel killed it for want of memory.
    out_of_memory: bool = False
    # Why the program could not be started, a sentence.
    problem: str = ""
    # Processes that were killed and do not die: in uninterruptible sleep, until their device or file system answers.
    left: tuple[int, ...] = ()


@dataclass(frozen=True)
class Staged:
    """An environment that is ready on this node, for as long as its context is open."""

    # Its python, as the attempt's processes see it.
    python: str
    # Reference of a container image; empty for a virtual environment.
    image: str = ""


@dataclass(frozen=True)
class AttemptPaths:
    """Folders of one attempt, on this node. `root` holds all but the socket and the inputs."""

    name: str
    root: Path
    socket: Path
    lib: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """The working directory."""
        return self.root / "work"

    @property
    def tmp(self) -> Path:
        """Its temporary files."""
        return self.root / "tmp"


@dataclass(frozen=True)
class View:
    """The same folders as the attempt's processes see them."""

    work: str
    tmp: str
    socket: str
    lib: str
    inputs: Mapping[str, str]
    # What the processes inherit beside what the run asks for.
    inherited: Mapping[str, str]


@dataclass(frozen=True)
class Limits:
    """What an attempt may take."""

    resources: c.Resources
    gpus: tuple[int, ...]
    network: str
    # Of a run on several nodes: what its parts have in common, and under which name they reach this one.
    gang: str = ""
    host: str = ""


@dataclass(frozen=True)
class Host:
    """How the other nodes of a run reach the processes of this one."""

    name: str
    # Where the name holds; "" is everywhere.
    network_scope: str
    # A port that is free there.
    port: int
    # The network interface with that address, and its subnet, where the processes have more than one.
    interface: str = ""
    subnet: str = ""


class ProcessTree(Protocol):
    """Running processes of an attempt. The reader of `stdout` and `stderr` (non-blocking) closes them."""

    stdout: int
    stderr: int

    async def wait(self) -> Outcome:
        """Until the main process has ended and nothing of the attempt is left."""
        ...

    def terminate(self) -> None:
        """Ask the main process to end: SIGTERM, once however often this is called."""
        ...

    def kill(self) -> None:
        """SIGKILL to every process. Harmless to repeat."""
        ...

    def usage(self) -> Usage:
        """CPU since the last call and memory now; blocks for a moment."""
        ...


class Runtime(Protocol):
    """One way to run attempts."""

    kind: str

    def stage(
        self, workspace: str, digest: str, environment: c.Environment, progress: ProgressCallback
    ) -> AbstractAsyncContextManager[Staged]:
        """Make an environment ready.

        Raises:
            StagingFailed: it cannot be had here.
        """
        ...

    def view(self, paths: AttemptPaths, staged: Staged) -> View:
        """How the processes will see their folders."""
        ...

    def shared_memory(self, resources: c.Resources) -> str:
        """For a run that found no room in /dev/shm: how much there is, and what to do."""
        ...

    def leave(self, paths: AttemptPaths) -> None:
        """Forget what `view` made for an attempt; harmless to repeat."""
        ...

    def host_path(self, paths: AttemptPaths, path: str) -> Path:
        """Where a path that a process named is on this node.

        Raises:
            ValueError: it is none that the process may name.
        """
        ...

    def readable_below(self, paths: AttemptPaths) -> Path:
        """What the platform reads on behalf of the processes must lie below this folder, symbolic links followed."""
        ...

    def command(self, first: str, staged: Staged) -> str:
        """The program that a run names.

        Raises:
            StagingFailed: it can be seen already that there is none.
        """
        ...

    async def host(self, gang: str, index: int, network: str) -> Host:
        """Where the processes of member `index` of a run on several nodes will be; `network` as in PlacementMade.

        Raises:
            StagingFailed: they cannot be reached from other nodes.
        """
        ...

    async def launch(self, paths: AttemptPaths, staged: Staged, argv: Sequence[str], env: Mapping[str, str], limits: Limits) -> ProcessTree:
        """Start the processes of an attempt.

        Raises:
            StagingFailed: they cannot be started.
        """
        ...

    async def sweep(self) -> None:
        """Remove what an earlier life of this node left."""
        ...

    async def close(self) -> None:
        """Remove what the node made for itself; no attempt is left."""
        ...


@contextlib.contextmanager
def open_beneath(path: Path, below: Path) -> Iterator[Path]:
    """A path to read a regular file by, which nobody can turn into another file meanwhile.

    Raises:
        ValueError: it is no regular file, or lies outside `below`.
        OSError: it cannot be opened.
    """
    # Opened first and looked at afterwards: a link that is swapped in between changes nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        real = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a file")
        if not real.is_relative_to(below.resolve()):
            raise ValueError(f"{path} leads outside the run's own folders")
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
