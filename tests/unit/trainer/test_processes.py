"""The processes of an attempt: what is left of them, who is asked to end, what they use and what they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from support import until

from alveary_trainer.__main__ import runs_dir_of
from alveary_trainer.adapters import process
from alveary_trainer.adapters.cgroups import Groups, Offer, Support, describe
from alveary_trainer.adapters.process import ProcessTree, become_subreaper
from alveary_trainer.adapters.runtime import Outcome, StagingFailed
from alveary_trainer.lines import Lines
from alveary_trainer.settings import TrainerSettings
from alveary_trainer.shipper import pump
from alveary_trainer.short_paths import ShortLinks

NOWHERE = Offer(why_not="not in this test")
HEADER = "import os, signal, sys, time\nfrom pathlib import Path\n"


@pytest.fixture(params=["groups", "without"])
def groups(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Groups]:
    """With the control groups that this machine has, and with none."""
    become_subreaper()
    made = Groups(tmp_path, describe() if request.param == "groups" else Support(NOWHERE, NOWHERE, NOWHERE))
    yield made
    made.close()


class Started:
    """A tree, and what it printed."""

    def __init__(self, groups: Groups | None, argv: list[str], cwd: Path, env: dict[str, str] | None = None, memory: int = 0) -> None:
        self.group = groups.make("r-1", memory, 2000) if groups is not None else None
        environment = {"PATH": os.environ["PATH"], "ALVEARY_TEST": str(cwd)} | (env or {})
        self.tree = ProcessTree.launch(argv, cwd, environment, self.group)

    async def ends(self) -> tuple[Outcome, bytes, bytes]:
        """Its end, which is awaited for a minute, and its output: all of it is less than a pipe holds."""
        async with asyncio.timeout(60):
            outcome = await self.tree.wait()
        said = []
        for pipe in (self.tree.stdout, self.tree.stderr):
            with os.fdopen(pipe, "rb") as file:
                said.append(file.read() or b"")
        return outcome, said[0], said[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", HEADER + code]


def left(cwd: Path) -> list[psutil.Process]:
    """Processes of a test that live."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("ALVEARY_TEST") == str(cwd) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found


async def there(path: Path) -> None:
    """Wait for a file that a process writes."""
    await asyncio.to_thread(until, path.exists, f"{path} is written")


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {then}
        Path("there").touch()
        time.sleep(1000)
    os._exit(0)
os.wait()
while not Path("there").exists():
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "then",
    [
        "pass",
        "Path('there').touch(); os.kill(int(os.environ['SHIM']), signal.SIGKILL)",
        "os.kill(int(os.environ['SHIM']), signal.SIGSTOP)",
        "os.environ.clear(); os.setpgid(0, 0)",
        "Path('there').touch(); os.kill(os.getpid(), signal.SIGSTOP)",
    ],
    ids=["detached", "kills-its-shim", "stops-its-shim", "without-environment", "stopped"],
)
async def test_nothing_survives_its_run(groups: Groups, tmp_path: Path, then: str) -> None:
    # A second child keeps a process between the daemon and the end: the tree is more than a line.
    code = "os.environ['SHIM'] = str(os.getppid())\nif os.fork() == 0:\n    time.sleep(1000)\n" + DAEMON.format(then=then) + "sys.exit(3)"
    started = Started(groups, python(code), tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    if "STOP" in then:
        for _ in range(200):  # as an attempt measures it, until it has ended
            started.tree.usage()
            if waiting.done():
                break
            await asyncio.sleep(0.05)
    outcome, _, _ = await waiting
    # Whoever kills its shim, or stops it, may take the exit code with it, and nothing else.
    assert outcome.exit_code in ((None, 3) if "SHIM" in then else (3,)) and not outcome.left
    assert left(tmp_path) == []
    assert started.group is not None and not any(folder.exists() for folder in started.group._folders)


async def test_a_process_of_a_dead_trainer_is_found_by_its_variables(tmp_path: Path) -> None:
    runs_dir = tmp_path / "work" / "n"
    work = runs_dir / "r-1" / "work"
    work.mkdir(parents=True)
    stray = subprocess.Popen(["sleep", "1000"], env={"PATH": os.environ["PATH"], "ALVEARY_WORK_DIR": str(work)}, start_new_session=True)
    other = subprocess.Popen(["sleep", "1000"], env={"PATH": os.environ["PATH"], "ALVEARY_WORK_DIR": str(tmp_path / "work/n2/r-1")})
    try:
        await asyncio.to_thread(until, lambda: Path(f"/proc/{stray.pid}/comm").read_text() == "sleep\n", "it runs")
        assert process.end_strays(runs_dir) == 1
        assert stray.wait(30) == -signal.SIGKILL and other.poll() is None
    finally:
        for one in (stray, other):
            one.kill()
            one.wait()


def test_runs_are_named_by_the_path_that_their_strays_are_found_by(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    runs_dir = runs_dir_of(TrainerSettings(node="n", state_dir=tmp_path / "state"))
    assert runs_dir == tmp_path.resolve() / "disk" / "work" / "n" == ShortLinks(runs_dir).runs_dir


async def test_what_the_trainer_starts_itself_is_no_orphan(groups: Groups, tmp_path: Path) -> None:
    own = await asyncio.create_subprocess_exec("sleep", "1000", process_group=0)
    await Started(groups, ["true"], tmp_path).ends()
    assert own.returncode is None and psutil.Process(own.pid).status() != psutil.STATUS_ZOMBIE
    own.kill()
    assert await own.wait() == -signal.SIGKILL


async def test_a_fork_bomb_ends(groups: Groups, tmp_path: Path) -> None:
    code = "Path('there').touch()\nfor _ in range(5):\n    os.fork()\nwhile True:\n    try:\n        if os.fork() == 0: time.sleep(1000)\n"
    code += "    except OSError:\n        pass\n    time.sleep(0.2)"
    started = Started(groups, python(code), tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    deadline = time.monotonic() + 20  # it doubles until it is killed
    while len(started.tree.usage().pids) < 100 and time.monotonic() < deadline:
        assert not waiting.done()
    counted = len(started.tree.usage().pids)
    started.tree.kill()
    assert counted >= 100
    outcome, _, _ = await waiting
    assert (outcome.signal, outcome.left) == (signal.SIGKILL, ()) and left(tmp_path) == []


async def test_the_kernel_limits_how_many_processes_a_run_has(tmp_path: Path) -> None:
    support = describe()
    if not support.pids.version:
        pytest.skip(f"no control groups for pids here: {support.pids.why_not}")
    groups = Groups(tmp_path, support)
    started = Started(groups, python("import threading\ntry:\n    while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nexcept RuntimeError: os._exit(7)"), tmp_path)  # fmt: skip
    assert (await started.ends())[0].exit_code == 7
    groups.close()


# ---- who is asked to end --------------------------------------------------------------------------------------------

ASKED = """
count = 0
def saved(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, saved)
{before}
Path("there").touch()
while not count:
    time.sleep(0.01)
time.sleep(0.3)
print("saved after", count, [w.poll() for w in workers], flush=True)
for worker in workers:
    worker.kill()
"""
WORKERS = "import subprocess\nworkers = [subprocess.Popen(['sleep', '1000']) for _ in range(3)]"


@pytest.mark.parametrize(
    "before", [WORKERS, WORKERS + "\nPath('there').touch(); os.kill(os.getpid(), signal.SIGSTOP)"], ids=["running", "stopped"]
)
async def test_the_main_process_is_asked_once_and_its_workers_are_not(groups: Groups, tmp_path: Path, before: str) -> None:
    started = Started(groups, python(ASKED.format(before=before)), tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    if "SIGSTOP" in before:
        await asyncio.to_thread(until, lambda: any(p.status() == psutil.STATUS_STOPPED for p in left(tmp_path)), "it is stopped")
    for _ in range(3):
        started.tree.terminate()
    outcome, said, _ = await waiting
    assert outcome.exit_code == 0 and said == b"saved after 1 [None, None, None]\n"


@pytest.mark.parametrize(
    "script",
    ["cd . && {} train.py; exit $?", "{} train.py | cat", "({} train.py) & wait", "#!/bin/sh\nx=1\n{} train.py\nexit $?"],
    ids=["list", "pipe", "background", "file"],
)
@pytest.mark.parametrize("shell", ["sh", "bash"])
async def test_a_shell_gives_its_program_time_to_save(tmp_path: Path, shell: str, script: str) -> None:
    become_subreaper()
    (tmp_path / "train.py").write_text(HEADER + ASKED.format(before=WORKERS))
    words = script.format(sys.executable)
    argv = [shell, "-c", words]
    if script.startswith("#!"):
        (tmp_path / "run.sh").write_text(words)
        (tmp_path / "run.sh").chmod(0o755)
        argv = ["./run.sh"]
    started = Started(None, argv, tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    started.tree.terminate()
    _, said, _ = await waiting
    assert b"saved after 1 [None, None, None]\n" in said


async def test_a_shell_whose_program_saves_nothing_ends_at_once(tmp_path: Path) -> None:
    become_subreaper()
    started = Started(None, ["sh", "-c", "touch there; sleep 1000; touch next"], tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    started.tree.terminate()
    outcome, _, _ = await waiting
    assert outcome.signal == signal.SIGTERM and not (tmp_path / "next").exists()


async def test_a_shell_with_a_trap_is_asked_itself(tmp_path: Path) -> None:
    become_subreaper()
    code = "trap 'echo trapped; exit 5' TERM; touch there; sleep 1000 & wait"
    started = Started(None, ["bash", "-c", code], tmp_path)
    waiting = asyncio.create_task(started.ends())
    await there(tmp_path / "there")
    started.tree.terminate()
    outcome, said, _ = await waiting
    assert (outcome.exit_code, said) == (5, b"trapped\n")


# ---- what it uses ---------------------------------------------------------------------------------------------------


async def test_what_is_shared_counts_once(groups: Groups, tmp_path: Path) -> None:
    size = 100 << 20
    with (tmp_path / "data").open("wb") as file:  # mapped and read: the kernel takes it back when it likes, once it is on disk
        file.write(b"x" * size)
        os.fsync(file.fileno())
    code = f"""
import mmap
held = bytearray({size})
file = open("data", "rb")
data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for _ in range(4):
    if os.fork() == 0: break
sum(data[::4096]); sum(held[::4096])
Path(f"there{{os.getpid()}}").touch()
time.sleep(1000)
"""
    started = Started(groups, python(code), tmp_path, memory=4 * size)
    waiting = asyncio.create_task(started.ends())
    await asyncio.to_thread(until, lambda: len(list(tmp_path.glob("there*"))) == 5, "all five have read it")
    usage = started.tree.usage()
    assert len(usage.pids) >= 5 and size < usage.memory_bytes < 2 * size, usage.memory_bytes >> 20
    started.tree.kill()
    assert not (await waiting)[0].out_of_memory


async def test_a_run_beyond_its_memory_is_killed_by_the_kernel_and_told_apart(tmp_path: Path) -> None:
    support = describe()
    if not support.memory.version:
        pytest.skip(f"no control groups for memory here: {support.memory.why_not}")
    become_subreaper()
    groups = Groups(tmp_path, support)
    # A worker is killed, and the main process ends by itself.
    code = "if os.fork() == 0:\n    held = bytearray(300 << 20)\n    os._exit(0)\nsys.exit(1 if os.wait()[1] else 0)"
    outcome, _, _ = await Started(groups, python(code), tmp_path, memory=128 << 20).ends()
    assert outcome.out_of_memory
    groups.close()


# ---- what it inherits -----------------------------------------------------------------------------------------------


async def test_a_program_finds_what_it_expects_however_the_platform_was_started(tmp_path: Path) -> None:
    become_subreaper()
    code = """
import json, resource, stat
os.close(os.open("file", os.O_CREAT))
print(json.dumps({
    "mode": stat.S_IMODE(os.stat("file").st_mode), "stdin": sys.stdin.read(), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "status": {k: v.strip() for k, _, v in (l.partition(":") for l in Path("/proc/self/status").read_text().splitlines()) if k in ("SigBlk", "SigIgn")},
    "open": sorted(os.listdir("/proc/self/fd")), "argv": sys.argv[1:], "value": os.environ["VALUE"], "big": len(os.environ["BIG"]),
}))
"""
    old, limits = os.umask(0o077), resource.getrlimit(resource.RLIMIT_NOFILE)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 1024), limits[1]))
    try:
        arguments = ["two\nlines", "caf\udce9", "", "--x=$HOME"]
        env = {"VALUE": "a\udcffb", "BIG": "x" * 120_000, "BIGGER": "y" * 120_000}
        # Not -c: it would be python's own reading of its standard streams that is seen.
        (tmp_path / "seen.py").write_text(HEADER + code)
        started = Started(None, [sys.executable, "seen.py", *arguments], tmp_path, env)
        outcome, said, errors = await started.ends()
    finally:
        os.umask(old)
        signal.signal(signal.SIGHUP, ignored)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert outcome.exit_code == 0, errors
    seen: dict[str, Any] = json.loads(said)
    assert (seen["mode"], seen["stdin"], seen["big"]) == (0o777 & ~0o022, "", 120_000)
    assert seen["nofile"] == min(limits[1], 65536)
    # Python itself ignores SIGPIPE and SIGXFSZ; SIGHUP it leaves alone.
    assert not int(seen["status"]["SigIgn"], 16) & 1 << (signal.SIGHUP - 1) and int(seen["status"]["SigBlk"], 16) == 0
    assert seen["open"] == ["0", "1", "2", "3"], "descriptors of the platform are open in the script"
    assert seen["argv"] == ["two\nlines", "caf\udce9", "", "--x=$HOME"] and seen["value"] == "a\udcffb"


async def test_a_pipeline_ends_quietly_when_its_reader_has_enough(tmp_path: Path) -> None:
    become_subreaper()
    outcome, said, errors = await Started(None, ["bash", "-c", "yes | head -1"], tmp_path).ends()
    assert (outcome.exit_code, said, errors) == (0, b"y\n", b"")


async def test_the_end_does_not_wait_for_a_child_that_holds_the_output(groups: Groups, tmp_path: Path) -> None:
    begun = time.monotonic()
    code = "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\nprint('last words', flush=True)"
    outcome, said, _ = await Started(groups, python(code), tmp_path).ends()
    assert (outcome.exit_code, said) == (0, b"last words\n") and time.monotonic() - begun < 60


async def test_a_script_may_close_its_output(groups: Groups, tmp_path: Path) -> None:
    outcome, _, _ = await Started(groups, python("os.close(1); os.close(2); time.sleep(0.1); os._exit(4)"), tmp_path).ends()
    assert outcome.exit_code == 4


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"LANG": "de_DE.UTF-8", "LC_ALL": ""}, {"LANG": "de_DE.UTF-8"}),
        ({"LANG": "de_DE.ISO-8859-1", "LC_CTYPE": "C.utf8"}, {"LANG": "de_DE.ISO-8859-1", "LC_CTYPE": "C.utf8"}),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "C"}, {"LANG": "C.UTF-8"}),
        ({"LANG": "de_DE@euro"}, {"LANG": "C.UTF-8"}),
        ({}, {"LANG": "C.UTF-8"}),
    ],
)
def test_runs_print_utf8_whatever_the_trainers_locale_is(environ: dict[str, str], found: dict[str, str]) -> None:
    assert process.locale_of(environ) == found


class Sink:
    """Takes lines, and has room for all of them."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def add(self, line: Any) -> None:
        self.lines.append(line.data)

    async def room(self) -> None:
        await asyncio.sleep(0)


async def test_a_pipe_that_somebody_else_holds_open_is_read_to_what_it_holds(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    sink, over = Sink(), asyncio.Event()
    reading = asyncio.create_task(pump(read, Lines(sink, "stdout", 0, 1), sink, over))  # type: ignore[arg-type]
    os.write(write, b"one\n")
    async with asyncio.timeout(60):
        while not sink.lines:
            await asyncio.sleep(0.01)
        assert not reading.done(), "its writers may live"
        os.write(write, b"x" * 60_000 + b"\nlast")
        over.set()
        await reading
    os.close(write)
    assert sink.lines == [b"one", b"x" * 60_000, b"last"]


# ---- the shim that is kept ready ------------------------------------------------------------------------------------


async def runtime_with_spare(groups: Groups, folder: Path) -> process.ProcessRuntime:
    made = process.ProcessRuntime(cast(Any, None), groups, ShortLinks(folder))
    await made.sweep()
    await spare_of(made)
    return made


async def spare_of(runtime: process.ProcessRuntime) -> ProcessTree:
    for _ in range(600):
        if runtime._spare is not None and children_of(runtime._spare._shim.pid):
            return runtime._spare
        await asyncio.sleep(0.05)
    raise AssertionError("no shim is kept ready")


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


async def launched(runtime: process.ProcessRuntime, folder: Path, code: str, memory: int = 0) -> tuple[ProcessTree, Outcome]:
    place = SimpleNamespace(work=folder, name=f"r-{time.monotonic_ns()}")
    limits = SimpleNamespace(gpus=(), resources=SimpleNamespace(memory_bytes=memory))
    tree = await runtime.launch(cast(Any, place), cast(Any, None), python(code), {"PATH": os.environ["PATH"]}, cast(Any, limits))
    async with asyncio.timeout(60):
        outcome = await tree.wait()
    for pipe in (tree.stdout, tree.stderr):
        os.close(pipe)
    return tree, outcome


async def test_an_attempt_gets_the_shim_that_is_ready_and_another_takes_its_place(groups: Groups, tmp_path: Path) -> None:
    runtime = await runtime_with_spare(groups, tmp_path)
    spare = await spare_of(runtime)
    tree, outcome = await launched(runtime, tmp_path, "sys.exit(4)")
    assert tree is spare and outcome.exit_code == 4
    assert (await spare_of(runtime)) is not spare
    spare = await spare_of(runtime)
    await runtime.close()
    assert not psutil.pid_exists(spare._shim.pid) and not any(folder.exists() for folder in spare.group._folders)


@pytest.mark.parametrize("victim", ["shim", "child", "both"])
async def test_a_spare_that_was_killed_costs_no_attempt(groups: Groups, tmp_path: Path, victim: str) -> None:
    runtime = await runtime_with_spare(groups, tmp_path)
    spare = await spare_of(runtime)
    shim, (child,) = psutil.Process(spare._shim.pid), children_of(spare._shim.pid)
    for one in (child, shim) if victim == "both" else (shim,) if victim == "shim" else (child,):
        one.kill()
    await asyncio.to_thread(until, lambda: spare._shim.poll() is not None, "it has ended")
    tree, outcome = await launched(runtime, tmp_path, "sys.exit(4)")
    assert tree is not spare and outcome.exit_code == 4 and not outcome.left
    await runtime.close()
    assert not psutil.pid_exists(child.pid) or child.status() == psutil.STATUS_ZOMBIE


async def test_the_memory_of_an_attempt_is_limited_in_a_shim_that_was_ready(tmp_path: Path) -> None:
    support = describe()
    if not support.memory.version:
        pytest.skip(f"no control groups for memory here: {support.memory.why_not}")
    become_subreaper()
    runtime = await runtime_with_spare(Groups(tmp_path, support), tmp_path)
    _, outcome = await launched(runtime, tmp_path, "held = bytearray(300 << 20)", memory=128 << 20)
    assert outcome.out_of_memory
    await runtime.close()


async def test_a_spare_that_was_stopped_runs_its_program(groups: Groups, tmp_path: Path) -> None:
    runtime = await runtime_with_spare(groups, tmp_path)
    spare = await spare_of(runtime)
    (child,) = children_of(spare._shim.pid)
    child.suspend()
    await asyncio.to_thread(until, lambda: child.status() == psutil.STATUS_STOPPED, "it is stopped")
    tree, outcome = await launched(runtime, tmp_path, "sys.exit(4)")
    assert tree is spare and outcome.exit_code == 4
    await runtime.close()


async def test_an_out_of_memory_kill_before_the_launch_is_not_the_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become_subreaper()
    runtime = await runtime_with_spare(Groups(tmp_path, Support(NOWHERE, NOWHERE, NOWHERE)), tmp_path)
    monkeypatch.setattr(process, "oom_kills", lambda: 1_000_000)
    _, outcome = await launched(runtime, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome.signal == signal.SIGKILL and not outcome.out_of_memory
    await runtime.close()


def descriptors() -> set[str]:
    """The open descriptors of this process, and what they are."""
    found = set()
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them
            found.add(f"{one.name} {one.readlink()}")
    return found


@pytest.mark.parametrize("fails", ["limit", "start", "started"])
async def test_a_launch_that_fails_leaves_nothing(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM if fails == "start" else errno.EIO, "the test says so")

    before = descriptors()
    runtime = await runtime_with_spare(groups, tmp_path)
    spare = await spare_of(runtime)
    if fails == "limit":
        monkeypatch.setattr(spare.group, "limit_memory", fail)
    else:
        owner, name = (process, "_write_json") if fails == "start" else (ProcessTree, "_wake_waiting")
        monkeypatch.setattr(cast(Any, owner), name, fail)
    with pytest.raises(StagingFailed, match="control groups" if fails == "limit" else "cannot start a process"):
        await launched(runtime, tmp_path, "sys.exit(4)")
    assert not psutil.pid_exists(spare._shim.pid) and spare._shim.pid not in ProcessTree._shims
    assert not any(folder.exists() for folder in spare.group._folders)
    monkeypatch.undo()
    await runtime.close()
    assert descriptors() <= before


@pytest.mark.parametrize("pipes", range(4))
async def test_a_shim_that_cannot_be_prepared_leaves_nothing(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipes: int
) -> None:
    made, pipe = 0, os.pipe

    def few() -> tuple[int, int]:
        nonlocal made
        made += 1
        if made > pipes:
            raise OSError(errno.EMFILE, "Too many open files")
        return pipe()

    runtime = process.ProcessRuntime(cast(Any, None), groups, ShortLinks(tmp_path))
    before = descriptors()
    monkeypatch.setattr(os, "pipe", few)
    with pytest.raises(StagingFailed, match="this node cannot start a process: .* Too many open files"):
        await runtime._prepare("r-1")
    monkeypatch.undo()
    assert descriptors() <= before
    assert not any((base / "r-1").exists() for base, _ in groups._bases())


async def test_a_spare_that_is_being_prepared_at_the_end_leaves_nothing(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, go, make = threading.Event(), threading.Event(), groups.make

    def slowly(name: str, memory_bytes: int, processes: int) -> Any:
        making.set()
        go.wait(60)
        return make(name, memory_bytes, processes)

    monkeypatch.setattr(groups, "make", slowly)
    runtime = process.ProcessRuntime(cast(Any, None), groups, ShortLinks(tmp_path))
    await runtime.sweep()
    await asyncio.to_thread(making.wait, 60)
    closing = asyncio.create_task(runtime.close())
    await asyncio.wait({closing}, timeout=0.3)
    assert not closing.done(), "what is being made would be left behind"
    go.set()
    async with asyncio.timeout(60):
        await closing
    assert runtime._spare is None and not any(base.exists() for base, _ in groups._bases())


async def test_a_launch_that_is_cancelled_leaves_no_groups(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making, go, make = threading.Event(), threading.Event(), groups.make

    def slowly(name: str, memory_bytes: int, processes: int) -> Any:
        making.set()
        go.wait(60)
        return make(name, memory_bytes, processes)

    monkeypatch.setattr(groups, "make", slowly)
    runtime = process.ProcessRuntime(cast(Any, None), groups, ShortLinks(tmp_path))
    launching = asyncio.create_task(launched(runtime, tmp_path, "pass"))
    await asyncio.to_thread(making.wait, 60)
    launching.cancel()
    await asyncio.sleep(0.05)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await launching
    await runtime.close()
    assert not any(base.exists() for base, _ in groups._bases())


async def test_no_two_spares_have_groups_of_the_same_name(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, make = [], groups.make

    def noted(name: str, memory_bytes: int, processes: int) -> Any:
        names.append(name)
        return make(name, memory_bytes, processes)

    monkeypatch.setattr(groups, "make", noted)
    for _ in range(2):
        runtime = await runtime_with_spare(groups, tmp_path)
        await runtime.close()
    assert len(set(names)) == 2 and all(name.startswith("spare-") for name in names)
