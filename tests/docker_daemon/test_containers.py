"""Runs in containers: what they may, what they may not, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import docker
import pytest
from support import Embedded, finished, let_go, lines, submit, tail, until, wait_for_state

from alveary import AmlCompute, ComputeTarget, Dataset, DockerConfiguration, Environment, Workspace

HERE = Environment("here", user_managed=True)


def left(daemon: docker.APIClient, run_id: str) -> list[str]:
    """Containers of a run, ended ones too."""
    found = daemon.containers(all=True, filters={"label": "org.alveary.run"})
    return [c["Id"] for c in found if c["Labels"]["org.alveary.run"].startswith(run_id)]


def test_a_container_has_no_privileges(workspace: Workspace, source: Path, daemon: docker.APIClient) -> None:
    run = submit(workspace, source, """
        import json, os, socket
        status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
        seen = {"uid": os.getuid(), "caps": status["CapEff"].strip(), "bound": status["CapBnd"].strip(), "nnp": status["NoNewPrivs"].strip(),
                "docker": [p for p in ("/var/run/docker.sock", "/run/docker.sock") if os.path.exists(p)], "write": []}
        for path in ("/etc/x", "/opt/x", "/alveary/x", "/alveary/lib/x", "/x"):
            try:
                open(path, "w"); seen["write"].append(path)
            except OSError:
                pass
        open("/tmp/x", "w").write("fine"); open("here", "w").write("fine")
        json.dump(seen, open("outputs/seen.json", "w"))
        """)  # fmt: skip
    finished(run)
    seen = json.loads(Path(run.download_file("outputs/seen.json", str(source / "seen.json"))).read_text())
    assert seen["uid"] != 0 and int(seen["caps"], 16) == int(seen["bound"], 16) == 0 and seen["nnp"] == "1"
    assert seen["docker"] == [] and seen["write"] == []
    assert left(daemon, run.id) == []


def test_a_multi_tenant_target_has_no_network_but_metrics_still_arrive(workspace: Workspace, source: Path) -> None:
    name = f"tenants-{os.getpid()}"
    ComputeTarget.create(workspace, name, AmlCompute.provisioning_configuration(max_nodes=1, multi_tenant=True, cpus=1))
    code = """
        import socket
        from alveary import Run
        print(sorted(name for _, name in socket.if_nameindex()))
        try:
            socket.create_connection(("172.17.0.1", 22), timeout=2); print("connected")
        except OSError as error:
            print(type(error).__name__, error.errno)
        Run.get_context().log("x", 7)
        """
    closed = submit(workspace, source, code, compute_target=name)
    finished(closed)
    assert lines(closed)[0] == "['lo']" and "connected" not in lines(closed)
    assert closed.get_metrics() == {"x": 7.0}
    openly = submit(workspace, source, code)
    finished(openly)
    assert "eth0" in lines(openly)[0]


def test_a_run_cannot_reach_another_run(workspace: Workspace, source: Path, daemon: docker.APIClient) -> None:
    server = submit(workspace, source, """
        import socket, os, time
        listening = socket.create_server(("0.0.0.0", 5555))
        listening.settimeout(0.2)
        print("ready", flush=True)
        while not os.path.exists("go"):
            try:
                listening.accept(); print("somebody came", flush=True)
            except TimeoutError:
                pass
        """, cpus=0.5)  # fmt: skip
    until(lambda: "ready" in lines(server), "it listens")
    (container,) = left(daemon, server.id)
    networks = daemon.inspect_container(container)["NetworkSettings"]["Networks"]
    assert list(networks) == ["alveary-runs"]
    address = networks["alveary-runs"]["IPAddress"]
    other = submit(workspace, source, f"""
        import socket
        try:
            socket.create_connection(({address!r}, 5555), timeout=3); print("reached")
        except OSError as error:
            print("not reached")
        """, cpus=0.5)  # fmt: skip
    finished(other)
    assert lines(other) == ["not reached"]
    server.cancel()
    finished(server, "Canceled")
    assert "somebody came" not in lines(server)


def test_a_container_cannot_make_the_platform_read_what_is_the_nodes(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, """
        import json, os, socket
        os.symlink("/etc/shadow", "outputs/shadow"); os.symlink("/etc", "outputs/folder"); os.symlink("/etc/hostname", "logs/stolen.txt")
        os.symlink("inside.txt", "outputs/fine"); open("outputs/inside.txt", "w").write("mine")
        os.mkfifo("outputs/pipe")
        line = socket.socket(socket.AF_UNIX); line.connect(os.environ["ALVEARY_SOCKET"]); reader = line.makefile()
        def ask(**message):
            line.sendall(json.dumps({"id": 1, **message}).encode() + b"\\n"); return json.loads(reader.readline())
        os.symlink("/etc/shadow", "link")
        for path in ("link", "/alveary/work/link", "/etc/shadow", "../../../../etc/shadow", "/proc/1/environ", "/alveary/work/../../etc/shadow"):
            answer = ask(op="upload", name="outputs/stolen", path=path)
            assert "error" in answer, (path, answer)
        print(ask(op="upload", name="outputs/given", path="/alveary/work/outputs/inside.txt")["ok"]["size"])
        """)  # fmt: skip
    finished(run)
    assert lines(run) == ["4"]
    names = run.get_file_names()
    assert {"outputs/inside.txt", "outputs/fine", "outputs/given"} <= set(names)
    assert not [n for n in names if "shadow" in n or "stolen" in n or "pipe" in n]
    told = "\n".join(lines(run, "system"))
    assert "outputs/shadow: not stored" in told
    assert not [one for one in tail(run, streams=("logs/*",)) if one.line.data]


def test_memory_shm_and_cpus_are_limited_and_an_oom_kill_is_told_apart(workspace: Workspace, source: Path) -> None:
    greedy = submit(workspace, source, "x = bytearray(600 << 20); print(len(x))", memory_gb=0.25)
    details = finished(greedy, "Failed")
    assert details["exit"]["reason"] == "out_of_memory" and "256 MiB" in details["reason"]
    shm = submit(
        workspace, source, "import os; s = os.statvfs('/dev/shm'); print(s.f_blocks * s.f_frsize >> 20)",
        docker_runtime_config=DockerConfiguration(shm_size="192m"),
    )  # fmt: skip
    finished(shm)
    assert lines(shm) == ["192"]


def test_shared_memory_is_enough_by_default_and_named_where_it_was_not(workspace: Workspace, source: Path) -> None:
    code = """
        import mmap, os, sys
        file = os.open("/dev/shm/batch", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, 300 << 20)
        batch = mmap.mmap(file, 0)
        for at in range(0, len(batch), 4096):
            batch[at] = 1
        print(len(batch) >> 20)
        """
    enough = submit(workspace, source, code, memory_gb=0.5)
    finished(enough)
    assert lines(enough) == ["300"]
    details = finished(submit(workspace, source, code, docker_runtime_config=DockerConfiguration(shm_size="64m")), "Failed")
    assert details["exit"]["signal"] == 7 and "/dev/shm had 0.0625 GiB: ask for more with shm_size" in details["reason"]


def test_exit_codes_are_exact(workspace: Workspace, source: Path) -> None:
    for code, exit_code, number in (
        ("raise SystemExit(137)", 137, None),
        ("raise SystemExit(255)", 255, None),
        ("import os; os.kill(os.getpid(), 9)", None, 9),
        ("import os; os.kill(os.getpid(), 11)", None, 11),
    ):
        found = finished(submit(workspace, source, code), "Failed")["exit"]
        assert (found.get("exit_code"), found.get("signal")) == (exit_code, number), code


def test_inputs_are_read_only_and_commands_come_from_the_image(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("A")
    dataset = Dataset.upload(workspace, str(tmp_path / "data"), f"data-{os.getpid()}")
    run = submit(workspace, source, """
        import os, sys
        print(open(os.path.join(sys.argv[1], "a.txt")).read(), sys.argv[1])
        try:
            open(os.path.join(sys.argv[1], "b.txt"), "w")
        except OSError as error:
            print(error.strerror)
        """, dataset)  # fmt: skip
    finished(run)
    assert lines(run)[0].startswith("A /alveary/inputs/") and lines(run)[1] in ("Read-only file system", "Permission denied")


@pytest.mark.parametrize("how", ["success", "failure", "cancel", "timeout"])
def test_nothing_is_left_of_a_container(workspace: Workspace, source: Path, daemon: docker.APIClient, how: str) -> None:
    code = {
        "success": "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)",
        "failure": "raise SystemExit(3)",
        "cancel": "import time; print('ready', flush=True); time.sleep(1000)",
        "timeout": "import time; time.sleep(1000)",
    }[how]
    volumes = {v["Name"] for v in daemon.volumes()["Volumes"] or []}
    run = submit(workspace, source, code, max_run_duration_seconds=2 if how == "timeout" else None, grace_seconds=1)
    if how == "cancel":
        until(lambda: "ready" in lines(run), "it runs")
        assert len(left(daemon, run.id)) == 1
        run.cancel()
    finished(run, {"success": "Completed", "cancel": "Canceled"}.get(how, "Failed"))
    assert left(daemon, run.id) == []
    assert {v["Name"] for v in daemon.volumes()["Volumes"] or []} <= volumes


def test_a_killed_trainer_takes_its_containers_along(
    containers: Embedded, workspace: Workspace, source: Path, daemon: docker.APIClient
) -> None:
    code = """
        import os, time
        print("ready", flush=True)
        while not os.path.exists("go"): time.sleep(0.05)
        open("outputs/x", "w").write("x")
        """
    run = submit(workspace, source, code)
    until(lambda: "ready" in lines(run), "it runs")
    (container,) = left(daemon, run.id)
    trainer = next(p for p in containers.trainer_pids() if is_node(p, "local-0"))
    os.kill(trainer, signal.SIGKILL)
    until(lambda: container not in left(daemon, run.id) or not daemon.inspect_container(container)["State"]["Running"], "it ends")
    until(lambda: run.get_details()["attempt"] == 2 and run.get_status() == "Running", "the second attempt runs")
    assert container not in left(daemon, run.id)
    let_go(containers, run)
    finished(run)
    assert "outputs/x" in run.get_file_names() and left(daemon, run.id) == []


def is_node(pid: int, node: str) -> bool:
    return f"ALVEARY_NODE={node}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_slow_reader_slows_the_script_and_loses_nothing(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "for i in range(200000): print(i, 'x' * 40)")
    finished(run)
    assert [int(x.line.data.split()[0]) for x in tail(run, streams=("stdout",))] == list(range(200000))


def test_what_the_run_waits_for_is_said_while_an_image_is_built(workspace: Workspace, source: Path) -> None:
    environment = Environment("slow", dockerfile=f"FROM python:3.11-slim-bookworm\nRUN sleep 3 && echo step {os.getpid()}\n")
    run = submit(workspace, source, "print('in')", environment=environment)
    wait_for_state(run, "Preparing")
    finished(run)
    assert f"step {os.getpid()}" in lines(run, "prepare") and lines(run) == ["in"]
