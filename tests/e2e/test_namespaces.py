"""Nodes with addresses of their own: trainers in network namespaces that join with a token, and whose links can be cut.

Each has a link to the platform, over a bridge, and one to the other node, which no firewall of this machine sees.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from support import TORCH, Embedded, debian, finished, halt, launch, lines, processes_of, recorded, said, submit, tail, until

from alveary import AlvearyError, MpiConfiguration, PyTorchConfiguration, Run, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary_contracts.runs.v1 import runs_pb2, runs_pb2_grpc
from alveary_core.auth import LEEWAY_SECONDS, Principal, issue

NODES = (2, 3)
FAKETIME = "*/faketime/libfaketime.so.1"


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], check=check, capture_output=True)


@dataclass
class Site:
    """A stack on a bridge, and two machines (namespaces)."""

    name: str
    subnet: str
    peers: str
    folder: Path
    stack: Embedded | None = None
    trainers: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node}"

    def space(self, node: int) -> str:
        return f"{self.name}n{node}"

    def build(self) -> None:
        ip("link", "add", f"{self.name}b", "type", "bridge")
        ip("addr", "add", f"{self.address(1)}/24", "dev", f"{self.name}b")
        ip("link", "set", f"{self.name}b", "up")
        for node in NODES:
            space, here = self.space(node), f"{self.name}v{node}"
            ip("netns", "add", space)
            ip("link", "add", here, "type", "veth", "peer", "name", "up0", "netns", space)
            ip("link", "set", here, "master", f"{self.name}b", "up")
            ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "up0")
            ip("-n", space, "link", "set", "up0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        a, b = (self.space(n) for n in NODES)
        ip("link", "add", "peer0", "netns", a, "type", "veth", "peer", "name", "peer0", "netns", b)
        for node in NODES:
            ip("-n", self.space(node), "addr", "add", f"{self.peers}.{node}/24", "dev", "peer0")
            ip("-n", self.space(node), "link", "set", "peer0", "up")

    def destroy(self) -> None:
        for node in NODES:
            ip("netns", "del", self.space(node), check=False)
            ip("link", "del", f"{self.name}v{node}", check=False)
        ip("link", "del", f"{self.name}b", check=False)

    def cut(self, node: int) -> None:
        ip("link", "set", f"{self.name}v{node}", "down")

    def mend(self, node: int) -> None:
        ip("link", "set", f"{self.name}v{node}", "up")

    def join(self, node: int, command: str, *more: str, environment: dict[str, str] | None = None) -> None:
        words = [
            *shlex.split(command),
            *more,
            "--name",
            f"m{node}",
            "--state-dir",
            str(self.folder / f"m{node}"),
            "--cpus",
            "1",
            "--address",
            f"{self.peers}.{node}",
        ]
        assert words[0] == "alveary"
        with (self.folder / f"m{node}.log").open("ab") as log:
            self.trainers[node] = subprocess.Popen(
                ["ip", "netns", "exec", self.space(node), sys.executable, "-m", "alveary.cli", *words[1:]],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | (environment or {}),
            )  # fmt: skip

    def leave(self, node: int) -> None:
        process = self.trainers.pop(node)
        process.terminate()
        process.wait(30)

    @property
    def target(self) -> ComputeTarget:
        assert self.stack is not None
        return ComputeTarget(self.stack.workspace(), "far")

    def all_there(self) -> None:
        until(lambda: {n.id for n in self.target.list_nodes()} == {"m2", "m3"}, "both machines are nodes")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if os.getuid() != 0:
        pytest.skip("only root can make network namespaces")
    debian("iproute2", lambda: shutil.which("ip") is not None)
    number = os.getpid() % 60000
    low = number // 50 % 250
    site = Site(f"av{number}", f"10.{200 + number % 50}.{low}", f"10.{150 + number % 50}.{low}", tmp_path_factory.mktemp("site"))
    site.build()
    try:
        site.stack = launch(site.folder / "stack", lease=4.0, bind=site.address(1))
        ComputeTarget.create(site.stack.workspace(), "far", AmlCompute.provisioning_configuration(kind="nodes"))
        command = site.stack.cli("node", "token", "far").stdout.strip()
        for node in NODES:
            site.join(node, command)
        site.all_there()
        yield site
    finally:
        for node in list(site.trainers):
            site.leave(node)
        if site.stack is not None:
            halt(site.stack)
        site.destroy()


@pytest.fixture
def workspace(site: Site) -> Workspace:
    assert site.stack is not None
    return site.stack.workspace()


def on(**options: Any) -> dict[str, Any]:
    return {"compute_target": "far", "environment": TORCH, "grace_seconds": 2, **options}


def test_a_join_token_is_good_for_joining_alone(site: Site, workspace: Workspace) -> None:
    assert site.stack is not None
    endpoint, token = site.target.create_join_token()
    with grpc.insecure_channel(endpoint) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            runs_pb2_grpc.RunServiceStub(channel).ListRuns(
                runs_pb2.ListRunsRequest(), metadata=(("authorization", f"Bearer {token}"),), timeout=10
            )
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    owner = site.stack.cli("node", "join", endpoint, workspace._client.config.token, check=False)
    assert owner.returncode == 1 and "is no join token" in owner.stderr
    with pytest.raises(AlvearyError, match="starts its nodes itself"):
        ComputeTarget(workspace, "local").create_join_token()
    with pytest.raises(AlvearyError, match="valid_seconds: -1: a number from 0"):
        site.target.create_join_token(-1)
    secret = json.loads((site.stack.state_dir / "stack.json").read_text())["secrets"]["tokens"]
    ended = issue(secret, Principal("join/far", "default", "joiner"), -2 * LEEWAY_SECONDS)
    late = site.stack.cli("node", "join", endpoint, ended, check=False)
    assert late.returncode == 1 and "expired" in late.stderr


def test_a_client_elsewhere_submits_and_downloads(site: Site, source: Path, tmp_path: Path) -> None:
    assert site.stack is not None
    (source / "train.py").write_text("open('outputs/x.txt', 'w').write('from afar')")
    script = f"""
import sys
from alveary import Environment, Experiment, ScriptRunConfig, Workspace
workspace = Workspace.from_config({str(site.stack.state_dir / "config.outside.json")!r})
config = ScriptRunConfig({str(source)!r}, "train.py", compute_target="far", environment=Environment("e", user_managed=True, interpreter=sys.executable))
run = Experiment(workspace, "afar").submit(config)
run.wait_for_completion()
print(open(run.download_file("outputs/x.txt", {str(tmp_path / "x")!r})).read())
"""
    done = subprocess.run(["ip", "netns", "exec", site.space(3), sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "from afar\n", done.stderr


def test_data_parallel_training_over_two_addresses(site: Site, workspace: Workspace, source: Path) -> None:
    code = """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
        torch.manual_seed(dist.get_rank())
        for _ in range(5):
            model(torch.randn(8, 4)).square().mean().backward()
        print("gradient", [round(g, 4) for g in model.module.weight.grad.flatten().tolist()])
        dist.barrier()
        dist.destroy_process_group()
        """
    run = submit(workspace, source, code, **on(distributed_job_config=PyTorchConfiguration(process_count=2, node_count=2)))
    finished(run)
    assert len(said(run, 0)) == 1 and said(run, 0) == said(run, 1), "the gradients are not those of both"


def test_mpirun_over_two_addresses(mpirun: None, workspace: Workspace, source: Path) -> None:
    code = """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        print(os.environ["OMPI_COMM_WORLD_RANK"], total.item())
        dist.barrier()
        dist.destroy_process_group()
        """
    run = submit(workspace, source, code, **on(distributed_job_config=MpiConfiguration(1, 2)))
    finished(run)
    assert [said(run, r) for r in (0, 1)] == [["0 3.0"], ["1 3.0"]]


ATTEMPTS = """
    import os, time
    attempt = os.environ["ALVEARY_ATTEMPT"]
    open("outputs/attempt.txt", "w").write(attempt)
    print("begun", attempt, flush=True)
    for _ in range(600 if attempt == "1" else 1):
        time.sleep(0.1)
        open("outputs/attempt.txt", "w").write(attempt)
    """


def moved(run: Run, folder: Path) -> None:
    """It ended once, by its second attempt, and the first wrote nothing of what it has."""
    details = finished(run)
    assert details["attempt"] == 2
    assert Path(run.download_file("outputs/attempt.txt", str(folder / "attempt.txt"))).read_text() == "2"
    events = recorded(run)
    assert [e.type for e in events if e.subject == run.id].count("run.completed") == 1
    assert not [e for e in events if e.subject == f"{run.id}-1" and e.type in ("attempt.finalizing", "attempt.finished")]


def test_behind_a_cut_link_processes_end_and_the_run_goes_on_elsewhere(
    site: Site, workspace: Workspace, source: Path, tmp_path: Path
) -> None:
    run = submit(workspace, source, ATTEMPTS, **on())
    until(lambda: "begun 1" in lines(run), "it runs")
    node = int(run.get_details()["nodes"][0].removeprefix("m"))
    first = processes_of(run)
    site.cut(node)
    try:
        moved(run, tmp_path)
        # Nobody can tell them to: the trainer ends them because nobody answers it.
        until(
            lambda: not [p for p in first if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "the first attempt's processes ended"
        )
    finally:
        site.mend(node)
    moved(run, tmp_path)
    site.all_there()


@pytest.mark.parametrize("end", ["leader", "member"])
def test_a_run_on_two_nodes_is_attempted_again_when_a_link_is_cut(
    site: Site, workspace: Workspace, source: Path, tmp_path: Path, end: str
) -> None:
    run = submit(workspace, source, ATTEMPTS, **on(node_count=2))
    until(lambda: said(run).count("begun 1") == 2, "both begin")
    names = run.get_details()["nodes"]
    node = int(names[0 if end == "leader" else 1].removeprefix("m"))
    site.cut(node)
    try:
        until(lambda: run.get_status() in ("Queued", "NotResponding"), "its node is lost")
        until(lambda: not processes_of(run), "its processes have ended on both nodes")
    finally:
        site.mend(node)
    moved(run, tmp_path)
    site.all_there()


def test_between_two_nodes_a_cut_of_their_own_link_fails_the_run_with_its_reason(site: Site, workspace: Workspace, source: Path) -> None:
    """Both reach the platform, but not each other: the ranks say what they miss, and none is left."""
    code = """
        import datetime, os, torch, torch.distributed as dist
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=8))
        print("begun", flush=True)
        for _ in range(10000):
            dist.all_reduce(torch.ones(1))
        """
    ip("-n", site.space(2), "link", "set", "peer0", "down")
    try:
        run = submit(
            workspace,
            source,
            code,
            **on(distributed_job_config=PyTorchConfiguration(process_count=2, node_count=2), max_run_duration_seconds=40),
        )
        details = run.wait_for_completion(raise_on_error=False)
    finally:
        ip("-n", site.space(2), "link", "set", "peer0", "up")
    assert details["status"] == "Failed" and details["reason"], details
    until(lambda: not processes_of(run), "nothing is left")
    assert any(one.line.stream == "launcher-stderr" for one in tail(run))


@pytest.fixture(scope="session")
def faketime() -> str:
    """libfaketime, installed where it is missing: it moves the clock of one process."""
    debian("libfaketime", lambda: bool(sorted(Path("/usr/lib").glob(FAKETIME))))
    return str(sorted(Path("/usr/lib").glob(FAKETIME))[0])


@pytest.mark.parametrize("jump", ["+600s", "-600s"])
def test_a_node_whose_clock_jumps_goes_on(faketime: str, site: Site, workspace: Workspace, source: Path, tmp_path: Path, jump: str) -> None:
    assert site.stack is not None
    clock = tmp_path / "clock"
    clock.write_text("+0s")
    environment = {
        "LD_PRELOAD": faketime, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    site.leave(2)
    site.join(2, site.stack.cli("node", "token", "far").stdout.strip(), "--label", "clock=odd", environment=environment)
    try:
        site.all_there()
        code = """
            import os, time
            from alveary import Run
            run = Run.get_context()
            print("begun", flush=True)
            while not os.path.exists("go"):
                time.sleep(0.05)
            run.log("loss", 1.0)
            open("outputs/x.txt", "w").write("x")
            """
        run = submit(workspace, source, code, **on(node_labels={"clock": "odd"}))
        until(lambda: "begun" in lines(run), "it runs on the node")
        part = tmp_path / "part"
        part.write_text(jump)
        part.rename(clock)
        # Leases are a matter of durations: nothing is lost for several of them.
        time.sleep(6)
        assert run.get_status() == "Running"
        (work,) = (site.folder / "m2/work").glob(f"*/{run.id}-1/work")
        (work / "go").touch()
        details = finished(run)
        assert details["attempt"] == 1 and run.get_file_names() == ["outputs/x.txt"] and run.get_metrics()["loss"] == 1.0
    finally:
        site.leave(2)
        site.join(2, site.stack.cli("node", "token", "far").stdout.strip())
        site.all_there()
