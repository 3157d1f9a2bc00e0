"""Container images: what goes in, what comes out, once, and again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from pathlib import Path

import docker
import pytest
import urllib3
from support import Embedded, embedded, finished, lines, recorded, submit, until

from alveary import Environment, Estimator, Experiment, MpiConfiguration, PyTorchConfiguration, Run, Workspace
from alveary.compute import AmlCompute, ComputeTarget
from alveary_contracts.images.v1 import images_pb2 as pb

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"


def image_of(workspace: Workspace, environment: Environment) -> pb.Image:
    client = workspace._client
    image: pb.Image = workspace._call(client.call(client.stubs.images.GetImage, pb.GetImageRequest(digest=environment.digest))).image
    return image


def test_packages_of_all_kinds_and_variables(workspace: Workspace, source: Path) -> None:
    # docopt has never had a wheel; hello is Debian's smallest program.
    environment = Environment(
        "all", ["docopt==0.6.2", "six"], apt_packages=["hello"], environment_variables={"QUOTED": 'a "b" $HOME \\ c', "PLAIN": "1"}
    )
    code = "import docopt, six, os, subprocess; print(docopt.__version__, os.environ['QUOTED'], subprocess.check_output(['hello', '-g', 'hi'], text=True))"
    run = submit(workspace, source, code, environment=environment)
    finished(run)
    assert lines(run)[0] == '0.6.2 a "b" $HOME \\ c hi'
    image = image_of(workspace, environment)
    assert image.builder == "docker" and "@sha256:" in image.image and image.size > 1 << 20
    assert "docopt==0.6.2" in image.packages and any(p.startswith("six==") for p in image.packages)
    again = submit(workspace, source, "print('cached')", environment=environment.clone("other"))
    finished(again)
    assert lines(again, "prepare") == []


def test_no_secret_and_no_tool_of_the_build_is_in_the_image(
    workspace: Workspace, source: Path, daemon: docker.APIClient, containers: Embedded
) -> None:
    environment = Environment("clean", ["six"])
    run = submit(
        workspace, source, "import os; print(os.path.exists('/build'), os.path.exists('/usr/local/bin/uv'))", environment=environment
    )
    finished(run)
    assert lines(run) == ["False False"]
    image = image_of(workspace, environment).image
    told = json.dumps([daemon.history(image), daemon.inspect_image(image)["Config"]])
    secrets = json.loads((containers.state_dir / "stack.json").read_text())["secrets"].values()
    assert not [s for s in [*secrets, "quite-secret", "ALVEARY_"] if s in told]


def test_a_failing_step_is_told_with_its_last_lines(workspace: Workspace, source: Path) -> None:
    bad = Environment("bad", apt_packages=["no-such-package-at-all"])
    details = finished(submit(workspace, source, "print()", environment=bad), "Failed")
    assert "no-such-package-at-all" in details["reason"] and details["exit"]["reason"] == "build_failed"
    broken = Environment("broken", dockerfile=f"FROM {BASE}\nRUN echo about to fail && exit 9\n")
    details = finished(submit(workspace, source, "print()", environment=broken), "Failed")
    assert "about to fail" in details["reason"] and "9" in details["reason"]
    both = Environment("both", ["six"], image=BASE)
    assert "cannot be added" in finished(submit(workspace, source, "print()", environment=both), "Failed")["reason"]


def test_a_dockerfile_and_a_ready_image_of_ones_own(workspace: Workspace, source: Path, daemon: docker.APIClient) -> None:
    mark = f"{os.getpid()}"
    own = Environment.from_dockerfile("own", f"FROM {BASE}\nENV MARK={mark}\nRUN echo {mark} > /mark\n")
    run = submit(workspace, source, "import os; print(os.environ['MARK'], open('/mark').read())", environment=own)
    finished(run)
    assert lines(run)[0] == f"{mark} {mark}"
    ready = Environment.from_docker_image("ready", image_of(workspace, own).image)
    run = submit(workspace, source, "print(open('/mark').read())", environment=ready)
    finished(run)
    assert lines(run)[0] == mark
    missing = Environment.from_docker_image("missing", "127.0.0.1:1/nothing:here")
    assert "127.0.0.1:1/nothing:here" in finished(submit(workspace, source, "print()", environment=missing), "Failed")["reason"]


def test_a_ready_image_by_tag_is_what_the_tag_meant_at_each_submit(workspace: Workspace, source: Path, daemon: docker.APIClient) -> None:
    tag = f"alveary-test-moving-{os.getpid()}:latest"

    def move(mark: str) -> None:
        text = f"FROM {BASE}\nRUN echo {mark} > /mark\n"
        for _ in daemon.build(fileobj=io.BytesIO(text.encode()), tag=tag, rm=True, decode=True):
            pass

    environment = Environment.from_docker_image("moving", tag)
    try:
        move("first")
        one = submit(workspace, source, "print(open('/mark').read().strip())", environment=environment)
        finished(one)
        move("second")
        two = submit(workspace, source, "print(open('/mark').read().strip())", environment=environment)
        finished(two)
        assert (lines(one), lines(two)) == (["first"], ["second"])
        digests = [run.get_details()["image_digest"] for run in (one, two)]
        assert digests[0] != digests[1]
    finally:
        daemon.remove_image(tag, force=True)


def test_many_runs_one_build(workspace: Workspace, source: Path) -> None:
    environment = Environment("one", dockerfile=f"FROM {BASE}\nRUN sleep 2\nRUN echo {os.getpid()} {time.time()} > /stamp\n")
    runs = [submit(workspace, source, "print(open('/stamp').read().strip())", environment=environment) for _ in range(4)]
    for run in runs:
        finished(run)
    assert len({lines(run)[0] for run in runs}) == 1
    events = [e for e in recorded(*runs) if e.type == "image.ready"]
    assert [e.subject for e in events].count(environment.digest) == 1


def test_cancel_stops_the_build(workspace: Workspace, source: Path, daemon: docker.APIClient) -> None:
    environment = Environment("endless", dockerfile=f"FROM {BASE}\nRUN echo begun {os.getpid()} && sleep 1000\n")
    run = submit(workspace, source, "print()", environment=environment)
    until(lambda: f"begun {os.getpid()}" in lines(run, "prepare"), "the step runs")
    run.cancel()
    finished(run, "Canceled")

    def steps() -> list[str]:
        return [c["Command"] for c in daemon.containers() if f"begun {os.getpid()}" in c["Command"]]

    until(lambda: steps() == [], "the step is gone")


def channel(folder: Path) -> str:
    """A conda channel on this disk with one package of two versions."""
    for subdir in ("linux-64", "noarch"):
        (folder / subdir).mkdir(parents=True)
    packages = {}
    for version in ("1.0", "2.0"):
        root = folder / f"pkg-{version}"
        (root / "bin").mkdir(parents=True)
        (root / "info").mkdir()
        script = b"#!/bin/sh\necho honey " + version.encode() + b" in /a_long_placeholder_prefix_for_tests_000000000000000000000000\n"
        (root / "bin" / "honey").write_bytes(script)
        (root / "bin" / "honey").chmod(0o755)
        index: dict[str, object] = {"name": "honey", "version": version, "build": "0", "build_number": 0, "depends": [], "arch": "x86_64",
                 "platform": "linux", "subdir": "linux-64", "timestamp": 1700000000000}  # fmt: skip
        (root / "info" / "index.json").write_text(json.dumps(index))
        entry = {"_path": "bin/honey", "path_type": "hardlink", "sha256": hashlib.sha256(script).hexdigest(), "size_in_bytes": len(script),
                 "file_mode": "text", "prefix_placeholder": "/a_long_placeholder_prefix_for_tests_000000000000000000000000"}  # fmt: skip
        (root / "info" / "paths.json").write_text(json.dumps({"paths": [entry], "paths_version": 1}))
        (root / "info" / "files").write_text("bin/honey\n")
        (root / "info" / "about.json").write_text("{}")
        name = f"honey-{version}-0.tar.bz2"
        with tarfile.open(folder / "linux-64" / name, "w:bz2") as archive:
            archive.add(root, ".")
        data = (folder / "linux-64" / name).read_bytes()
        packages[name] = index | {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "md5": hashlib.md5(data).hexdigest()}
    for subdir, found in (("linux-64", packages), ("noarch", {})):
        repodata = {"info": {"subdir": subdir}, "packages": found, "packages.conda": {}, "repodata_version": 1}
        (folder / subdir / "repodata.json").write_text(json.dumps(repodata))
    return f"file://{folder}"


def test_conda_packages_really_install_and_a_lock_brings_the_same(workspace: Workspace, source: Path, tmp_path: Path) -> None:
    address = channel(tmp_path / "channel")
    environment = Environment("conda", ["six"], conda_packages=["honey<2"], conda_channels=[address])
    code = "import subprocess, six; print(subprocess.check_output(['honey'], text=True).strip())"
    run = submit(workspace, source, code, environment=environment)
    finished(run)
    assert lines(run) == ["honey 1.0 in /opt/conda"]
    assert "conda:honey=1.0=0" in image_of(workspace, environment).packages
    free = Environment("free", conda_packages=["honey"], conda_channels=[address])
    finished(submit(workspace, source, code.replace(", six", ""), environment=free))
    assert "conda:honey=2.0=0" in image_of(workspace, free).packages
    unmet = Environment("unmet", conda_packages=["honey>=3"], conda_channels=[address])
    assert "honey" in finished(submit(workspace, source, code, environment=unmet), "Failed")["reason"]


def test_locked_gives_the_same_set_and_never_a_guess(workspace: Workspace, source: Path) -> None:
    first = Environment("first", ["six", "docopt==0.6.2"])
    never = Environment("never", ["six", "toml"], locked=True)
    details = finished(submit(workspace, source, "print()", environment=never), "Failed")
    assert "never resolved here" in details["reason"]
    finished(submit(workspace, source, "print()", environment=first))
    locked = first.clone("locked")
    locked.locked, locked.rebuild_key = True, os.urandom(4).hex()
    finished(submit(workspace, source, "print()", environment=locked))
    assert image_of(workspace, locked).packages == image_of(workspace, first).packages
    assert locked.digest != first.digest


def test_private_registries_need_their_credentials_once(
    workspace: Workspace, source: Path, registry: object, daemon: docker.APIClient, containers: Embedded
) -> None:
    # A second registry address of the same server, which the platform has no credentials of.
    _, port = registry.host.split(":")  # type: ignore[attr-defined]
    private = f"localhost:{port}/private/base:1"
    daemon.tag(BASE, f"localhost:{port}/private/base", "1")
    for _ in daemon.push(
        f"localhost:{port}/private/base", "1", stream=True, auth_config={"username": "alveary", "password": "quite-secret"}
    ):
        pass
    daemon.remove_image(private)
    environment = Environment("private", ["six"], base_image=private)
    details = finished(submit(workspace, source, "print()", environment=environment), "Failed")
    assert private in details["reason"]
    containers.cli("image", "login", f"localhost:{port}", "--username", "alveary", "--password-stdin", stdin="quite-secret\n")
    environment.rebuild_key = "again"
    finished(submit(workspace, source, "import six", environment=environment))
    assert f"localhost:{port}" in containers.cli("image", "logins").stdout
    stored = b"".join(f.read_bytes() for f in (containers.state_dir / "objects").rglob("*") if f.is_file())
    assert b"quite-secret" not in stored


def test_images_are_listed_and_shown(containers: Embedded, workspace: Workspace, source: Path) -> None:
    environment = Environment("shown", ["six"])
    finished(submit(workspace, source, "print()", environment=environment))
    rows = json.loads(containers.cli("image", "list", "--json").stdout)
    assert environment.digest in [r["digest"] for r in rows]
    shown = containers.cli("image", "show", environment.digest[:12]).stdout
    assert "six==" in shown and "@sha256:" in shown


def test_images_that_nobody_used_in_long_are_removed_and_come_back_when_wanted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, daemon: docker.APIClient, registry: object
) -> None:
    host, user, password = registry.host, registry.user, registry.password  # type: ignore[attr-defined]
    for name, value in {
        "REGISTRY": host, "REGISTRY_USER": user, "REGISTRY_PASSWORD": password, "IMAGES_DAYS": "0.00003", "COLLECT_SECONDS": "0.3",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"ALVEARY_{name}", value)
    environment = Environment("old", dockerfile=f"FROM {BASE}\nRUN echo {os.urandom(4).hex()} > /x\n")
    with embedded(tmp_path / "stack", runtime="docker") as stack:
        workspace = stack.workspace()
        finished(submit(workspace, source, "print()", environment=environment))
        image = image_of(workspace, environment).image
        until(lambda: image_of(workspace, environment).state == pb.IMAGE_STATE_EVICTED, "it is removed")
        repository, _, digest = image.partition("/")[2].partition("@")
        headers = urllib3.make_headers(basic_auth=f"{user}:{password}") | {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}

        def there() -> bool:
            return urllib3.request("GET", f"http://{host}/v2/{repository}/manifests/{digest}", headers=headers).status == 200

        until(lambda: not there(), "the registry lost it too")
        finished(submit(workspace, source, "print()", environment=environment))


HOROVOD = Environment("horovod", ["torch==2.13.0", "numpy", "horovod"])


@pytest.mark.timeout(3600)  # its C++ is compiled, which takes many minutes on a machine that is busy
def test_horovod_is_built_once_against_its_torch_and_trains(workspace: Workspace, source: Path) -> None:
    code = """
        import torch, horovod.torch as hvd
        hvd.init()
        print(hvd.size(), hvd.allreduce(torch.tensor([2.0])).item(), hvd.mpi_built(), hvd.gloo_built())
        """
    run = submit(workspace, source, code, environment=HOROVOD)
    finished(run)
    assert lines(run) == ["1 2.0 True True"]
    assert "building horovod" in "\n".join(lines(run, "prepare"))
    other = Environment("horovod and six", ["torch==2.13.0", "numpy", "horovod", "six"])
    again = submit(workspace, source, code, environment=other)
    finished(again)
    told = "\n".join(lines(again, "prepare"))
    assert "was built before" in told and "building horovod" not in told


@pytest.fixture(scope="module")
def pair(workspace: Workspace) -> str:
    """A target of two nodes of one core each."""
    spec = AmlCompute.provisioning_configuration(min_nodes=2, max_nodes=2, cpus=1, idle_seconds_before_scaledown=600)
    target = ComputeTarget.create(workspace, "pair", spec)
    until(lambda: len(target.list_nodes()) == 2, "both nodes are there")
    return "pair"


def gang_networks(daemon: docker.APIClient, run: Run) -> list[str]:
    """The networks of a run; other tests use the same daemon."""
    return [n["Name"] for n in daemon.networks(filters={"label": "org.alveary.gang"}) if run.id.lower() in n["Name"]]


@pytest.mark.timeout(3600)
def test_horovod_reduces_gradients_over_two_nodes(workspace: Workspace, pair: str, daemon: docker.APIClient) -> None:
    """As Azure's page has it: distributed_training=MpiConfiguration(), node_count=2."""
    losses = []
    for nodes in (1, 2):
        estimator = Estimator(
            str(ROOT / "examples/horovod"), entry_script="train.py", script_params={"--steps": 30}, compute_target=pair,
            distributed_training=MpiConfiguration(), node_count=nodes, process_count_per_node=1, environment_definition=HOROVOD,
        )  # fmt: skip
        run = Experiment(workspace, "horovod").submit(estimator)
        details = finished(run)
        (said,) = [line for line in lines(run) if "ranks" in line]
        assert said.startswith(f"{nodes} ranks on {nodes} nodes") and said.endswith("weights alike: True")
        assert len(run.get_metrics()["loss"]) == 30 and "outputs/model.pt" in run.get_file_names()
        assert len({r["node"] for r in details["exit"]["ranks"]}) == nodes
        losses.append(float(said.split("loss ")[1].split(",")[0]))
    assert abs(losses[0] - losses[1]) < 1e-3, "two halves of each batch do not learn what the whole does"
    until(lambda: not gang_networks(daemon, run), "the run's network is gone")


def test_without_mpirun_the_run_says_how_to_get_it(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "print()", environment=Environment("none", []), distributed_job_config=MpiConfiguration(2))
    details = finished(run, "Failed")
    assert details["exit"]["reason"] == "launch_failed" and "apt_packages=['openmpi-bin']" in details["reason"]


def test_torchrun_spans_containers_which_nobody_else_reaches(
    workspace: Workspace, pair: str, source: Path, daemon: docker.APIClient
) -> None:
    code = """
        import os, time, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([float(dist.get_rank() + 1)])
        dist.all_reduce(total)
        print(f"sum {total.item():g} of {dist.get_world_size()}", flush=True)
        while not os.path.exists("go"):
            time.sleep(0.05)
        dist.barrier()
        dist.destroy_process_group()
        """
    both = PyTorchConfiguration(process_count=2, node_count=2)
    run = submit(workspace, source, code, compute_target=pair, environment=HOROVOD, distributed_job_config=both)
    until(lambda: len(lines(run)) == 2, "both ranks begin")
    (network,) = gang_networks(daemon, run)
    inside = daemon.inspect_network(network)["Containers"]
    assert len(inside) == 2
    # One of them has torchrun's store at that port.
    addresses = [one["IPv4Address"].partition("/")[0] for one in inside.values()]
    probe = f"""
        import socket
        for address in {addresses}:
            try:
                socket.create_connection((address, 29500), timeout=2)
                print("reached")
            except OSError as error:
                print("kept out")
        """
    other = submit(workspace, source, probe, environment=Environment("none", []))
    finished(other)
    assert lines(other) == ["kept out"] * 2
    run.cancel()
    finished(run, "Canceled")
    until(lambda: not gang_networks(daemon, run), "the run's network is gone")
    left = daemon.containers(all=True, filters={"label": "org.alveary.run"})
    assert not [c for c in left if c["Labels"]["org.alveary.run"].startswith(run.id)]
