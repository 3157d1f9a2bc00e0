"""A Ray cluster on this machine whose autoscaler starts and stops nodes: Ray's own, with its provider of pretended machines."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from alveary.local.layout import Ports

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider"


@dataclass
class RayCluster:
    """Where it is, and what speaks to it needs."""

    address: str
    environment: dict[str, str]

    def nodes(self) -> int:
        """How many nodes it has, without the head."""
        code = f"import ray; ray.init({self.address!r}, log_to_driver=False); print('NODES', sum(n['Alive'] for n in ray.nodes()) - 1)"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        # Ray prints there too.
        found = re.search(r"NODES (\d+)", done.stdout)
        assert found, done.stdout
        return int(found[1])


@contextmanager
def ray_cluster(workers: int) -> Iterator[RayCluster]:
    """A head without CPUs, and up to `workers` nodes of one CPU each, gone after some idle seconds."""
    folder = Path(tempfile.mkdtemp(prefix="avray", dir="/tmp"))  # the kernel limits the length of a socket's path
    ports, host = Ports.choose(0), "127.0.0.1"
    config = {
        "cluster_name": "test", "max_workers": workers, "upscaling_speed": 1.0, "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external", "module": f"{PROVIDER}.FakeMultiNodeProvider", "disable_node_updaters": True, "launch_multiple": True,
            "gcs_address": f"{host}:{ports.grpc}", "head_node_id": "f" * 51 + "00000",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": workers},
        },
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False, "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = {
        "ALVEARY_STATE_DIR": str(folder / "state"),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": "f" * 51 + "00000", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 51 + "00000",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={ports.grpc}", f"--node-ip-address={host}",
        f"--autoscaling-config={folder / 'config.json'}", "--include-dashboard=false", f"--temp-dir={folder}", f"--ray-client-server-port={ports.nats}",
        "--dashboard-agent-listen-port=0", "--object-store-memory=100000000",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=os.environ | environment | head, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield RayCluster(f"{host}:{ports.grpc}", environment)
    finally:
        ours = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        # Nodes that the autoscaler started are known by their folder.
        for one in psutil.process_iter():
            try:
                if any(str(folder) in word for word in one.cmdline()):
                    ours.append(one)
            except psutil.Error:
                continue
        process.terminate()
        for one in ours:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
