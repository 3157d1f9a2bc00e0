"""The `local` kind of compute target: its nodes are trainer processes on this machine.

They outlive the scheduler on purpose: training goes on while the control plane restarts. A file per node holds its
pid and start time, by which a restarted scheduler finds it again.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pynvml

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core import machine as limits
from alveary_core import telemetry
from alveary_scheduler.providers import NodeProvider
from alveary_scheduler.state import TargetKey

# A node that dies again at once is started again later and later, up to this, seconds.
_MAX_PAUSE = 30.0


def machine(max_nodes: int) -> tuple[c.Resources, list[str]]:
    """Resources of one of `max_nodes` local nodes, and models of this machine's GPUs (shared out evenly)."""
    models: list[str] = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            models.append(str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        models = []  # no NVIDIA driver: a CPU node
    gpus = len(models) // max(max_nodes, 1)
    return c.Resources(cpus=limits.cpus(), memory_bytes=limits.memory_bytes(), gpus=gpus), models


class LocalNodes(NodeProvider):
    """Starts, finds and stops trainer processes."""

    scales = True

    def __init__(self, state_dir: Path, environment: dict[str, str]) -> None:
        self._folder = state_dir / "nodes"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._environment = environment
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._pauses: dict[str, tuple[float, float]] = {}
        self._wanted: dict[TargetKey, set[str]] = {}
        for file in self._folder.glob("*.json"):
            try:
                known = json.loads(file.read_text())
                self._wanted.setdefault((known["workspace"], known["target"]), set()).add(known["node"])
            except (ValueError, KeyError, TypeError) as error:  # the machine went down while it was written
                telemetry.logger().warning("node.forgotten", file=str(file), error=repr(error))
                file.unlink()

    def wanted(self, key: TargetKey) -> list[str]:
        """Ids of the target's nodes that run or are being started."""
        return sorted(self._wanted.get(key, set()))

    def scale_up(self, key: TargetKey, spec: ev.ComputeSpec, count: int) -> None:
        """Start nodes until there are `count`."""
        wanted = self._wanted.setdefault(key, set())
        number = 0
        while len(wanted) < count:
            node = f"{key[1]}-{number}"
            number += 1
            if node not in wanted:
                wanted.add(node)
                self._start(key, spec, node)

    def left(self, node: str) -> None:
        """The node has said that it ends: do not start it again."""
        for wanted in self._wanted.values():
            wanted.discard(node)
        (self._folder / f"{node}.json").unlink(missing_ok=True)

    async def tend(self, targets: Mapping[TargetKey, ev.ComputeSpec], leaving: set[str]) -> None:
        """Start nodes again that have died."""
        for key, spec in targets.items():
            self._keep_alive(key, spec, leaving)

    def _keep_alive(self, key: TargetKey, spec: ev.ComputeSpec, leaving: set[str]) -> None:
        for node in self.wanted(key):
            child = self._children.get(node)
            if child is not None:
                child.poll()  # reaps
            if self._alive(node):
                continue
            if node in leaving:
                self.left(node)
                leaving.discard(node)
                continue
            at, pause = self._pauses.get(node, (0.0, 0.25))
            if time.monotonic() >= at:
                quick = time.monotonic() - at < 60
                pause = min(pause * 2, _MAX_PAUSE) if quick and at else 0.25
                self._pauses[node] = (time.monotonic() + pause, pause)
                self._start(key, spec, node)

    def lost(self, node: str) -> None:
        """End a node that lives and sends no heartbeat; `tend` starts it again."""
        process = self._process(node)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _process(self, node: str) -> psutil.Process | None:
        try:
            known = json.loads((self._folder / f"{node}.json").read_text())
            process = psutil.Process(known["pid"])
            return process if abs(process.create_time() - known["created"]) < 2 else None
        except (FileNotFoundError, psutil.NoSuchProcess, ValueError, KeyError):
            return None

    def _alive(self, node: str) -> bool:
        process = self._process(node)
        try:
            return process is not None and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _start(self, key: TargetKey, spec: ev.ComputeSpec, node: str) -> None:
        index = int(node.rpartition("-")[2])
        gpus = spec.node_resources.gpus
        env = self._environment | {
            "ALVEARY_WORKSPACE": key[0],
            "ALVEARY_TARGET": key[1],
            "ALVEARY_NODE": node,
            "ALVEARY_GPU_OFFSET": str(index * gpus),
            "ALVEARY_GPU_COUNT": str(gpus),
            "ALVEARY_NODE_CPUS": str(spec.node_resources.cpus),
            "ALVEARY_NODE_MEMORY_BYTES": str(spec.node_resources.memory_bytes),
        }
        try:
            self._launch(key, node, env)
        except OSError as error:  # no space, no memory, no more processes: `tend` tries again
            telemetry.logger().warning("node.not_started", node=node, error=str(error))

    def _launch(self, key: TargetKey, node: str, env: dict[str, str]) -> None:
        with (self._folder / f"{node}.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "alveary_trainer"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._children[node] = child
        created = time.time()
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended already; tend will see that
            created = psutil.Process(child.pid).create_time()
        record = {"pid": child.pid, "created": created, "node": node, "workspace": key[0], "target": key[1]}
        part = self._folder / f".{node}.part"
        try:
            part.write_text(json.dumps(record))
            part.rename(self._folder / f"{node}.json")
        except OSError:  # nobody would find it again
            part.unlink(missing_ok=True)
            child.kill()
            child.wait()
            raise
        telemetry.logger().info("node.start", node=node, pid=child.pid)
