"""What a container is asked for, and which paths a script may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import docker
import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer.adapters.containers import NETWORK, DockerRuntime
from alveary_trainer.adapters.runtime import Limits, Place, Staged, opened


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
    made._api, made._owner, made._uid, made._gid = Daemon(), "0123456789abcdef", 10001, 10001
    return made


def place(root: Path) -> Place:
    for name in ("work", "tmp"):
        (root / name).mkdir()
    return Place("RUN-1", root, root / "s" / "run.sock", root / "lib", {"data": root / "data"})


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
    with opened(tmp_path / "in" / "fine", tmp_path / "in") as path:
        assert path.read_text() == "f"
    for name in ("out", "."):
        with pytest.raises((ValueError, OSError)), opened(tmp_path / "in" / name, tmp_path / "in"):
            pass
