"""Runs through the public SDK, on a real stack."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import RUNTIME, Embedded, finished, let_go, lines, submit, tail, until, wait_for_state

from alveary import AlvearyError, ComputeTarget, ComputeTargetException, Dataset, Environment, Run, RunFailedException, Workspace

# Processes share this test's interpreter; a container needs torch in its image.
TORCH = (
    Environment("torch", user_managed=True)
    if RUNTIME == "process"
    else Environment("torch", ["torch==2.13.0", "numpy", "onnx", "onnxruntime", "onnxscript"])
)


def test_metrics_files_logs_and_tags_of_a_run(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import sys
        from alveary import Run
        run = Run.get_context()
        print("to stdout"); print("to stderr", file=sys.stderr)
        run.log("lr", 0.1)
        for step in range(3):
            run.log("loss", 1.0 / (step + 1), step=step)
        run.log_list("sizes", [1, 2, 3])
        run.log("diverged", 1.0); run.log("diverged", float("nan"))
        run.log("limit", float("-inf"))
        run.log_row("confusion", a=1, b=2)
        run.log_table("table", {"x": [1, 2], "y": [3, 4]})
        open("picture.png", "wb").write(b"not really")
        run.log_image("plot", path="picture.png")
        run.tag("stage", "test")
        run.add_properties({"fixed": "1"})
        run.upload_file("outputs/early.txt", "picture.png")
        open("outputs/model.txt", "w").write("weights")
        open("logs/extra.log", "w").write("one\\ntwo\\n")
        """)  # fmt: skip
    finished(run)
    metrics = run.get_metrics()
    assert metrics["lr"] == 0.1
    assert metrics["loss"] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert metrics["sizes"] == [1, 2, 3]
    assert metrics["diverged"][0] == 1.0 and math.isnan(metrics["diverged"][1]) and metrics["limit"] == -math.inf
    assert [r.id for r in workspace._call(workspace._client.runs.list(f'id = "{run.id}" AND metrics.diverged = nan'))] == [run.id]
    assert metrics["confusion"] == {"a": 1, "b": 2}
    assert metrics["table"] == {"x": [1, 2], "y": [3, 4]}
    assert metrics["plot"] == "outputs/images/plot.png"
    assert run.tags["stage"] == "test" and run.properties["fixed"] == "1"
    assert lines(run) == ["to stdout"] and lines(run, "stderr") == ["to stderr"] and lines(run, "logs/extra.log") == ["one", "two"]
    assert set(run.get_file_names()) == {"logs/extra.log", "outputs/early.txt", "outputs/images/plot.png", "outputs/model.txt"}
    run.download_file("outputs/model.txt", str(source / "copy"))
    assert (source / "copy").read_text() == "weights"
    with pytest.raises(AlvearyError, match=r"stored no 'outputs/none'"):
        run.download_file("outputs/none")


def test_the_training_process_holds_no_credential(workspace: Workspace, source: Path, stack: object) -> None:
    run = submit(workspace, source, """
        import json, os
        from alveary import Run
        Run.get_context().log("x", 1)
        files = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
        json.dump({"env": dict(os.environ), "files": files}, open("outputs/seen.json", "w"))
        """)  # fmt: skip
    finished(run)
    seen = Path(run.download_file("outputs/seen.json", str(source / "seen.json"))).read_text()
    secrets = (stack.state_dir / "stack.json").read_text()  # type: ignore[attr-defined]
    token = (stack.state_dir / "config.json").read_text()  # type: ignore[attr-defined]
    import json

    hidden = [*json.loads(secrets)["secrets"].values(), json.loads(token)["token"]]
    assert not [s for s in hidden if s in seen]
    allowed = {"ALVEARY_RUN_ID", "ALVEARY_ATTEMPT", "ALVEARY_SOCKET", "ALVEARY_EXPERIMENT", "ALVEARY_WORK_DIR"}
    allowed |= {"ALVEARY_NODE_RANK", "ALVEARY_NODE_COUNT"}
    assert {k for k in json.loads(seen)["env"] if k.startswith("ALVEARY")} == allowed
    others = [f for f in json.loads(seen)["files"].values() if not f.startswith(("pipe:", "socket:", "/dev/null", "/proc", "/dev/urandom"))]
    assert [f for f in others if not f.endswith("seen.json") and f not in ("/alveary/io/stdout", "/alveary/io/stderr")] == []


def test_the_sdk_is_there_in_an_environment_with_nothing_else(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    environment = Environment("bare")  # in a container: an image with nothing but Python
    if RUNTIME == "process":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
        environment = Environment("bare", user_managed=True, interpreter=str(tmp_path / "bare/bin/python"))
    run = submit(workspace, source, """
        import sys
        from alveary import Run
        run = Run.get_context(allow_offline=False)
        run.log("x", 2.5)
        run.flush()
        third = [m for m in sys.modules if m.split(".")[0] in ("grpc", "google", "nats", "minio", "urllib3")]
        assert not third, third
        """, environment=environment)  # fmt: skip
    finished(run)
    assert run.get_metrics() == {"x": 2.5}


def test_a_script_cannot_speak_for_another_run_or_leave_its_folder(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import json, os, socket
        line = socket.socket(socket.AF_UNIX); line.connect(os.environ["ALVEARY_SOCKET"]); reader = line.makefile()
        def ask(**message):
            line.sendall(json.dumps({"id": 1, **message}).encode() + b"\\n"); return json.loads(reader.readline())["error"]
        print(ask(op="tag", run_id="01M00000000000000000000000", set={"a": "b"}))
        print(ask(op="upload", name="../../escape", path=__file__))
        print(ask(op="register", name="stolen", path="../../../../etc"))
        print(ask(op="metric", name="", kind="scalar", value=1, time=0))
        """)  # fmt: skip
    finished(run)
    first, second, third, fourth = lines(run)
    assert "speaks for run" in first and "'..'" in second and "no file or folder" in third and "needs a name" in fourth


@pytest.mark.parametrize(
    ("code", "options", "reason", "words"),
    [
        ("import sys; print('last words'); sys.exit(3)", {}, "exited", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", {}, "signal", "SIGSEGV"),
        ("import time; time.sleep(600)", {"max_run_duration_seconds": 1, "grace_seconds": 1}, "timeout", "max_run_duration_seconds = 1"),
        ("b = bytearray(600 << 20); import time; time.sleep(600)", {"memory_gb": 0.25}, "out_of_memory", "256 MiB"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(workspace: Workspace, source: Path, code: str, options: dict[str, Any], reason: str, words: str) -> None:
    details = finished(submit(workspace, source, code, **options), "Failed")
    assert details["exit"]["reason"] == reason
    assert words in details["reason"]
    assert details["attempt"] == 1


def test_waiting_for_a_failed_run_raises_with_its_last_lines(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "print('the reason is here'); raise SystemExit(2)")
    with pytest.raises(RunFailedException, match="the reason is here"):
        run.wait_for_completion()


def test_nothing_survives_a_run(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import os, subprocess, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(0.3)
        """)  # fmt: skip
    finished(run)

    def left() -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ALVEARY_RUN_ID") == run.id:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    assert left() == []


def test_cancel_asks_first_and_then_insists(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import signal, time
        def stop(*_): print("asked to stop", flush=True)
        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        while True: time.sleep(0.1)
        """, grace_seconds=1)  # fmt: skip
    until(lambda: "ready" in lines(run), "the script runs")
    run.cancel()
    details = finished(run, "Canceled")
    assert details["exit"]["signal"] == signal.SIGKILL
    assert "asked to stop" in lines(run)
    with pytest.raises(AlvearyError, match="Canceled already"):
        run.cancel()


def test_cancel_while_it_is_queued(workspace: Workspace, source: Path) -> None:
    cpus = ComputeTarget(workspace, "local").node_resources.cpus
    first = submit(workspace, source, "import time; time.sleep(600)", cpus=cpus, grace_seconds=0)
    second = submit(workspace, source, "print()", cpus=cpus)
    wait_for_state(second, "Queued")
    assert "in use by earlier runs" in second.get_details()["reason"]
    second.cancel()
    assert finished(second, "Canceled")["attempt"] == 0
    first.cancel()
    finished(first, "Canceled")


def test_lines_of_any_length_and_any_bytes_survive(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import sys
        out = sys.stdout.buffer
        out.write(b"x" * 3_000_000 + b"\\n"); out.write(bytes(b for b in range(256) if b != 10) + b"\\n"); out.write(b"\\n"); out.write(b"no end")
        """)  # fmt: skip
    finished(run)
    parts = tail(run, streams=("stdout",))
    whole, rest = [], b""
    for one in parts:
        rest += one.line.data
        if not one.line.partial:
            whole.append(rest)
            rest = b""
    assert whole == [b"x" * 3_000_000, bytes(b for b in range(256) if b != 10), b"", b"no end"]


def test_a_flood_of_lines_loses_none_and_keeps_their_order(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "for i in range(100_000): print(i)")
    followed = tail(run, follow=True, streams=("stdout",))
    assert [int(one.line.data) for one in followed] == list(range(100_000))
    finished(run)
    cursors = [one.cursor for one in followed]
    assert cursors == sorted(set(cursors))
    half = cursors[50_000]
    until(lambda: len(tail(run, half, streams=("stdout",))) == 49_999, "the archive goes on behind any cursor")
    assert [one.cursor for one in tail(run, streams=("stdout",))] == cursors


def test_identical_sources_upload_nothing_and_ignore_files_are_honoured(workspace: Workspace, source: Path) -> None:
    (source / "keep.py").write_text("")
    (source / "drop.bin").write_text("x")
    (source / "sub").mkdir()
    (source / "sub" / "drop.bin").write_text("x")
    (source / ".gitignore").write_text("keep.py")
    (source / ".alvearyignore").write_text("*.bin\n")
    run = submit(workspace, source, "import os; print(sorted(os.listdir('.')))")
    finished(run)
    assert "keep.py" in lines(run)[0] and "drop.bin" not in lines(run)[0]
    uploads: list[object] = []
    again = workspace._call(workspace._client.runs.upload_snapshot(source, lambda *a: uploads.append(a)))
    assert again == run.get_snapshot_id()
    assert uploads == []
    assert Path(run.restore_snapshot(path=str(source / "restored")), "keep.py").exists()


def test_bad_input_is_refused_with_a_sentence(workspace: Workspace, source: Path) -> None:
    def refused(words: str, code: str = "INVALID_ARGUMENT", **options: Any) -> None:
        with pytest.raises(AlvearyError, match=words) as caught:
            submit(workspace, source, "print()", **options)
        assert caught.value.code == code

    refused("there is no compute target 'nowhere'; there are: ", compute_target="nowhere")
    refused("have no GPU", use_gpu=True)
    refused("64 CPUs were asked for; a node of 'local' has", cpus=64)
    refused("is not a valid name", experiment="no/slashes")
    refused("is not an input|is no dataset", inputs=[3])
    with pytest.raises(AlvearyError, match=r"'none.py' is not in the source directory; it has train.py"):
        workspace._call(_raw_submit(workspace, source, "none.py"))
    with pytest.raises(ComputeTargetException, match="there is no compute target 'nowhere'"):
        ComputeTarget(workspace, "nowhere")
    with pytest.raises(AlvearyError, match="there is no run"):
        Run.get(workspace, "01M00000000000000000000000")
    big = source / "big.bin"
    with big.open("wb") as file:
        file.truncate(301_000_000)
    refused(r"big.bin \(301.0 MB\)", "RESOURCE_EXHAUSTED")
    big.unlink()
    for number in range(2001):
        (source / f"f{number}").touch()
    refused("2002 files", "RESOURCE_EXHAUSTED")


async def _raw_submit(workspace: Workspace, source: Path, script: str) -> object:
    from alveary_contracts.common.v1 import common_pb2 as c

    return await workspace._client.runs.submit(c.RunSpec(entry_script=script, compute_target="local"), source)


def test_datasets_are_versioned_shared_and_read_only(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "train" / "a" / "ü 1.txt").write_text("one")
    name = f"data-{os.getpid()}"
    first = Dataset.upload(workspace, str(folder), name)
    assert Dataset.upload(workspace, str(folder), name).version == first.version == 1
    (folder / "two.txt").write_text("two")
    second = Dataset.upload(workspace, str(folder), name)
    assert second.version == 2
    run = submit(workspace, source, """
        import os, sys, stat
        folder = sys.argv[1]
        assert folder == os.environ["ALVEARY_INPUT_PICTURES"]
        print(sorted(os.listdir(folder)), oct(stat.S_IMODE(os.stat(folder + "/train/a/ü 1.txt").st_mode)))
        """, first.as_mount("pictures"))  # fmt: skip
    finished(run)
    assert lines(run) == ["['train'] 0o444"]
    assert run.get_details()["spec"]["inputs"][0]["version"] == 1
    second.download(str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "train" / "a" / "ü 1.txt").read_text() == "one"
    with pytest.raises(AlvearyError, match="there is no dataset"):
        Dataset.get_by_name(workspace, name, 9)
    shutil.rmtree(folder)


def test_runs_are_found_by_what_is_known_of_them(workspace: Workspace, source: Path) -> None:
    experiment = f"list-{os.getpid()}"
    made = []
    for number in range(3):
        run = submit(
            workspace,
            source,
            "import sys; from alveary import Run; Run.get_context().log('loss', float(sys.argv[1]))",
            number,
            experiment=experiment,
        )
        run.tag("n", str(number))
        made.append(run.id)
        finished(run)
    client = workspace._client

    def find(condition: str, order: str = "") -> list[str]:
        return [r.id for r in workspace._call(client.runs.list(f'experiment = "{experiment}" AND {condition}', order))]

    until(lambda: len(find("metrics.loss >= 0")) == 3, "the metrics are there")
    assert find("state = Completed") == made[::-1]
    assert find('tags.n = "1"') == [made[1]]
    assert find("metrics.loss > 0.5", "metrics.loss") == [made[1], made[2]]
    assert find("metrics.loss >= 0", "metrics.loss desc") == made[::-1]
    assert find("state = Failed") == []
    from alveary_contracts.runs.v1 import runs_pb2 as pb

    pages, token = [], ""
    while True:
        request = pb.ListRunsRequest(filter=f'experiment = "{experiment}"', page_size=2, page_token=token)
        reply = workspace._call(client.call(client.stubs.runs.ListRuns, request))
        pages += [r.id for r in reply.runs]
        token = reply.next_page_token
        if not token:
            break
    assert pages == made[::-1]
    assert [r.id for r in workspace.experiments[experiment].get_runs()] == made[::-1]


def test_children_and_runs_are_filtered_by_tags_properties_and_state(workspace: Workspace, source: Path) -> None:
    experiment = f"children-{os.getpid()}"
    parent = submit(workspace, source, "print()", experiment=experiment)
    ids = {}
    for name, above, code in (("good", parent.id, "print()"), ("bad", parent.id, "raise SystemExit(1)")):
        run = submit(workspace, source, code, experiment=experiment, parent_run_id=above, properties={"kind": name}, tags={"n": name})
        finished(run, "Completed" if name == "good" else "Failed")
        ids[name] = run.id
    below = submit(workspace, source, "print()", experiment=experiment, parent_run_id=ids["bad"][:20], tags={"n": "below"})
    finished(below)
    finished(parent)

    def children(**wanted: Any) -> list[str]:
        return [run.id for run in parent.get_children(**wanted)]

    until(lambda: children() == [ids["bad"], ids["good"]], "the list is up to date")
    assert children(tags={"n": "good"}) == children(properties={"kind": "good"}) == children(status="Completed") == [ids["good"]]
    assert children(tags="n") == children(properties={"kind": None}) == [ids["bad"], ids["good"]] and children(tags="none") == []
    # A grandchild is found below a child that is not wanted itself.
    assert set(children(recursive=True, status="Completed")) == {ids["good"], below.id}
    assert children(recursive=True, tags={"n": "below"}) == [below.id] and len(children(recursive=True)) == 3
    runs = parent.experiment.get_runs
    assert [r.id for r in runs(properties="kind", include_children=True)] == [ids["bad"], ids["good"]] and len(runs()) == 1
    with pytest.raises(AlvearyError, match="runs have no types here"):
        parent.get_children(type="azureml.scriptrun")
    found = below.parent
    assert found is not None and found.id == ids["bad"] and Run.list(parent.experiment, tags={"n": "below"}) == []


def test_a_target_starts_nodes_for_a_run_and_lets_them_go(workspace: Workspace, source: Path) -> None:
    from alveary import AmlCompute

    name = f"elastic-{os.getpid()}"
    target = ComputeTarget.create(
        workspace, name, AmlCompute.provisioning_configuration(vm_size="STANDARD_D2", max_nodes=1, idle_seconds_before_scaledown=1)
    )
    assert target.get_status().current_nodes == 0
    run = submit(workspace, source, "print('hi')", compute_target=name)
    seen = []

    async def watch() -> None:
        from alveary.client.states import state_name

        async for one in workspace._client.runs.watch(run.id):
            seen.append((state_name(one.state), one.reason))

    workspace._call(watch())
    assert any(state == "Provisioning" and "starting a node" in reason for state, reason in seen), seen
    assert seen[-1][0] == "Completed"
    until(lambda: target.get_status().current_nodes == 0, "the idle node goes")
    target.delete()
    with pytest.raises(ComputeTargetException):
        ComputeTarget(workspace, name)


def test_torchrun_starts_its_processes(workspace: Workspace, source: Path) -> None:
    from alveary import PyTorchConfiguration

    run = submit(workspace, source, """
        import os, torch.distributed as dist, torch
        dist.init_process_group(os.environ["ALVEARY_COMMUNICATION_BACKEND"])
        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        os.write(1, f"sum {total.item()} of {dist.get_world_size()}\\n".encode())
        dist.barrier()  # a rank that leaves while another still listens to it would make that one abort
        dist.destroy_process_group()
        """, distributed_job_config=PyTorchConfiguration("Gloo", process_count=2), environment=TORCH)  # fmt: skip
    run_lines = finished(run) and lines(run)
    assert [x for x in run_lines if x.startswith("sum")] == ["sum 3.0 of 2"] * 2


def test_logs_are_read_by_page_and_searched_alive_and_archived(stack: Embedded, workspace: Workspace, source: Path) -> None:
    code = """
        import os, sys, time
        for i in range(2500):
            print(f"line {i} " + ("Loss" if i % 1000 == 7 else ""))
        print("café", flush=True)
        while not os.path.exists("go"):
            time.sleep(0.05)
        """
    run = submit(workspace, source, code)
    client = workspace._client

    def pages(limit: int) -> list[str]:
        found, after = [], 0
        while True:
            reply = workspace._call(client.logs.read(run.id, after=after, limit=limit, streams=["stdout"]))
            found += [one.line.data.decode() for one in reply.lines]
            assert len(reply.lines) <= limit
            if not reply.next:
                return found
            after = reply.next

    until(lambda: "café" in pages(1000), "all is printed")
    for alive in (True, False):  # then archived: the same answers
        assert pages(700) == [*(f"line {i} " + ("Loss" if i % 1000 == 7 else "") for i in range(2500)), "café"]
        newest = workspace._call(client.logs.read(run.id, limit=2, newest=True, streams=["stdout"])).lines
        assert [one.line.data.decode() for one in newest] == ["line 2499 ", "café"]
        earlier = workspace._call(client.logs.read(run.id, limit=2, newest=True, streams=["stdout"], before=newest[0].cursor)).lines
        assert [one.line.data.decode() for one in earlier] == ["line 2497 ", "line 2498 "]
        begun = earlier[0].line.time.ToMicroseconds() / 1e6
        since = workspace._call(client.logs.read(run.id, limit=10_000, streams=["stdout"], since=begun)).lines
        assert since[-1] == newest[-1] and since[0].line.time == earlier[0].line.time
        number = next(n for n, one in enumerate(tail(run), 1) if one.cursor == newest[0].cursor)
        assert workspace._call(client.logs.read(run.id, limit=1, line=number)).lines == newest[:1]
        shown = stack.cli("run", "logs", run.id, "--stream", "stdout", "--since", "1h").stdout
        assert shown.splitlines() == pages(1000)
        assert stack.cli("run", "logs", run.id, "--newest", "1", *(() if alive else ("--follow",)), "--stream", "stdout").stdout == "café\n"
        hits = workspace._call(client.logs.search(run.id, "loss", ignore_case=True))
        assert [one.line.data.decode().split()[1] for one in hits.lines] == ["7", "1007", "2007"] and not hits.next
        assert not workspace._call(client.logs.search(run.id, "loss")).lines
        assert workspace._call(client.logs.search(run.id, "é")).lines
        first = workspace._call(client.logs.search(run.id, "Loss", limit=2))
        rest = workspace._call(client.logs.search(run.id, "Loss", after=first.next))
        assert [one.cursor for one in first.lines] + [one.cursor for one in rest.lines] == [one.cursor for one in hits.lines]
        if alive:
            let_go(stack, run)
        finished(run)
    for bad in (lambda: client.logs.read(run.id, limit=10**6), lambda: client.logs.search(run.id, "")):
        with pytest.raises(AlvearyError, match="1 to"):
            workspace._call(bad())
    with pytest.raises(AlvearyError, match="has 25[0-9]+ lines now"):
        workspace._call(client.logs.read(run.id, line=9999))
    with pytest.raises(AlvearyError, match="not together"):
        workspace._call(client.logs.read(run.id, line=1, since=0.0))
    for bad_time, why in (("2222-11-11", "in the future"), ("yesterday", "is no time")):
        refused = stack.cli("run", "logs", run.id, "--since", bad_time, check=False)
        assert refused.returncode == 2 and why in refused.stderr
