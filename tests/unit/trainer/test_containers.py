"""What a container is asked for, and which paths a script may name."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import docker
import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer.adapters.containers import NETWORK, DockerRuntime
from alveary_trainer.adapters.runtime import AttemptPaths, Limits, Staged, open_beneath
from alveary_trainer.hints import lacked_shared_memory
from alveary_trainer.settings import TrainerSettings


class Daemon(docker.APIClient):  # type: ignore[misc]
    """Takes notes instead of calls."""

    def __init__(self) -> None:
        self._version = "1.41"
        self.asked: dict[str, Any] = {}
        self.made: list[str] = []

    def networks(self, names: Any = None, ids: Any = None, filters: Any = None) -> list[str]:
        return [n for n in self.made if n in (names or [])]

    def create_network(self, name: str, *_: Any, **options: Any) -> None:
        assert options["options"] == {"com.docker.network.bridge.enable_icc": "false"}
        self.made.append(name)

    def create_container(self, image: str, **options: Any) -> dict[str, str]:  # type: ignore[override]
        self.asked = {"image": image, **options}
        return {"Id": "x"}

    def start(self, container: str) -> None:
        return None


@pytest.fixture
def runtime() -> DockerRuntime:
    made = DockerRuntime.__new__(DockerRuntime)
    made._settings = TrainerSettings.model_construct(node_memory_bytes=0)
    made._api, made._owner, made._uid, made._gid = Daemon(), "0123456789abcdef", 10001, 10001
    return made


def place(root: Path) -> AttemptPaths:
    for name in ("work", "tmp"):
        (root / name).mkdir()
    return AttemptPaths("RUN-1", root, root / "s" / "run.sock", root / "lib", {"data": root / "data"})


def test_limits_devices_and_denials_reach_the_daemon(runtime: DockerRuntime, tmp_path: Path) -> None:
    resources = c.Resources(cpus=1.5, memory_bytes=1 << 30, gpus=2, shm_bytes=1 << 28)
    runtime._start(place(tmp_path), Staged("python3", "image@sha256:0"), Limits(resources, (3, 5), "bridge"), tmp_path / "io")
    asked = runtime._api.asked
    host = asked["host_config"]
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["3", "5"] and host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert (host["NanoCpus"], host["Memory"], host["MemorySwap"], host["ShmSize"]) == (1_500_000_000, 1 << 30, 1 << 30, 1 << 28)
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    assert host["NetworkMode"] == NETWORK and runtime._api.made == [NETWORK]
    assert f"{tmp_path / 'data'}:/alveary/inputs/data:ro" in host["Binds"]
    assert not [b for b in host["Binds"] if "docker.sock" in b]
    assert asked["user"] == "10001:10001" and asked["name"].startswith("alveary-run-1-")


def test_a_run_without_gpus_sees_none_and_without_limits_has_none(runtime: DockerRuntime, tmp_path: Path) -> None:
    runtime._start(place(tmp_path), Staged("python3", "i"), Limits(c.Resources(cpus=1), (), "none"), tmp_path / "io")
    host = runtime._api.asked["host_config"]
    assert not host.get("DeviceRequests") and not host.get("Memory") and host["NetworkMode"] == "none"


@pytest.mark.parametrize(
    ("asked", "node", "size"),
    [
        (c.Resources(shm_bytes=1 << 28, memory_bytes=8 << 30), 32 << 30, 1 << 28),
        (c.Resources(memory_bytes=8 << 30), 32 << 30, 8 << 30),
        (c.Resources(memory_bytes=1 << 30), 32 << 30, 2 << 30),
        (c.Resources(memory_bytes=1 << 30), 1 << 30, 1 << 30),
        (c.Resources(), 32 << 30, 16 << 30),
        (c.Resources(), 3 << 30, 2 << 30),
    ],
)
def test_shared_memory_is_the_runs_memory_unless_it_says_otherwise(
    runtime: DockerRuntime, tmp_path: Path, asked: c.Resources, node: int, size: int
) -> None:
    runtime._settings = TrainerSettings.model_construct(node_memory_bytes=node)
    runtime._start(place(tmp_path), Staged("python3", "i"), Limits(asked, (), "none"), tmp_path / "io")
    assert runtime._api.asked["host_config"]["ShmSize"] == size
    assert f"{size / 2**30:g} GiB" in runtime.shared_memory(asked) and "shm_size" in runtime.shared_memory(asked)


@pytest.mark.parametrize(
    ("code", "number", "line", "lacked"),
    [
        (None, signal.SIGBUS, "", True),
        (135, None, "", True),
        (1, None, "RuntimeError: DataLoader worker (pid 42) is killed by signal: Bus error. It is possible that", True),
        (1, None, "ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).", True),
        (1, None, "RuntimeError: unable to write to file </torch_29919_3396182366_0>: No space left on device (28)", True),
        (1, None, "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", True),
        (1, None, "OSError: [Errno 28] No space left on device: '/psm_21467_46075'", True),
        (0, None, "Bus error in the title of a picture", False),
        (1, None, "OSError: [Errno 28] No space left on device: '/scratch/x'", False),
        (1, None, "ValueError: the business errors", False),
        (None, signal.SIGSEGV, "", False),
    ],
)
def test_what_a_full_shared_memory_looks_like(code: int | None, number: int | None, line: str, lacked: bool) -> None:
    assert lacked_shared_memory(code, number, ["epoch 1", line, ""]) == lacked


def test_the_nodes_proxies_reach_a_container_but_not_those_on_its_loopback(
    runtime: DockerRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("http_proxy", "http://proxy.example:1"), ("https_proxy", "http://127.0.0.1:3128"), ("no_proxy", "localhost")):
        monkeypatch.setenv(name, value)
    inherited = runtime.view(place(tmp_path), Staged("python3", "i")).inherited
    assert inherited["HTTP_PROXY"] == "http://proxy.example:1" and inherited["no_proxy"] == "localhost"
    assert not {"https_proxy", "HTTPS_PROXY"} & inherited.keys()


def test_paths_that_a_script_names_stay_in_its_folders(runtime: DockerRuntime, tmp_path: Path) -> None:
    here = place(tmp_path)
    assert runtime.host_path(here, "a/b.txt") == here.work / "a/b.txt"
    assert runtime.host_path(here, "/tmp/x") == here.tmp / "x"
    for evil in ("/etc/passwd", "../io/order.json", "/alveary/work/../lib/x", "/alveary/workers", "/proc/1/environ", "/alveary/work/"):
        with pytest.raises(ValueError, match="neither below"):
            runtime.host_path(here, evil)


def test_a_link_is_followed_only_inside(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "in" / "file").write_text("f")
    (tmp_path / "in" / "fine").symlink_to("file")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "secret")
    with open_beneath(tmp_path / "in" / "fine", tmp_path / "in") as path:
        assert path.read_text() == "f"
    for name in ("out", "."):
        with pytest.raises((ValueError, OSError)), open_beneath(tmp_path / "in" / name, tmp_path / "in"):
            pass
