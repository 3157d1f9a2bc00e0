"""Scripts as strangers write them, on a machine as strangers have them: a long state directory, a proxy that leads nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import TORCH, Embedded, embedded, finished, lines, processes_of, said, submit, until, wait_for_state

from alveary import Dataset
from alveary.environment import Environment
from alveary.run import Experiment, Run
from alveary.run_options import MpiConfiguration, PyTorchConfiguration
from alveary.script_run_config import ScriptRunConfig
from alveary.workspace import Workspace

# Nobody listens there, and nobody may ask it.
PROXY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    folder = tmp_path_factory.mktemp("home") / ("a-user-with-a-long-name-" * 3) / "work" / "alveary state"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTPS_PROXY", "grpc_proxy", "ALL_PROXY"):
            patch.setenv(name, PROXY)
        for name in ("no_proxy", "NO_PROXY", "LC_ALL", "LC_CTYPE"):
            patch.delenv(name, raising=False)
        patch.setenv("LANG", "en_US.ISO-8859-1")
        old = os.umask(0o077)
        try:
            with embedded(folder) as made:
                yield made
        finally:
            os.umask(old)


@pytest.fixture(scope="module")
def workspace(stack: Embedded) -> Workspace:
    return stack.workspace()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


def short_links() -> set[Path]:
    return {path for path in Path("/tmp").glob("alv-*") if path.is_symlink()}


def asks(workspace: Workspace, source: Path, *command: str, **files: tuple[bytes, int]) -> Run:
    for name, (content, mode) in files.items():
        path = source / name.replace("__", ".")
        path.write_bytes(content)
        path.chmod(mode)
    config = ScriptRunConfig(str(source), command=list(command), environment=Environment("here", user_managed=True))
    return Experiment(workspace, "tests").submit(config)


def test_sockets_in_its_temporary_folder_work_with_any_state_directory(stack: Embedded, workspace: Workspace, source: Path) -> None:
    before = short_links()
    run = submit(
        workspace,
        source,
        """
        import multiprocessing as mp, os, socket, tempfile
        from multiprocessing.managers import BaseManager

        def double(x):
            return 2 * x

        if __name__ == "__main__":
            manager = mp.Manager()
            shared = manager.dict()
            shared["a"] = 1
            with mp.Pool(2) as pool:
                print(pool.map(double, [1, 2]), dict(shared))
            server = socket.socket(socket.AF_UNIX)
            server.bind(os.path.join(tempfile.mkdtemp(prefix="torch-shm-dir-"), "manager.sock"))
            folder = tempfile.gettempdir()
            print(len(folder) <= 20, os.path.realpath(folder))
            with tempfile.NamedTemporaryFile(delete=False) as file:
                file.write(b"x" * 1000)
        """,
    )
    finished(run)
    first, second = lines(run)
    assert first == "[2, 4] {'a': 1}"
    short, _, real = second.partition(" ")
    assert short == "True" and real.startswith(str(stack.state_dir)), "large temporary files belong on the disk of the state directory"
    assert short_links() <= before and not Path(real).exists()


def test_a_daemon_that_kills_its_shim_is_ended_with_its_run(workspace: Workspace, source: Path) -> None:
    run = submit(
        workspace,
        source,
        """
        import os, signal, time
        shim = os.getppid()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.kill(shim, signal.SIGKILL)
                time.sleep(1000)
            os._exit(0)
        time.sleep(1000)
        """,
        max_attempts=1,
    )
    details = finished(run, "Failed")
    assert details["exit"]["reason"] == "launch_failed"
    assert processes_of(run) == []


def test_a_cancelled_script_saves_while_its_workers_live(workspace: Workspace, source: Path) -> None:
    run = submit(
        workspace,
        source,
        """
        import os, signal, sys, time
        import multiprocessing as mp

        def work(queue):
            while True:
                queue.put(os.getpid())

        if __name__ == "__main__":
            queue = mp.Queue(4)
            workers = [mp.Process(target=work, args=(queue,), daemon=True) for _ in range(2)]
            for worker in workers:
                worker.start()
            asked = []
            signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
            print("ready", flush=True)
            while not asked:
                queue.get()
            for _ in range(100):
                queue.get()
            time.sleep(0.5)
            print("saved, asked", len(asked), [w.is_alive() for w in workers], flush=True)
            open("outputs/model", "w").write("saved")
        """,
        grace_seconds=30,
    )
    until(lambda: "ready" in lines(run), "it runs")
    run.cancel()
    finished(run, "Canceled")
    assert "saved, asked 1 [True, True]" in lines(run)
    assert "outputs/model" in run.get_file_names()


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_ranks_are_asked_once_and_have_the_whole_grace(mpirun: None, workspace: Workspace, source: Path, launcher: str) -> None:
    torchrun = PyTorchConfiguration(process_count=2, node_count=1, max_restarts=3)
    run = submit(
        workspace,
        source,
        """
        import os, signal, sys, time
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        print("ready", flush=True)
        while not asked:
            time.sleep(0.01)
        # One fails while the other still saves: torchrun neither ends that nor starts this anew, and mpirun, which kills what it
        # has asked after a second, does not know.
        if os.environ["RANK"] == "1":
            sys.exit(1)
        time.sleep(2.5)
        print("saved, asked", len(asked), flush=True)
        """,
        environment=TORCH,
        distributed_job_config=torchrun if launcher == "torchrun" else MpiConfiguration(2, 1),
        grace_seconds=60,
    )
    until(lambda: said(run).count("ready") == 2, "both ranks run")
    run.cancel()
    finished(run, "Canceled")
    assert said(run).count("ready") == 2 and said(run, 0).count("saved, asked 1") == 1, said(run)


def test_a_shell_script_of_the_source_runs_and_what_is_wrong_with_one_is_named(workspace: Workspace, source: Path) -> None:
    fine = asks(workspace, source, "./run.sh", "a b", run__sh=(b'#!/usr/bin/env bash\necho "ran $1 in $(basename "$PWD")"\n', 0o755))
    windows = asks(workspace, source, "./run.sh", run__sh=(b"#!/bin/bash\r\necho x\r\n", 0o755))
    mode = asks(workspace, source, "./run.sh", run__sh=(b"#!/bin/bash\necho x\n", 0o644))
    finished(fine)
    assert lines(fine) == ["ran a b in work"]
    for run, words in ((windows, "./run.sh has Windows line endings"), (mode, "./run.sh is not executable (mode 0644): run `chmod +x")):
        details = finished(run, "Failed")
        assert words in details["reason"] and details["exit"]["exit_code"] == 126 and details["exit"]["reason"] == "exited", details


def test_a_run_finds_the_nodes_proxies_a_utf8_locale_and_a_usual_mask(workspace: Workspace, source: Path) -> None:
    run = submit(
        workspace,
        source,
        """
        import os, sys
        print({name: os.environ.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "no_proxy")})
        print(oct(os.umask(0)), sys.stdout.encoding, "caf\\u00e9")
        """,
        environment=Environment("here", user_managed=True, environment_variables={"no_proxy": "mine.example"}),
    )
    finished(run)
    variables, rest = lines(run)
    for word in (
        f"'http_proxy': '{PROXY}'",
        f"'https_proxy': '{PROXY}'",
        f"'HTTP_PROXY': '{PROXY}'",
        "mine.example,",
        "127.0.0.1",
    ):
        assert word in variables, variables
    assert rest == "0o22 utf-8 café"


def test_torchrun_works_where_the_name_of_the_machine_does_not_resolve(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    rename = "import os, socket, sys; socket.sethostname('no_such_host_'); os.execv(sys.argv[1], sys.argv[1:])"
    hide = ["unshare", "--uts", sys.executable, "-c", rename]
    if subprocess.run([*hide, "/bin/true"], capture_output=True).returncode:
        pytest.skip("only root gives a process another host name")
    (source / "train.py").write_text(
        "import os, socket, torch, torch.distributed as dist\ndist.init_process_group('gloo')\nx = torch.ones(1)\ndist.all_reduce(x)\n"
        "os.write(1, f'{socket.gethostname()} {int(x)}\\n'.encode())\ndist.destroy_process_group()\n"
    )
    from alveary_contracts.common.v1 import common_pb2 as c
    from alveary_trainer import launch
    from alveary_trainer.adapters.runtime import Host, View

    spec = c.RunSpec(entry_script="train.py", launcher=c.LAUNCHER_TORCHRUN, process_count_per_node=2)
    team = launch.Team(0, ["127.0.0.1"], 4711, Host("127.0.0.1", "", 4711))
    *words, _, _, _, _ = launch.torchrun(spec, sys.executable, "/lib", team, "r-1")
    view = View(str(source), str(tmp_path), f"{tmp_path}/run.sock", "", {}, {"PATH": os.environ["PATH"]})
    env = launch.variables(spec, view, sys.executable, "r", 1, team)
    argv = [*hide, *words, sys.executable, "train.py"]
    done = subprocess.run(argv, cwd=source, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == ["no_such_host_ 2"] * 2, done.stderr[-2000:]


def ended(pid: int) -> bool:
    """Whether a process has ended; where its new parent does not reap it, it stays a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_trainer_that_is_killed_leaves_no_name_and_no_process(stack: Embedded, workspace: Workspace, source: Path) -> None:
    run = submit(
        workspace,
        source,
        """
        import os, signal, time
        os.environ["MARK"] = "1"
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
        os.kill(os.getppid(), signal.SIGSTOP)  # its shim will not hear of the trainer's end
        print(os.environ["TMPDIR"], os.getppid(), flush=True)
        time.sleep(1000)
        """,
        max_attempts=1,
    )
    wait_for_state(run, "Running")
    until(lambda: lines(run), "it runs")
    tmpdir, _, shim = lines(run)[0].partition(" ")
    pids = stack.trainer_pids()
    assert re.fullmatch(r"/tmp/alv-[0-9a-f]{8}", tmpdir)
    for pid in pids:
        psutil.Process(pid).kill()
    finished(run, "Failed")
    until(lambda: stack.trainer_pids() and stack.trainer_pids() != pids, "the node is started anew")
    until(lambda: processes_of(run) == [] and ended(int(shim)), "what the trainer left is ended")
    until(lambda: not Path(tmpdir).is_symlink(), "the name of its folder is gone")


def test_a_run_that_changes_its_input_changes_no_other_run(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "labels.csv").write_text("1,2,3")
    dataset = Dataset.upload(workspace, str(data), "strangers")
    (source / "train.py").write_text(
        "import os, sys\npath = os.path.join(os.environ['ALVEARY_INPUT_DATA'], 'labels.csv')\n"
        "if sys.argv[1] == 'evil':\n    os.chmod(path, 0o644)\n    open(path, 'w').write('changed')\nprint(open(path).read())\n"
    )

    def once(*arguments: str) -> Run:
        here = Environment("here", user_managed=True)
        config = ScriptRunConfig(str(source), "train.py", [*arguments, dataset.as_mount("data")], environment=here)
        run = Experiment(workspace, "tests").submit(config)
        finished(run)
        return run

    assert lines(once("evil")) == ["changed"]
    after = once()
    assert lines(after) == ["1,2,3"]
    assert [line for line in lines(after, "system") if "was changed on this node" in line and "labels.csv" in line]
