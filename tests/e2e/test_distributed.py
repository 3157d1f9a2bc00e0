"""Runs on several nodes: launched together, ended together, each rank by itself in log and outcome, nothing left running."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import TORCH, Embedded, embedded, finished, lines, processes_of, recorded, said, submit, until, wait_for_state

from alveary import Experiment, MpiConfiguration, PyTorchConfiguration, Run, ScriptRunConfig, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary.local.stack import trainers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A stack with a target of two nodes."""
    with embedded(tmp_path_factory.mktemp("pair"), lease=4.0) as stack:
        spec = AmlCompute.provisioning_configuration(min_nodes=2, max_nodes=2, cpus=1, idle_seconds_before_scaledown=600)
        target = ComputeTarget.create(stack.workspace(), "two", spec)
        until(lambda: len(target.list_nodes()) == 2, "both nodes are there")
        yield stack


@pytest.fixture
def workspace(pair: Embedded) -> Workspace:
    return pair.workspace()


def both(**options: Any) -> dict[str, Any]:
    """Options of a run on both nodes."""
    return {"compute_target": "two", "environment": TORCH, "grace_seconds": 2, **options}


def torchrun(processes: int = 2, **options: Any) -> PyTorchConfiguration:
    return PyTorchConfiguration(process_count=processes, node_count=2, **options)


def nothing_left(stack: Embedded, run: Run) -> None:
    until(lambda: not processes_of(run), "its processes are gone")
    until(lambda: not list((stack.state_dir / "trainer/work").glob(f"*/{run.id}-*")), "its folders are gone")
    until(lambda: not [n for n in ComputeTarget(run._workspace, "two").list_nodes() if run.id in n.run_ids], "its places are free")


def go(run: Run, stack: Embedded) -> None:
    """Let a script that waits for a file `go` go on, on every node."""
    for work in (stack.state_dir / "trainer/work").glob(f"*/{run.id}-*/work"):
        (work / "go").touch()


def test_torchrun_spans_nodes_and_each_rank_has_its_lines_files_and_exit_code(pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        rank, total = dist.get_rank(), torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        print(f"rank {rank} of {dist.get_world_size()} sum {total.item():g}")
        open(f"outputs/rank-{rank}.txt", "w").write(str(rank))
        open("outputs/same.txt", "w").write("the same everywhere")
        open("outputs/own.txt", "w").write(os.environ["ALVEARY_NODE_RANK"] if int(os.environ["LOCAL_RANK"]) == 0 else "")
        dist.barrier()
        if os.environ["LOCAL_RANK"] == "0":
            open("outputs/own.txt", "w").write(f"of rank {rank}")
        open(f"logs/{rank}.log", "w").write(f"log of {rank}\\n")
        dist.barrier()
        dist.destroy_process_group()
        """
    run = submit(workspace, source, code, **both(distributed_job_config=torchrun(4)))
    details = finished(run)
    assert [said(run, rank) for rank in range(4)] == [[f"rank {rank} of 4 sum 10"] for rank in range(4)]
    ranks = details["exit"]["ranks"]
    assert [(r["rank"], r["exit_code"]) for r in ranks] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert ranks[0]["node"] == ranks[1]["node"] != ranks[2]["node"] == ranks[3]["node"]
    assert sorted(details["nodes"]) == ["two-0", "two-1"]
    names = run.get_file_names()
    (other,) = [n for n in names if n.startswith("outputs/node-")]
    assert set(names) == {
        *(f"outputs/rank-{r}.txt" for r in range(4)), *(f"logs/{r}.log" for r in range(4)), "outputs/same.txt", "outputs/own.txt", other,
    }  # fmt: skip
    assert Path(run.download_file("outputs/own.txt", str(source / "own"))).read_text() == "of rank 0"
    assert Path(run.download_file(other, str(source / "other"))).read_text() == "of rank 2"
    # stdout of rank 0 first, the others on demand.
    assert pair.cli("run", "logs", run.id, "--stream", "stdout").stdout == "rank 0 of 4 sum 10\n"
    assert pair.cli("run", "logs", run.id, "--stream", "stdout", "--rank", "3").stdout == "rank 3 of 4 sum 10\n"
    every = pair.cli("run", "logs", run.id, "--stream", "stdout", "--all-ranks").stdout.splitlines()
    assert sorted(every) == [f"[{r}] rank {r} of 4 sum 10" for r in range(4)]
    nothing_left(pair, run)


def test_the_example_learns_on_two_nodes_what_it_learns_on_one(pair: Embedded, workspace: Workspace) -> None:
    losses = []
    for nodes in (1, 2):
        config = ScriptRunConfig(
            str(Path(__file__).parents[2] / "examples/ddp"), "train.py", ["--steps", 20], compute_target="two", environment=TORCH,
            distributed_job_config=PyTorchConfiguration(process_count=nodes, node_count=nodes),
        )  # fmt: skip
        run = Experiment(workspace, "ddp").submit(config)
        finished(run)
        (said_last,) = [line for line in said(run, 0) if "weights alike: True" in line]
        assert said_last.startswith(f"{nodes} ranks")
        losses.append(float(said_last.split("loss ")[1].split(",")[0]))
        nothing_left(pair, run)
    assert abs(losses[0] - losses[1]) < 1e-4


@pytest.fixture
def met(tmp_path: Path) -> Path:
    """A folder in which the processes of a run, all on this machine, see each other."""
    folder = tmp_path / "met"
    folder.mkdir()
    return folder


def test_the_first_failing_rank_is_named_and_the_others_are_ended(pair: Embedded, workspace: Workspace, source: Path, met: Path) -> None:
    code = """
        import os, pathlib, sys, time
        rank = int(os.environ["RANK"])
        print("begun", flush=True)
        pathlib.Path(sys.argv[1], str(rank)).touch()
        while len(os.listdir(sys.argv[1])) < 4: time.sleep(0.02)
        if rank == 3:
            print("about to fail", file=sys.stderr, flush=True)
            sys.exit(7)
        time.sleep(600)
        """
    run = submit(workspace, source, code, met, **both(distributed_job_config=torchrun(4)))
    details = finished(run, "Failed")
    status = details["exit"]
    assert (status["rank"], status["exit_code"], status["reason"]) == (3, 7, "exited")
    assert details["reason"] == f"rank 3 on node {status['node']} ended with exit code 7"
    assert status["last_lines"] == ["begun", "about to fail"]
    ends = {r["rank"]: r for r in status["ranks"]}
    assert ends[3]["exit_code"] == 7 and not ends[3]["stopped"]
    assert all(ends[r]["stopped"] and ends[r]["signal"] in (signal.SIGTERM, signal.SIGKILL) for r in (0, 1, 2))
    nothing_left(pair, run)


def test_a_killed_worker_is_started_anew_within_max_restarts(pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, signal, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        restart, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
        print(f"restart {restart}", flush=True)
        dist.barrier()
        if restart < 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
        dist.destroy_process_group()
        """
    run = submit(workspace, source, code, **both(distributed_job_config=torchrun(2, max_restarts=2)))
    details = finished(run)
    assert details["attempt"] == 1
    ends = {r["rank"]: r for r in details["exit"]["ranks"]}
    # Each node's torchrun counts for itself: that of rank 0 may count none, as it lost a peer, or one more.
    assert ends[0]["exit_code"] == ends[1]["exit_code"] == 0 and ends[1]["restarts"] >= 1
    assert len(said(run, 0)) >= 2
    run = submit(workspace, source, code.replace("restart < 1", "restart < 9"), **both(distributed_job_config=torchrun(2, max_restarts=1)))
    details = finished(run, "Failed")
    status = details["exit"]
    assert (status["reason"], status["signal"], status["rank"]) == ("signal", signal.SIGKILL, 1), status
    nothing_left(pair, run)


@pytest.mark.parametrize("which", ["leader", "member"])
def test_a_lost_node_leads_to_a_new_attempt(pair: Embedded, workspace: Workspace, source: Path, which: str) -> None:
    code = """
        import os, time
        print("begun", flush=True)
        open("outputs/attempt.txt", "w").write(os.environ["ALVEARY_ATTEMPT"])
        while os.environ["ALVEARY_ATTEMPT"] == "1":
            time.sleep(0.1)
        """
    run = submit(workspace, source, code, **both(node_count=2))
    until(lambda: len(said(run)) == 2, "both begin")
    first = run.get_details()["nodes"][0]
    node = first if which == "leader" else next(n for n in ("two-0", "two-1") if n != first)
    (trainer,) = [p for p in trainers(pair.state_dir) if p.environ()["ALVEARY_NODE"] == node]
    trainer.kill()
    details = finished(run)
    assert details["attempt"] == 2
    assert Path(run.download_file("outputs/attempt.txt", str(source / "a"))).read_text() == "2"
    events = recorded(run)
    assert [e.type for e in events if e.subject == f"{run.id}-1" and "finish" in e.type] == []
    nothing_left(pair, run)


WAITS = """
    import os, time
    print("begun", flush=True)
    while not os.path.exists("go"):
        time.sleep(0.02)
    open("outputs/x", "w").write("x")
    """


@pytest.mark.parametrize("state", ["Queued", "Starting", "Running", "Finalizing"])
def test_canceled_in_any_state_nothing_is_left_on_any_node(pair: Embedded, workspace: Workspace, source: Path, state: str) -> None:
    objects = psutil.Process(pair.pids()["objects"])
    (trainer,) = [p for p in trainers(pair.state_dir) if p.environ()["ALVEARY_NODE"] == "two-1"]
    other = None
    try:
        if state == "Queued":  # one of the nodes is taken
            other = submit(workspace, source, WAITS, compute_target="two")
            wait_for_state(other, "Running")
        if state == "Starting":  # one of them cannot get on
            trainer.suspend()
        run = submit(workspace, source, WAITS, **both(node_count=2))
        if state == "Finalizing":  # nothing can be stored
            until(lambda: len(said(run)) == 2, "both begin")
            objects.suspend()
            go(run, pair)
        wait_for_state(run, state)
        run.cancel()
        objects.resume()
        if state == "Starting":
            trainer.resume()
        finished(run, "Canceled")
        nothing_left(pair, run)
        if state in ("Queued", "Starting"):
            assert not lines(run)
    finally:
        objects.resume()
        trainer.resume()
        if other is not None:
            go(other, pair)
            finished(other)


def test_max_run_duration_ends_it_on_every_node(pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    run = submit(workspace, source, code, **both(node_count=2, max_run_duration_seconds=2))
    details = finished(run, "Failed")
    assert details["exit"]["reason"] == "timeout" and "max_run_duration_seconds = 2" in details["reason"]
    assert len(details["exit"]["ranks"]) == 2 and all(r["stopped"] for r in details["exit"]["ranks"])
    nothing_left(pair, run)


def test_elastic_begins_with_what_is_free_and_a_gang_waits_for_all(pair: Embedded, workspace: Workspace, source: Path) -> None:
    waiting = "import os, time\nprint('begun', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.02)"
    other = submit(workspace, source, waiting, compute_target="two")
    wait_for_state(other, "Running")
    code = "import os; print(os.environ['WORLD_SIZE'])"
    gang = submit(workspace, source, code, **both(distributed_job_config=torchrun(2)))
    wait_for_state(gang, "Queued")
    assert "2 nodes of 1 CPU" in gang.get_details()["reason"]
    gang.cancel()
    finished(gang, "Canceled")
    elastic = submit(workspace, source, code, **both(distributed_job_config=torchrun(2, min_node_count=1)))
    (node,) = finished(elastic)["nodes"]
    assert [node] != other.get_details()["nodes"]
    assert said(elastic) == ["1"]
    go(other, pair)
    finished(other)
    elastic = submit(workspace, source, code, **both(distributed_job_config=torchrun(2, min_node_count=1)))
    finished(elastic)
    assert said(elastic) == ["2", "2"]


def test_a_plain_program_on_each_node_finds_its_place_and_checkpoints_of_all_nodes(workspace: Workspace, source: Path, met: Path) -> None:
    code = """
        import os, pathlib, sys, time
        from alveary import Run
        run = Run.get_context()
        me, count = os.environ["NODE_RANK"], os.environ["NODE_COUNT"]
        print(me, count, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) > 0, flush=True)
        if run.resume_path is None:
            step = pathlib.Path("outputs/checkpoints/step-1")
            step.mkdir(parents=True)
            (step / f"shard-{me}").write_text(me)
            (step / ".metadata").write_text("of both")
            # Whoever fails first ends the others: both have written before either does.
            pathlib.Path(sys.argv[1], me).touch()
            while len(os.listdir(sys.argv[1])) < 2: time.sleep(0.02)
            sys.exit(3)
        print(sorted(str(p.relative_to(run.resume_path)) for p in pathlib.Path(run.resume_path).rglob("*") if p.is_file()))
        """
    from alveary import Retry

    run = submit(workspace, source, code, met, **both(node_count=2, retry=Retry(on=("exited",), backoff_seconds=0)))
    details = finished(run)
    assert details["attempt"] == 2
    shards = str(["step-1/.metadata", "step-1/shard-0", "step-1/shard-1"])
    assert sorted(said(run, 0)) == sorted(["0 2 127.0.0.1 True"] * 2 + [shards])
    assert sorted(said(run, 1)) == sorted(["1 2 127.0.0.1 True"] * 2 + [shards])


def test_mpirun_spans_nodes_without_ssh(mpirun: None, pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")  # finds its way by what the platform sets
        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        print(f"rank {os.environ['OMPI_COMM_WORLD_RANK']} of {os.environ['OMPI_COMM_WORLD_SIZE']} on {os.environ['NODE_RANK']} sum {total.item():g}")
        dist.barrier()
        dist.destroy_process_group()
        """
    run = submit(workspace, source, code, **both(distributed_job_config=MpiConfiguration(2, 2)))
    details = finished(run)
    assert [said(run, r) for r in range(4)] == [[f"rank {r} of 4 on {r // 2} sum 10"] for r in range(4)]
    assert [(r["rank"], r["exit_code"]) for r in details["exit"]["ranks"]] == [(r, 0) for r in range(4)]
    nothing_left(pair, run)


def test_of_mpirun_too_the_first_failing_rank_is_named(mpirun: None, pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, sys, time
        print("begun", flush=True)
        if os.environ["RANK"] == "3":
            sys.exit("no more data")
        time.sleep(600)
        """
    run = submit(workspace, source, code, **both(distributed_job_config=MpiConfiguration(2, 2)))
    details = finished(run, "Failed")
    status = details["exit"]
    assert (status["rank"], status["exit_code"]) == (3, 1) and details["reason"].startswith("rank 3 on node two-")
    assert status["last_lines"] == ["begun", "no more data"]
    nothing_left(pair, run)


def test_mpirun_is_canceled_on_every_node(mpirun: None, pair: Embedded, workspace: Workspace, source: Path) -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    run = submit(workspace, source, code, **both(distributed_job_config=MpiConfiguration(1, 2)))
    until(lambda: len(said(run)) == 2, "both begin")
    run.cancel()
    finished(run, "Canceled")
    nothing_left(pair, run)
