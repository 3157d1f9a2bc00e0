"""The docker-compose stack, as a user starts it; stand-ins for the servers' images, everything else is what users get."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import nats
import nats.errors
import pytest
import urllib3
from support import finished, lines, recorded, submit, tail, until

from alveary import Dataset, Environment, Model, Run, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary.local.layout import Ports

ROOT = Path(__file__).parents[2]
HERE = Environment("compose", user_managed=True)
SLOW = """
    import time
    from alveary import Run
    run = Run.get_context()
    for i in range(60):
        print(i, flush=True); run.log("i", i); time.sleep(0.1)
    open("outputs/done.txt", "w").write("done")
    """


@dataclass
class Compose:
    """A stack in a folder of its own."""

    folder: Path
    environment: dict[str, str]
    project: str
    api: docker.APIClient
    # Short: sockets lie below it.
    trainers: Path

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900)
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done

    def up(self, *scale: str) -> None:
        self.run("tools/compose.sh", "up", *(a for s in scale for a in ("--scale", s)))

    @property
    def secrets(self) -> dict[str, str]:
        pairs = (line.split("=", 1) for line in (self.folder / ".env").read_text().splitlines() if not line.startswith("#"))
        return dict(pairs)  # type: ignore[arg-type]

    def workspace(self) -> Workspace:
        return Workspace.from_config(self.folder / "deploy/secrets/config.json")

    def containers(self, service: str = "") -> list[dict[str, object]]:
        labels = [f"com.docker.compose.project={self.project}", *([f"com.docker.compose.service={service}"] if service else [])]
        return list(self.api.containers(filters={"label": labels}))

    def crash(self, service: str) -> None:
        """kill -9 of one container's first process; its restart policy brings it back."""
        container = str(self.containers(service)[0]["Id"])
        before = self.api.inspect_container(container)["State"]["StartedAt"]
        os.kill(self.api.inspect_container(container)["State"]["Pid"], 9)

        def back() -> bool:
            state = self.api.inspect_container(container)["State"]
            return bool(state["Running"]) and state["StartedAt"] != before

        until(back, f"{service} is back")


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory, daemon: docker.APIClient) -> Iterator[Compose]:
    folder = tmp_path_factory.mktemp("compose") / f"hive{os.getpid()}"
    folder.mkdir()
    for name in ("docker-compose.yml", "requirements.txt", ".dockerignore", "deploy", "libs", "services", "tools"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "secrets", "*.egg-info")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    ports = Ports.choose(0)
    (folder / ".env").write_text(
        f"DOOR_PORT={ports.grpc}\nNATS_PORT={ports.nats}\nREGISTRY_PORT={ports.master}\nPROMETHEUS_PORT={ports.volume}\nLEASE_SECONDS=6\nNODE_CPUS=1\nALVEARY_VERSION=t{os.getpid()}\n"
    )
    environment = os.environ | {"COMPOSE_FILES": "deploy/standin/docker-compose.yml"}
    stack = Compose(folder, environment, folder.name, daemon, Path(f"/tmp/alveary-test-{os.getpid()}"))
    stack.run(str(ROOT / ".venv/bin/python"), "tools/compose_init.py", "--trainers", str(stack.trainers))
    try:
        stack.up("runs=2", "logs=2", "images=2", "trainer=3")
        yield stack
    finally:
        if os.environ.get("ALVEARY_TEST_KEEP") is None:
            stack.run("tools/compose.sh", "down", "-v", check=False)
            left = [*stack.containers(), *daemon.volumes(filters={"name": f"{stack.project}_"})["Volumes"]]
            shutil.rmtree(stack.trainers)
            for image in daemon.images(filters={"reference": f"alveary/*:t{os.getpid()}"}):
                daemon.remove_image(image["Id"], force=True)
            assert left == []


@pytest.fixture(scope="module")
def workspace(compose: Compose) -> Workspace:
    return compose.workspace()


def test_secrets_are_private_random_and_nowhere_else(compose: Compose) -> None:
    for name in (".env", "deploy/secrets/config.json", "deploy/secrets/nats.conf", "deploy/secrets/tls.key", "deploy/secrets/s3.json"):
        assert (compose.folder / name).stat().st_mode & 0o077 == 0, name
    hidden = [v for k, v in compose.secrets.items() if any(w in k for w in ("NATS_", "SECRET", "PASSWORD", "TOKEN")) and len(v) > 16]
    assert len(hidden) == len(set(hidden)) > 15
    for one in compose.containers():
        log = compose.api.logs(one["Id"]).decode(errors="replace")
        assert not [v[:6] for v in hidden if v in log], one["Names"]
        history = json.dumps(compose.api.history(str(one["ImageID"])))
        assert not [v[:6] for v in hidden if v in history], one["Names"]
    # Written again it stays what it is.
    before = compose.secrets
    compose.run(str(ROOT / ".venv/bin/python"), "tools/compose_init.py", "--trainers", str(compose.trainers))
    assert compose.secrets == before


def test_nobody_is_root_and_images_hold_no_torch(compose: Compose) -> None:
    for service in ("runs", "images", "scheduler", "logs", "registry", "archiver", "trainer"):
        container = str(compose.containers(service)[0]["Id"])
        assert compose.api.inspect_container(container)["Config"]["User"] == "10001:10001", service
        probe = compose.api.exec_create(
            container, ["python", "-c", "import importlib.util as u, os; print(os.getuid(), u.find_spec('torch'))"]
        )
        assert compose.api.exec_start(probe["Id"]).decode().split() == ["10001", "None"], service


def test_images_of_services_are_small_and_have_no_shell(compose: Compose) -> None:
    for service in ("runs", "images", "scheduler", "logs", "registry", "archiver"):
        size = compose.api.inspect_image(f"alveary/{service}:t{os.getpid()}")["Size"]
        assert size < 250e6, f"{service}: {size / 1e6:.0f} MB"
    done = compose.run("docker", "run", "--rm", "--network", "none", f"alveary/runs:t{os.getpid()}", "sh", "-c", "true", check=False)
    assert done.returncode == 127, done


def test_two_replicas_of_the_builder_build_each_image_once(compose: Compose, workspace: Workspace, source: Path) -> None:
    assert len(compose.containers("images")) == 2
    environments = [Environment(f"once-{n}", ["six"], environment_variables={"N": str(n)}) for n in range(3)]
    runs = [submit(workspace, source, "import six, os; print(os.environ['N'])", environment=e) for _ in range(2) for e in environments]
    for run in runs:
        finished(run)
    told = recorded(*runs)
    for environment in environments:
        # One builder at a time: another build_started would be a renewal of the same one's lease, or a second builder.
        started = [e.data["builder"] for e in told if e.subject == environment.digest and e.type == "image.build_started"]
        ready = [e for e in told if e.subject == environment.digest and e.type == "image.ready"]
        assert len(set(started)) == 1 and len(ready) == 1


def test_the_main_job_through_the_door(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("A" * 100_000)
    dataset = Dataset.upload(workspace, str(tmp_path / "data"), "letters")
    run = submit(
        workspace, source, """
        import os, sys
        from alveary import Run
        run = Run.get_context()
        run.log("size", len(open(os.path.join(sys.argv[1], "a.txt")).read()))
        run.tag("in", "container")
        print("hello", os.getuid())
        open("outputs/model.txt", "w").write("weights")
        run.register_model("from-inside", "outputs/model.txt")
        """, dataset, environment=Environment("main", ["six"]),
    )  # fmt: skip
    finished(run)
    assert lines(run) == ["hello 10001"] and run.get_metrics() == {"size": 100_000.0} and run.get_tags()["in"] == "container"
    assert Path(run.download_file("outputs/model.txt", str(tmp_path / "model.txt"))).read_text() == "weights"
    model = run.register_model("letters", "outputs/")
    assert Model(workspace, "letters").version == model.version == 1 and Model(workspace, "from-inside").version == 1
    ends = [e for e in recorded(run) if (e.type, e.subject) == ("run.completed", run.id)]
    assert len(ends) == 1


def whole(run: Run) -> None:
    details = finished(run)
    attempt = details["attempt"]
    until(lambda: len([x for x in tail(run, streams=("stdout",)) if x.line.attempt == attempt]) == 60, "all lines are there")
    assert [int(x.line.data) for x in tail(run, streams=("stdout",)) if x.line.attempt == attempt] == list(range(60))
    assert "outputs/done.txt" in run.get_file_names()


@pytest.mark.parametrize(
    "victim", ["runs", "images", "scheduler", "logs", "registry", "archiver", "nats", "minio", "image-registry", "door", "trainer"]
)
def test_a_run_goes_through_with_any_one_container_killed(compose: Compose, workspace: Workspace, source: Path, victim: str) -> None:
    run = submit(workspace, source, SLOW, environment=HERE)
    until(lambda: "5" in lines(run), "it runs")
    compose.crash(victim)
    whole(run)
    assert len([e for e in recorded(run) if (e.type, e.subject) == ("run.completed", run.id)]) == 1


def test_a_machine_outside_joins_with_a_token(compose: Compose, workspace: Workspace, source: Path, tmp_path: Path) -> None:
    """A trainer that is no container of the stack: it has the door, the message bus' TLS, and its docker daemon."""
    cli = [str(ROOT / ".venv/bin/python"), "-m", "alveary.cli"]
    ComputeTarget.create(workspace, "far", AmlCompute.provisioning_configuration(kind="nodes"))
    environment = os.environ | {"ALVEARY_CONFIG": str(compose.folder / "deploy/secrets/config.json")}
    told = subprocess.run([*cli, "node", "token", "far"], env=environment, capture_output=True, text=True, check=True, timeout=60)
    words = told.stdout.split()
    assert "own machine alone" in told.stderr and words[:3] == ["alveary", "node", "join"] and "--tls" in words
    # A short path: the runs' sockets are below it.
    folder = compose.trainers / "far"
    here = {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY_")}
    options = ["--name", "outside", "--state-dir", str(folder), "--cpus", "1"]
    stranger = subprocess.run([*cli, *words[1 : words.index("--ca-data")], *options], env=here, capture_output=True, text=True, timeout=120)
    assert stranger.returncode == 5 and "an authority other than `ca`'s" in stranger.stderr and not folder.exists(), stranger.stderr
    log = tmp_path / "trainer.log"
    with log.open("wb") as written:
        trainer = subprocess.Popen([*cli, *words[1:], *options], env=here, stdout=written, stderr=written, stdin=subprocess.DEVNULL)
    try:
        run = submit(
            workspace, source, """
            import os, time
            from alveary import Run
            run = Run.get_context()
            run.tag("in", "far")
            open("outputs/model.txt", "w").write("weights")
            run.register_model("from-afar", "outputs/model.txt")
            for i in range(60):
                print(i, flush=True); run.log("i", i); time.sleep(0.1)
            open("outputs/done.txt", "w").write("done")
            """, environment=Environment("far", ["six"]), compute_target="far",
        )  # fmt: skip
        until(lambda: "5" in lines(run), "it runs")
        # What it holds on to goes away, and it is still the first attempt that ends.
        for service in ("door", "nats", "minio"):
            compose.crash(service)
        whole(run)
        details = finished(run)
        assert details["attempt"] == 1 and details["nodes"] == ["outside"]
        assert run.get_tags()["in"] == "far" and Model(workspace, "from-afar").version == 1
        secrets = compose.secrets
        door = f"localhost:{secrets['DOOR_PORT']}/"
        pulled = [name for image in compose.api.images() for name in image.get("RepoDigests") or [] if name.startswith(door)]
        assert len(pulled) == 1
        hidden = [secrets["NATS_TRAINER"], secrets["S3_SECRET_TRAINER"], secrets["REGISTRY_PASSWORD"], words[4]]
        assert not [h[:4] for h in hidden if h in log.read_text()]
        # From outside images can be pulled, by who has the password, and not be pushed.
        pool = urllib3.PoolManager(ca_certs=str(folder / "ca.crt"))
        headers = urllib3.make_headers(basic_auth=f"{secrets['REGISTRY_USER']}:{secrets['REGISTRY_PASSWORD']}")
        assert pool.request("GET", f"https://{door}v2/").status == 401
        assert pool.request("GET", f"https://{door}v2/", headers=headers).status == 200
        assert pool.request("POST", f"https://{door}v2/a/blobs/uploads/", headers=headers).status == 404
        assert pool.request("GET", f"https://{door}runs?list-type=2").status == 403
        assert pool.request("GET", f"https://{door}archive?list-type=2").status == 404
    finally:
        trainer.send_signal(signal.SIGINT)
        assert trainer.wait(60) == 0, log.read_text()[-4000:]
    until(lambda: ComputeTarget(workspace, "far").list_nodes() == [], "it has left")


def test_a_run_reaches_nothing_of_the_platform(compose: Compose, workspace: Workspace, source: Path) -> None:
    addresses = []
    for one in compose.containers():
        networks = compose.api.inspect_container(str(one["Id"]))["NetworkSettings"]["Networks"]
        address = next((n["IPAddress"] for n in networks.values() if n["IPAddress"]), "")
        if address:
            addresses += [f"{address}:{port}" for port in (7460, 9464, 4222, 8222, 9000, 5000, 7443)]
    assert len(addresses) > 50
    run = submit(workspace, source, """
        import concurrent.futures, glob, os, socket, sys
        def reach(address):
            host, port = address.rsplit(":", 1)
            try:
                socket.create_connection((host, int(port)), timeout=3).close()
                return address
            except OSError:
                return None
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            print([a for a in pool.map(reach, sys.argv[1:]) if a])
        print(sorted(os.listdir("/alveary")), os.path.exists("/var/run/docker.sock"), [k for k in os.environ if "SECRET" in k or "PASSWORD" in k or "TOKEN" in k])
        """, *addresses, "172.17.0.1:4222", "172.17.0.1:7460", environment=HERE)  # fmt: skip
    finished(run)
    assert lines(run) == ["[]", "['io', 'lib', 'socket', 'work'] False []"]


def test_a_run_on_two_nodes_meets_itself_by_name(compose: Compose, workspace: Workspace, source: Path) -> None:
    code = """
        import os, socket, time
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ["NODE_RANK"] == "0":
            with socket.create_server(("", port)) as server:
                server.settimeout(60)
                peer, _ = server.accept()
                print(peer.recv(100).decode())
        else:
            for _ in range(300):
                try:
                    socket.create_connection((host, port), timeout=2).sendall(b"hello from the other node")
                    break
                except OSError:
                    time.sleep(0.1)
        """
    run = submit(workspace, source, code, environment=HERE, node_count=2)
    details = finished(run)
    assert lines(run) == ["hello from the other node"] and len(set(details["nodes"])) == 2
    networks = lambda: [n["Name"] for n in compose.api.networks(filters={"label": "org.alveary.gang"})]  # noqa: E731
    until(lambda: not [n for n in networks() if run.id.lower() in n], "its network is gone")


PROBE = """
import io, os, sys
from minio import Minio
from minio.error import S3Error
client = Minio("minio:9000", access_key=os.environ["A"], secret_key=os.environ["S"], secure=False, region="us-east-1")
for bucket in ("datasets", "snapshots", "images", "runs", "models", "archive"):
    rights = ""
    for right, work in (("r", lambda: list(client.list_objects(bucket))), ("w", lambda: client.put_object(bucket, "probe", io.BytesIO(b"x"), 1))):
        try:
            work(); rights += right
        except S3Error as error:
            assert error.code == "AccessDenied", error
    print(bucket, rights)
"""


@pytest.mark.parametrize("service", ["runs", "images", "trainer", "logs", "registry", "archiver", "collector", "scheduler"])
def test_a_key_opens_its_own_buckets_alone(compose: Compose, service: str) -> None:
    from alveary_core.access import BUCKETS

    access, secret = (compose.secrets[f"S3_{kind}_{service.upper()}"] for kind in ("ACCESS", "SECRET"))
    done = compose.run(
        "docker", "run", "--rm", "--network", f"{compose.project}_platform", "-e", f"A={access}", "-e", f"S={secret}",
        f"alveary/runs:t{os.getpid()}", "python", "-c", PROBE,
    )  # fmt: skip
    found = {line.split()[0]: "".join(line.split()[1:]) for line in done.stdout.splitlines()}
    everything = ("datasets", "snapshots", "images", "runs", "models", "archive")
    assert found == {bucket: BUCKETS[service].get(bucket, "") for bucket in everything}, done.stdout


def test_a_nats_user_cannot_publish_what_is_anothers(compose: Compose) -> None:
    from alveary_core.access import WRITES

    secrets = compose.secrets
    samples = {
        own.replace("*", "w").replace(">", "x.happened"): who for who, all_of in WRITES.items() for own in all_of if who != "restore"
    }

    async def attempt() -> None:
        for user in ("runs", "images", "scheduler", "trainer", "logs", "registry", "archiver", "subscriber"):
            refused: list[str] = []

            async def on_error(error: Exception, refused: list[str] = refused) -> None:
                refused.append(str(error))

            connection = await nats.connect(
                f"nats://127.0.0.1:{secrets['NATS_PORT']}", user=user, password=secrets[f"NATS_{user.upper()}"], error_cb=on_error
            )
            for subject, owner in samples.items():
                if owner != user and subject not in [own.replace("*", "w").replace(">", "x.happened") for own in WRITES.get(user, ())]:
                    await connection.publish(subject, b"{}")
                    await connection.flush()
                    deadline = time.monotonic() + 10
                    while not [r for r in refused if subject.lower() in r.lower()]:
                        assert time.monotonic() < deadline, f"{user} may publish {subject}"
                        await asyncio.sleep(0.01)
            for forbidden in ("DELETE", "UPDATE", *(["PURGE"] if user != "runs" else [])):
                await connection.publish(f"$JS.API.STREAM.{forbidden}.ALVEARY", b"{}")
                await connection.flush()
                deadline = time.monotonic() + 10
                while not [r for r in refused if f"stream.{forbidden.lower()}" in r.lower()]:
                    assert time.monotonic() < deadline, f"{user} may {forbidden}"
                    await asyncio.sleep(0.01)
            await connection.close()
        with pytest.raises(nats.errors.Error):
            await nats.connect(f"nats://127.0.0.1:{secrets['NATS_PORT']}", allow_reconnect=False, connect_timeout=5)

    asyncio.run(attempt())


def test_every_service_serves_metrics_inside(compose: Compose) -> None:
    for service in ("runs", "images", "scheduler", "logs", "registry", "archiver"):
        container = str(compose.containers(service)[0]["Id"])
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9464/metrics').read().decode())"
        text = compose.api.exec_start(compose.api.exec_create(container, ["python", "-c", code])["Id"]).decode()
        assert "alveary_" in text, service


def test_prometheus_finds_every_service_and_the_dashboard_asks_what_it_can_answer(compose: Compose) -> None:
    files = ["-f", "docker-compose.yml", "-f", "deploy/standin/docker-compose.yml"]
    compose.run("docker-compose", *files, "--profile", "monitoring", "up", "-d", "--build", "--no-deps", "prometheus")
    base = f"http://127.0.0.1:{compose.secrets['PROMETHEUS_PORT']}/api/v1"

    def ask(path: str, **fields: str) -> dict[str, Any]:
        return dict(json.loads(urllib3.request("GET", f"{base}/{path}", fields=fields, timeout=5.0).data))

    def up() -> set[str]:
        try:
            targets = ask("targets")["data"]["activeTargets"]
        except (urllib3.exceptions.HTTPError, ValueError):  # it is still starting
            return set()
        return {t["labels"].get("service", "") for t in targets if t["health"] == "up"}

    until(lambda: up() >= {"runs", "images", "scheduler", "logs", "registry", "archiver", "trainer"}, "all services are scraped")
    rules = [r["name"] for g in ask("rules")["data"]["groups"] for r in g["rules"]]
    assert "HandlerFailing" in rules
    dashboard = json.loads((compose.folder / "deploy/grafana/dashboards/alveary.json").read_text())
    answered = 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            reply = ask("query", query=target["expr"])
            assert reply["status"] == "success", (panel["title"], reply)
            answered += bool(reply["data"]["result"])
    assert answered >= 5  # those without a rate over time, and without NATS' exporter


def test_the_event_log_is_restored_after_its_volume_was_destroyed(compose: Compose, workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "print('kept')", environment=HERE)
    before = finished(run)
    until(lambda: compose.run("tools/compose.sh", "verify").stdout.count(", 0 are not copied yet") == 2, "all is copied")
    compose.run("docker-compose", "-f", "docker-compose.yml", "-f", "deploy/standin/docker-compose.yml", "rm", "-s", "-f", "nats")
    compose.run("docker", "volume", "rm", f"{compose.project}_nats-data")
    told = compose.run("tools/compose.sh", "restore").stdout
    assert "messages restored" in told
    compose.up("runs=2", "logs=2", "trainer=2")
    again = compose.workspace()
    after = again.get_run(run.id).get_details()
    assert (after["status"], after["ended_at"], after["exit"]) == (before["status"], before["ended_at"], before["exit"])
    assert lines(again.get_run(run.id)) == ["kept"]
    assert {m.name for m in Model.list(again)} >= {"letters", "from-inside"}
    finished(submit(again, source, "print('and on')", environment=HERE))


def test_the_object_store_is_restored_from_a_copy_of_its_volume(
    compose: Compose, workspace: Workspace, source: Path, tmp_path: Path
) -> None:
    run = submit(workspace, source, "print('kept'); open('outputs/m.txt', 'w').write('weights')", environment=HERE)
    finished(run)
    run.register_model("backed-up", "outputs/")
    volume = f"{compose.project}_minio-data"
    files = ["-f", "docker-compose.yml", "-f", "deploy/standin/docker-compose.yml"]
    # The commands of docs/compose.md.
    compose.run("tools/compose.sh", "backup", str(tmp_path / "objects.tar"))
    compose.run("docker-compose", *files, "rm", "-s", "-f", "minio")
    compose.run("docker", "volume", "rm", volume)
    compose.run("tools/compose.sh", "restore-objects", str(tmp_path / "objects.tar"))
    again = compose.workspace()
    until(lambda: Model(again, "backed-up").version == 1, "the registry answers")
    target = Model(again, "backed-up").download(str(tmp_path / "model"))
    assert Path(target).read_text() == "weights"
    assert lines(again.get_run(run.id)) == ["kept"]
    finished(submit(again, source, "print('and on')", environment=HERE))
