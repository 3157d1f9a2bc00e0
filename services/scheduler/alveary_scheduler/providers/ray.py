"""The `ray` kind of compute target: its nodes are trainers in actors of an existing Ray cluster, gathered run by run.

Each run that waits gets a placement group as large as it asks for, under the run's id: asking twice is asking once. Where
the cluster has no room, Ray's own autoscaler makes some. The nodes join as all do, with a join token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core import telemetry
from alveary_scheduler.core.resources import Shape
from alveary_scheduler.providers import NodeProvider
from alveary_scheduler.state import TargetKey

_PAUSE, _MAX_PAUSE = 1.0, 30.0
# (workspace, target) -> (endpoint, join token)
Admit = Callable[[str, str], tuple[str, str]]


def installed() -> bool:
    """Whether Ray is there to speak to a cluster."""
    return importlib.util.find_spec("ray") is not None


@dataclass
class _Group:
    """What was gathered for one run: its nodes that have not left."""

    nodes: list[str]
    left: set[str] = field(default_factory=set)
    # As it was ordered; empty: an earlier life of the scheduler ordered it.
    order: dict[str, object] = field(default_factory=dict)


@dataclass
class _Cluster:
    """One target's driver."""

    address: str
    groups: dict[str, _Group] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    reading: asyncio.Task[None] | None = None
    connected: bool = False
    trouble: str = ""
    again: float = 0.0
    pause: float = _PAUSE


def node_name(target: str, run: str, index: int) -> str:
    """Of a node of a group; a run's id is a ULID, whose last characters are random."""
    return f"{target[:40]}-{run[-10:].lower()}-{index}"


class RayNodes(NodeProvider):
    """Groups of nodes in Ray clusters."""

    def __init__(self, state_dir: Path, admit: Admit, moved: Callable[[], None]) -> None:
        self._namespace = "alveary-" + hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
        self._admit, self._moved = admit, moved
        self._file = state_dir / "ray-groups.json"
        self._clusters: dict[TargetKey, _Cluster] = {}
        self._known: dict[str, dict[str, list[str]]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def _save(self) -> None:
        found = {"/".join(key): {run: g.nodes for run, g in cluster.groups.items()} for key, cluster in self._clusters.items()}
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.rename(self._file)

    async def tend(self, targets: Mapping[TargetKey, ev.ComputeSpec], leaving: set[str]) -> None:
        """Keep a driver for each target, and none for those that are gone."""
        # A target may have been created again with another address.
        for key in [k for k, cluster in self._clusters.items() if k not in targets or targets[k].address != cluster.address]:
            gone = self._clusters.pop(key)
            for run in list(gone.groups):
                self._send_order(gone, {"op": "drop", "group": run})
            if gone.process is not None and gone.process.stdin is not None:
                gone.process.stdin.close()
            self._save()
        for key, spec in targets.items():
            cluster = self._clusters.get(key)
            if cluster is None:
                known = self._known.pop("/".join(key), {})
                cluster = self._clusters[key] = _Cluster(spec.address, {run: _Group(nodes) for run, nodes in known.items()})
            if (cluster.reading is None or cluster.reading.done()) and time.monotonic() >= cluster.again:
                cluster.again = time.monotonic() + cluster.pause
                cluster.pause = min(cluster.pause * 2, _MAX_PAUSE)
                cluster.reading = asyncio.create_task(self._drive(key, cluster))

    async def _drive(self, key: TargetKey, cluster: _Cluster) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "alveary_scheduler.providers.ray_driver", cluster.address, f"{self._namespace}-{'-'.join(key)}"]
        process = cluster.process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._handle_answer(key, cluster, json.loads(line))
                self._moved()
        finally:
            cluster.connected = False
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            code = await process.wait()
            telemetry.logger().info("ray.driver", target=key[1], address=cluster.address, code=code, trouble=cluster.trouble)

    def _handle_answer(self, key: TargetKey, cluster: _Cluster, said: dict[str, object]) -> None:
        match said:
            case {"event": "connected", "groups": list(there)}:
                cluster.connected, cluster.trouble, cluster.pause = True, "", _PAUSE
                for run, group in list(cluster.groups.items()):
                    if run in there:
                        continue
                    if group.order:  # it never heard of it, or the cluster forgot
                        self._send_order(cluster, group.order)
                    else:
                        del cluster.groups[run]
                for run in [r for r in there if r not in cluster.groups]:
                    self._send_order(cluster, {"op": "drop", "group": run})
                self._save()
            case {"event": "unreachable", "reason": str(reason)}:
                cluster.trouble = f"the Ray cluster at {cluster.address} does not answer: {reason}"
                telemetry.logger().warning("ray.unreachable", target=key[1], reason=reason)

    def _send_order(self, cluster: _Cluster, order: dict[str, object]) -> None:
        if cluster.connected and cluster.process is not None and cluster.process.stdin is not None:
            cluster.process.stdin.write(json.dumps(order).encode() + b"\n")

    # ---- what the scheduler asks ----------------------------------------------------------------------------------

    def provision_group(self, key: TargetKey, run: str, shape: Shape, count: int, spread: bool) -> None:
        """Ask for a placement group for a run; asking twice is asking once."""
        cluster = self._clusters.get(key)
        if cluster is None or run in cluster.groups:
            return
        endpoint, token = self._admit(*key)
        bundle: dict[str, float] = {"CPU": shape.cpu_milli / 1000} if shape.cpu_milli else {}
        bundle |= {"GPU": shape.gpus} if shape.gpus else {}
        bundle |= {"memory": shape.memory} if shape.memory else {}
        nodes = [node_name(key[1], run, i) for i in range(count)]
        options = ["--cpus", str(shape.cpu_milli / 1000), "--memory-gb", str(shape.memory / 2**30), "--gpus", str(shape.gpus)]
        for name, value in sorted(shape.labels):
            options += ["--label", f"{name}={value}"]
        order: dict[str, object] = {
            "op": "make", "group": run, "bundles": [bundle] * count, "spread": spread, "endpoint": endpoint, "token": token,
            "nodes": nodes, "options": [options] * count,
        }  # fmt: skip
        cluster.groups[run] = _Group(nodes, order=order)
        self._save()
        self._send_order(cluster, order)

    def release_group(self, key: TargetKey, run: str) -> None:
        """Give a group up."""
        cluster = self._clusters.get(key)
        if cluster is not None and cluster.groups.pop(run, None) is not None:
            self._send_order(cluster, {"op": "drop", "group": run})
            self._save()

    def left(self, node: str) -> None:
        """A node has ended: end its actor, and with the last one its group."""
        for key, cluster in self._clusters.items():
            for run, group in list(cluster.groups.items()):
                if node in group.nodes and node not in group.left:
                    group.left.add(node)
                    self._send_order(cluster, {"op": "kill", "group": run, "index": group.nodes.index(node)})
                    if group.left == set(group.nodes):
                        self.release_group(key, run)

    def lost(self, node: str) -> None:
        """A node is silent: as if it had ended."""
        self.left(node)

    def coming(self, key: TargetKey, joined: set[str]) -> dict[str, int]:
        """Runs whose groups are to bring nodes that have not joined, and how many."""
        cluster = self._clusters.get(key)
        if cluster is None:
            return {}
        found = {run: len(set(g.nodes) - g.left - joined) for run, g in cluster.groups.items()}
        return {run: count for run, count in found.items() if count}

    def trouble(self, key: TargetKey) -> str:
        """Why nothing can be gathered; empty: it can."""
        cluster = self._clusters.get(key)
        return cluster.trouble if cluster is not None else ""

    async def close(self) -> None:
        """End the drivers; groups stay."""
        for cluster in self._clusters.values():
            if cluster.reading is not None:
                cluster.reading.cancel()
                await asyncio.gather(cluster.reading, return_exceptions=True)
