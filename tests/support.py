"""Real servers for tests: on free ports, in temporary directories, gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from alveary.environment import Environment
from alveary.events import Event, Events
from alveary.local.layout import Layout
from alveary.local.stack import servers as bare
from alveary.local.stack import status, trainers
from alveary.run import Experiment, Run
from alveary.run_options import Distribution, Resources, Retry
from alveary.script_run_config import ScriptRunConfig
from alveary.workspace import Workspace

# The suite is the same for both runtimes; tests/docker.sh runs it again in containers.
# The tests' own interpreter has torch.
TORCH = Environment("torch", user_managed=True, interpreter=sys.executable)
RUNTIME = os.environ.get("ALVEARY_TEST_RUNTIME", "process")


@dataclass
class Embedded:
    """A running embedded stack."""

    state_dir: Path
    process: subprocess.Popen[bytes]

    @property
    def config(self) -> Path:
        return self.state_dir / "config.json"

    def workspace(self) -> Workspace:
        return Workspace.from_config(self.config)

    def pids(self) -> dict[str, int]:
        found = status(self.state_dir)
        assert found is not None, "the stack is gone"
        return dict(found["pids"])

    def trainer_pids(self) -> list[int]:
        return [p.pid for p in trainers(self.state_dir)]

    def cli(self, *arguments: str, check: bool = True, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"ALVEARY_CONFIG": str(self.config), "ALVEARY_HOME": str(self.state_dir)}
        done = subprocess.run(
            [sys.executable, "-m", "alveary.cli", *arguments], env=env, capture_output=True, text=True, timeout=600, cwd=cwd, input=stdin
        )
        assert not check or done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done


def launch(
    state_dir: Path, *, port: int | None = 0, separate: bool = False, lease: float = 6.0, metrics_port: int = 0, runtime: str = "",
    bind: str = "",
) -> Embedded:  # fmt: skip
    """`alveary up` in a process of its own, ready."""
    state_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(state_dir), "--lease-seconds", str(lease)]
    command += ["--port", str(port)] if port is not None else []
    command += ["--separate"] if separate else []
    command += ["--metrics-port", str(metrics_port)] if metrics_port else []
    command += ["--runtime", runtime] if runtime else []
    command += ["--bind", bind] if bind else []
    log = state_dir / "up.log"
    # Blocking calls on an event loop raise in the services, and in trainers; see alveary_core.stalls.
    guarded = {"ALVEARY_GUARD_LOOP": "1", "ALVEARY_TRAINER_GUARD_LOOP": "1"} | os.environ
    with log.open("wb") as opened:
        process = subprocess.Popen(command, env=guarded, stdout=opened, stderr=opened, stdin=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600
    while "ready after" not in log.read_text():
        assert process.poll() is None, f"alveary up ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"alveary up is not ready: {log.read_text()}"
        time.sleep(0.05)
    return Embedded(state_dir, process)


def blocked(state_dir: Path, *services: str) -> list[str]:
    """What blocked the event loops of a stack's processes so far, one stack trace for each time; of `services` only, if any are given."""
    found = []
    for log in [*(state_dir / "logs").glob("*.log"), *(state_dir / "services" / "nodes").glob("*.log")]:
        for line in log.read_text(errors="replace").splitlines():
            if '"loop.blocked"' in line:
                told = json.loads(line)
                if not services or told["service"] in services:
                    found.append(f"{told['service']}: {told['cpu']} s of CPU in {told['seconds']} s\n{told['stack']}")
            elif "BlockingCall" in line:
                found.append(f"{log.name}: {line[-2000:]}")
    return found


def halt(stack: Embedded) -> None:
    """Stop a stack and see that it went."""
    stack.process.terminate()
    stack.process.wait(300)


@contextmanager
def embedded(state_dir: Path, *, port: int | None = 0, separate: bool = False, lease: float = 6.0, runtime: str = "") -> Iterator[Embedded]:
    """A stack for the duration; port None: the ports that the directory had before."""
    stack = launch(state_dir, port=port, separate=separate, lease=lease, runtime=runtime)
    try:
        yield stack
    finally:
        halt(stack)


@contextmanager
def servers(folder: Path) -> Iterator[Layout]:
    """nats-server and the object store alone, as `alveary up` starts them."""
    layout = Layout.open(folder, 0)
    with bare(layout):
        yield layout


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, of that size, mounted at `folder`. Skips the test where this process may mount nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=700", "alveary-test", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root with CAP_SYS_ADMIN: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """A file that takes all the space of a disk but `leave` bytes."""
    file = folder / "ballast"
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as opened:
        if leave:
            free = os.statvfs(folder)
            os.posix_fallocate(opened.fileno(), 0, free.f_bavail * free.f_frsize - leave)
            return file
        for chunk in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    opened.write(b"\0" * chunk)
    return file


def until(condition: Callable[[], object], what: str, seconds: float = 300.0) -> None:
    """Wait until `condition()` holds; fails with `what` after a time that is enough on any machine that is busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 60.0) -> None:
    """Wait until `await condition()` holds; fails with `what` after a generous time."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)


def debian(package: str, there: Callable[[], bool]) -> None:
    """Install a Debian package, unless what it brings is there. Fails, and says so, where only somebody else could."""
    with Path(tempfile.gettempdir(), f"alveary-apt-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in parallel, and dpkg does not
        if there():
            return
        if os.getuid() != 0 or shutil.which("apt-get") is None:
            pytest.fail(f"Debian's {package} is missing, and only root can install it here", pytrace=False)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (("update", "-qq"), ("install", "-y", "-qq", "--no-install-recommends", package)):
            done = subprocess.run(["apt-get", "-o", "DPkg::Lock::Timeout=300", *words], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"apt-get {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert there(), f"{package} was installed, and what it should bring is not there"


def submit(
    workspace: Workspace, source: Path, code: str, *arguments: object, experiment: str = "tests", tags: dict[str, str] | None = None,
    **options: object,
) -> Run:  # fmt: skip
    """Submit `code` as train.py, in the trainer's own interpreter unless an environment is given.

    `options`: of ScriptRunConfig, or fields of Resources, Retry (`max_attempts`) or Distribution.
    """
    (source / "train.py").write_text(textwrap.dedent(code))
    options.setdefault("environment", Environment("here", user_managed=True))
    config = ScriptRunConfig(str(source), "train.py", list(arguments), **grouped(options))
    return Experiment(workspace, experiment).submit(config, tags=tags)


def grouped(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ScriptRunConfig, with fields of Resources, Retry and Distribution gathered into these."""
    left = dict(options)
    for name, kind in (("resources", Resources), ("retry", Retry), ("distributed_job_config", Distribution)):
        fields = {f.name: left.pop(f.name) for f in dataclasses.fields(kind) if f.name in left}
        if fields:
            left[name] = dataclasses.replace(left[name], **fields) if name in left else kind(**fields)
    return left


def let_go(stack: Embedded, run: Run) -> None:
    """Put a file `go` into a run's working directory, which it waits for."""
    (work,) = (stack.state_dir / "trainer" / "work").glob(f"*/{run.id}-*/work")
    (work / "go").touch()


def finished(run: Run, state: str = "Completed") -> dict[str, Any]:
    """Wait for a run; fails, with all that is known of it, when it ends in another state."""
    details = run.wait_for_completion(raise_on_error=False)
    assert details["status"] == state, (details["status"], details["reason"], details["exit"], lines(run))
    return details


def tail(run: Run, after: int = 0, follow: bool = False, streams: tuple[str, ...] = ()) -> list[Any]:
    """All TailLines of a run."""

    async def collect() -> list[Any]:
        return [one async for one in run._workspace._client.logs.tail(run.id, after, follow, streams)]

    return run._workspace._call(collect())


def lines(run: Run, stream: str = "stdout") -> list[str]:
    """Lines of one stream."""
    return [one.line.data.decode(errors="replace") for one in tail(run, follow=False, streams=(stream,))]


def said(run: Run, rank: int | None = None, stream: str = "stdout") -> list[str]:
    return [one.line.data.decode() for one in tail(run, streams=(stream,)) if rank is None or one.line.rank == rank]


FINAL = ("run.completed", "run.failed", "run.canceled")


def recorded(*runs: Run, more: float = 1.0) -> list[Event]:
    """All events of the platform up to the final ones of `runs`, however long they take to arrive, and those of `more` seconds after.

    An end by silence alone would end too early on a machine that is busy.
    """
    events, missing = Events(runs[0]._workspace), {run.id for run in runs}
    found: list[Event] = []
    stream = events.subscribe("*.*", from_sequence=1, timeout=300)
    for event in stream:
        found.append(event)
        if event.type in FINAL:
            missing.discard(event.subject)
        if not missing:
            break
    assert not missing, f"no final event of {missing} within 300 s"
    stream.close()  # type: ignore[attr-defined]
    return found + list(events.subscribe("*.*", from_sequence=found[-1].sequence + 1, timeout=more))


def processes_of(run: Run) -> list[psutil.Process]:
    """Processes of a run that live, on any node."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ALVEARY_RUN_ID") == run.id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_state(run: Run, *states: str) -> str:
    """Wait until a run is in one of the states."""
    until(lambda: run.get_status() in states, f"run {run.id} in {states}, is {run.get_status()}")
    return run.get_status()
