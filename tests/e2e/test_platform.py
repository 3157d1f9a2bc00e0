"""The platform from outside: raw gRPC, environments, events, CLI, the stack itself."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import urllib3
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from support import Embedded, embedded, finished, halt, launch, lines, submit, until

from alveary import AlvearyError, Environment, Experiment, Run, Workspace
from alveary.local.layout import Layout, Ports
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc
from alveary_core.uv import pip_settings

SERVICES = {
    "alveary.runs.v1.RunService", "alveary.runs.v1.ExperimentService", "alveary.runs.v1.WorkspaceService",
    "alveary.runs.v1.EventService", "alveary.images.v1.ImageService", "alveary.scheduler.v1.ComputeService",
    "alveary.scheduler.v1.NodeService", "alveary.scheduler.v1.QueueService", "alveary.logs.v1.LogService",
    "alveary.registry.v1.ModelService", "alveary.registry.v1.DatasetService",
}  # fmt: skip


def raw(stack: Embedded) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
    config = json.loads(stack.config.read_text())
    return grpc.insecure_channel(config["endpoint"]), (("authorization", f"Bearer {config['token']}"),)


def test_a_generic_client_explores_it_without_proto_files(stack: Embedded) -> None:
    channel, _ = raw(stack)
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) >= SERVICES
    pool = descriptor_pool.DescriptorPool(database)
    assert "SubmitRun" in pool.FindServiceByName("alveary.runs.v1.RunService").methods_by_name
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING


def test_calls_without_a_good_token_are_refused(stack: Embedded) -> None:
    channel, good = raw(stack)
    stub = runs_pb2_grpc.RunServiceStub(channel)
    for metadata in (
        (),
        (("authorization", "Bearer x"),),
        (("authorization", good[0][1][:-4] + "AAAA"),),
        (("authorization", "Basic eA=="),),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListRuns(pb.ListRunsRequest(), metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.WatchRun(pb.WatchRunRequest(run_id="x"), metadata=metadata))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


async def test_a_server_without_a_secret_takes_no_token() -> None:
    from alveary_contracts.trainer.v1 import trainer_pb2, trainer_pb2_grpc
    from alveary_core.auth import Principal, issue
    from alveary_core.server import Server

    server = Server("")
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer_pb2_grpc.TrainerServiceServicer(), server.server)
    port = await server.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for token in ("", "x", issue("any-known-text-of-thirty-two-bytes", Principal("me", "default", "owner"))):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await trainer_pb2_grpc.TrainerServiceStub(channel).GetNode(
                        trainer_pb2.GetNodeRequest(), metadata=(("authorization", f"Bearer {token}"),)
                    )
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        await server.stop(0)


def test_errors_carry_details_that_a_program_can_act_on(stack: Embedded) -> None:
    channel, metadata = raw(stack)
    stub = runs_pb2_grpc.RunServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.SubmitRun(pb.SubmitRunRequest(spec=c.RunSpec(priority=9999)), metadata=metadata)
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert {"spec.entry_script", "spec.snapshot", "spec.compute_target", "spec.priority"} <= {v.field for v in bad.field_violations}
    evil = c.Manifest(files=[c.FileEntry(path="../../etc/passwd", sha256="0" * 64)])
    with pytest.raises(grpc.RpcError) as caught:
        stub.CommitSnapshot(pb.CommitSnapshotRequest(manifest=evil), metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_submission_is_idempotent_by_its_key(stack: Embedded, workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "print()")
    spec = c.RunSpec(
        entry_script="train.py", snapshot=run.get_snapshot_id(), compute_target="local", environment=c.Environment(user_managed=True)
    )
    channel, metadata = raw(stack)
    stub = runs_pb2_grpc.RunServiceStub(channel)
    request = pb.SubmitRunRequest(spec=spec, idempotency_key=f"once-{os.getpid()}")
    ids = {f.result().run.id for f in [stub.SubmitRun.future(request, metadata=metadata) for _ in range(8)]}
    assert len(ids) == 1
    reply = stub.GetRun(
        pb.GetRunRequest(run_id=ids.pop(), min_sequence=stub.SubmitRun(request, metadata=metadata).sequence), metadata=metadata
    )
    assert reply.run.spec.max_attempts == 3


def test_packages_are_resolved_locked_and_installed_even_from_source(workspace: Workspace, source: Path) -> None:
    # docopt has never had a wheel: it is built once, and the wheel is kept.
    environment = Environment("packages", ["docopt==0.6.2", "six"])
    run = submit(workspace, source, "import docopt, six; print(docopt.__version__, six.__name__)", environment=environment)
    finished(run)
    assert lines(run) == ["0.6.2 six"]
    prepare = "\n".join(lines(run, "prepare"))
    assert "building a wheel of docopt 0.6.2" in prepare and "six==" in prepare
    again = submit(workspace, source, "print('cached')", environment=environment.clone("another name"))
    finished(again)
    assert lines(again, "prepare") == []


def test_a_requirement_that_cannot_be_met_fails_with_the_resolvers_words(workspace: Workspace, source: Path) -> None:
    environment = Environment("bad", ["six==99.99"])
    details = finished(submit(workspace, source, "print()", environment=environment), "Failed")
    assert "six==99.99" in details["reason"] and details["exit"]["reason"] == "build_failed"


def test_a_canceled_build_stops_at_once_with_all_its_processes(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    root = tmp_path / "endless-1.0"
    root.mkdir()
    (root / "setup.py").write_text(
        "import os, subprocess, sys, time\nfrom setuptools import setup\nif 'bdist_wheel' in sys.argv:\n"
        f"    child = subprocess.Popen(['sleep', '1000'])\n    open({str(mark)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "    time.sleep(1000)\nsetup(name='endless', version='1.0', py_modules=[])\n"
    )
    with tarfile.open(tmp_path / "endless-1.0.tar.gz", "w:gz") as packed:
        packed.add(root, "endless-1.0")
    environment = Environment("endless", [f"endless @ file://{tmp_path}/endless-1.0.tar.gz"])
    runs = [submit(workspace, source, "print()", environment=environment) for _ in range(2)]
    until(lambda: mark.exists() and len(mark.read_text().split()) == 2, "the build is under way")
    pids = [int(p) for p in mark.read_text().split()]
    runs[0].cancel()
    finished(runs[0], "Canceled")
    assert all(psutil.pid_exists(p) for p in pids), "the other run still waits for it"
    runs[1].cancel()
    finished(runs[1], "Canceled")
    until(lambda: not any(psutil.pid_exists(p) for p in pids), "the build's processes are gone")


def test_pips_find_links_are_honoured(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    name = "alveary_local_only"
    with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 42\n")
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", f"{name}.py,,\n{name}-1.0.dist-info/METADATA,,\n{name}-1.0.dist-info/WHEEL,,\n")
    monkeypatch.setenv("PIP_FIND_LINKS", f"{pip_settings().get('find-links', '')} {wheels}".strip())
    with embedded(tmp_path / "stack") as stack:
        run = submit(stack.workspace(), source, f"import {name}; print({name}.VALUE)", environment=Environment("links", [name]))
        finished(run)
        assert lines(run) == ["42"]


def test_a_second_scheduler_stops_loudly_and_harms_nothing(stack: Embedded, workspace: Workspace, source: Path, tmp_path: Path) -> None:
    layout = Layout.open(stack.state_dir, None)
    env = os.environ | layout.environment("scheduler") | {"ALVEARY_STATE_DIR": str(tmp_path), "ALVEARY_LISTEN": "127.0.0.1:0"}
    with (tmp_path / "log").open("wb") as log:
        second = subprocess.Popen([sys.executable, "-m", "alveary_scheduler"], env=env, stdout=log, stderr=log)
    try:
        assert second.wait(60) != 0
        assert "another scheduler is active" in (tmp_path / "log").read_text()
        finished(submit(workspace, source, "print()"))
    finally:
        second.kill()


def test_metrics_are_served_for_prometheus(tmp_path: Path, source: Path) -> None:
    port = Ports.choose(0).grpc
    stack = launch(tmp_path / "stack", metrics_port=port)
    try:
        finished(submit(stack.workspace(), source, "print()"))
        text = urllib3.request("GET", f"http://127.0.0.1:{port}/metrics").data.decode()
        assert 'alveary_events_appended_total{type="run.submitted"} 1.0' in text
        assert 'alveary_grpc_requests_total{code="OK",method="SubmitRun"' in text
    finally:
        halt(stack)


def test_events_are_durable_by_name_and_come_again_until_acknowledged(workspace: Workspace, source: Path) -> None:
    name = f"auto-{os.getpid()}"
    events = workspace.events
    first = submit(workspace, source, "print()", experiment=name)
    finished(first)
    seen = []
    for event in events.subscribe("run.completed", durable=name, from_sequence=1, timeout=300):
        seen.append(event)
        if event.subject == first.id:
            event.ack()
            break
    assert seen[-1].data["exit"]["reason"] == "exited"
    second = submit(workspace, source, "print()", experiment=name)
    finished(second)
    stream = events.subscribe("run.completed", durable=name, timeout=300)
    found = [next(e for e in stream if e.subject == second.id)]
    stream.close()  # type: ignore[attr-defined]
    assert found[0].sequence > seen[-1].sequence
    with pytest.raises(AlvearyError, match="use '<aggregate>.<event>'"):
        next(iter(events.subscribe("nonsense")))


def test_the_log_speaks_to_a_plain_nats_client(stack: Embedded, workspace: Workspace, source: Path) -> None:
    import asyncio

    import nats

    config = json.loads(stack.config.read_text())
    run = submit(workspace, source, "print()")
    finished(run)

    async def read() -> list[str]:
        connection = await nats.connect(config["nats_url"], user=config["nats_user"], password=config["nats_password"])
        subscription = await connection.jetstream().subscribe(f"alveary.default.run.{run.id}.*", ordered_consumer=True)
        found: list[str] = []
        while not found or not found[-1].endswith("completed.v1"):
            message = await subscription.next_msg(timeout=120)
            assert message.headers is not None
            json.loads(message.data)
            found.append(message.headers["ce-type"])
        with pytest.raises(Exception, match="timeout|no responders|permissions"):
            await connection.jetstream().publish(f"alveary.default.run.{run.id}.archived", b"{}", timeout=1)
        await connection.close()
        return found

    types = asyncio.run(read())
    assert types[0] == "alveary.run.submitted.v1" and types[-1] == "alveary.run.completed.v1"


def test_the_command_line_does_the_main_job(stack: Embedded, source: Path, tmp_path: Path) -> None:
    (source / "train.py").write_text(
        "import sys; from alveary import Run; Run.get_context().log('x', 1); print('hello'); open('outputs/a.txt', 'w').write('A'); print(sys.argv[1:], file=sys.stderr)"
    )
    submit = ("run", "submit", "-s", str(source), "--python", sys.executable)
    done = stack.cli(*submit, "--tag", "k=v", "-f", "train.py", "--epochs", "3", "-x", "--help", "--", "--tag")
    run_id = done.stdout.split()[0]
    assert "['--epochs', '3', '-x', '--help', '--', '--tag']" in done.stdout + done.stderr
    assert "hello" in done.stdout and "[Completed]" in done.stdout
    assert json.loads(stack.cli("run", "show", run_id, "--json").stdout)["tags"] == {"k": "v"}
    assert run_id in stack.cli("run", "list").stdout
    assert "hello" in stack.cli("run", "logs", run_id, "--stream", "stdout").stdout
    assert stack.cli("run", "logs", run_id, "--grep", "HELL", "-i", "--stream", "stdout").stdout == "hello\n"
    assert stack.cli("run", "logs", run_id, "--newest", "1", "--stream", "stdout").stdout == "hello\n"
    short = run_id[:20].lower()
    assert json.loads(stack.cli("run", "show", short, "--json").stdout)["id"] == run_id
    assert stack.workspace().get_run(short).id == Run(Experiment(stack.workspace(), "default"), short).id == run_id
    assert "hello" in stack.cli("run", "logs", short, "--stream", "stdout").stdout
    assert stack.cli("run", "metrics", short).stdout == "x\t1\t\t1.0\t1.0\t1.0\n"
    assert json.loads(stack.cli("run", "files", short, "--json").stdout)[0]["path"] == "outputs/a.txt"
    stack.cli("run", "download", short, "--to", str(tmp_path / "out"))
    assert (tmp_path / "out" / "outputs" / "a.txt").read_text() == "A"
    model = stack.cli("model", "register", f"cli-{os.getpid()}", "outputs", "--run", short).stdout.strip()
    assert json.loads(stack.cli("model", "show", model, "--json").stdout)["lineage"]["run_id"] == run_id
    assert any(m["name"] == model.split(":")[0] for m in json.loads(stack.cli("model", "list", "--json").stdout))
    assert run_id in stack.cli("model", "show", model).stdout and model in stack.cli("run", "show", short).stdout
    stack.cli("dataset", "upload", f"cli-{os.getpid()}", str(tmp_path / "out"))
    assert f"cli-{os.getpid()}:1" in stack.cli("dataset", "list").stdout
    assert "local" in stack.cli("compute", "list").stdout
    assert "running at" in stack.cli("status").stdout
    tail = stack.cli("events", "tail", "run.completed", "--from-sequence", "1", "--timeout", "2").stdout
    assert any(json.loads(line)["subject"] == run_id for line in tail.splitlines())
    (source / "train.py").write_text("raise SystemExit(9)")
    assert stack.cli("run", "submit", "-s", str(source), "--python", sys.executable, "-f", "--", "train.py", check=False).returncode == 3
    refused = stack.cli("run", "show", "nothing", check=False)
    assert refused.returncode == 1 and "there is no run" in refused.stderr and "Traceback" not in refused.stderr


def test_a_directory_has_one_stack_and_its_secrets_are_private(stack: Embedded) -> None:
    for name in ("config.json", "stack.json", "nats-server.conf"):
        assert stat.S_IMODE((stack.state_dir / name).stat().st_mode) == 0o600
    second = stack.cli("up", "--state-dir", str(stack.state_dir), check=False)
    assert second.returncode == 1 and "owns" in second.stderr
    port = json.loads((stack.state_dir / "stack.json").read_text())["ports"]["grpc"]
    taken = stack.cli("up", "--state-dir", str(stack.state_dir / "other"), "--port", str(port), check=False)
    assert taken.returncode == 1
    assert f"{port} (grpc)" in taken.stderr


def test_no_platform_is_said_plainly(tmp_path: Path) -> None:
    env = os.environ | {"ALVEARY_HOME": str(tmp_path)}
    env.pop("ALVEARY_CONFIG", None)
    for command in (["status"], ["down"], ["run", "list"]):
        done = subprocess.run(
            [sys.executable, "-m", "alveary.cli", *command], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.returncode == 5, done.stderr


def test_nothing_of_a_secret_is_in_logs_or_events(stack: Embedded) -> None:
    known = json.loads((stack.state_dir / "stack.json").read_text())["secrets"]
    hidden = [known[name] for name in known if name != "s3_access"] + [json.loads(stack.config.read_text())["token"]]
    logs = [*(stack.state_dir / "logs").iterdir(), *(stack.state_dir / "services" / "nodes").glob("*.log")]
    assert logs
    for file in logs:
        text = file.read_text(errors="replace")
        assert not [s[:6] for s in hidden if s in text], file
    blocks = list((stack.state_dir / "nats").rglob("*.blk"))
    assert blocks
    for file in blocks:
        data = file.read_bytes()
        assert not [s[:6] for s in hidden if s.encode() in data], file


def test_two_hundred_runs_at_once_all_finish(workspace: Workspace, source: Path) -> None:
    name = f"many-{os.getpid()}"
    first = submit(workspace, source, "print('done')", experiment=name)
    finished(first)
    spec = c.RunSpec(experiment=name, entry_script="train.py", snapshot=first.get_snapshot_id(), compute_target="local",
                     environment=c.Environment(user_managed=True), resources=c.Resources(cpus=0.25))  # fmt: skip
    client = workspace._client

    async def all_of_them() -> list[str]:
        import asyncio

        return [r.id for r in await asyncio.gather(*(client.runs.submit(spec, None) for _ in range(200)))]

    ids = workspace._call(all_of_them())
    assert len(set(ids)) == 200
    workspace.get_run(ids[-1]).cancel()
    assert len(workspace._call(client.runs.list(f'experiment = "{name}"'))) == 201

    def left() -> int:
        runs = workspace._call(client.runs.list(f'experiment = "{name}"'))
        return sum(r.state not in (c.RUN_STATE_COMPLETED, c.RUN_STATE_CANCELED) for r in runs)

    until(lambda: left() == 0, "all have finished", 900)
    for run_id in ids[:3]:
        assert lines(workspace.get_run(run_id)) == ["done"]
