"""Beside the scheduler, one for each target of kind `ray`: `python -m alveary_scheduler.providers.ray_driver ADDRESS NAMESPACE`.

A process of its own, as Ray's client is large and may have to be started anew. Orders come as JSON lines on stdin:

    {"op": "make", "group": NAME, "bundles": [{"CPU": 1, "GPU": 1, "memory": BYTES}], "spread": true,
     "endpoint": HOST:PORT, "token": JOIN TOKEN, "nodes": [NODE IDS], "options": [[OPTIONS OF `alveary node join`]]}
    {"op": "kill", "group": NAME, "index": N}
    {"op": "drop", "group": NAME}

and answers on stdout: {"event": "connected", "groups": {NAME: [NODE IDS]}}, then {"event": "state", "groups": {NAME:
"PENDING" or "CREATED"}} and {"event": "failed", "group": NAME, "reason"}. A group is a placement group; each of its bundles
holds one actor, and the actor a trainer. Groups and actors are detached: they outlive this process, and are found again by
their names.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from typing import Any, TextIO

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

_LOOK = 0.5
_CONNECT = 45.0


class Node:
    """An actor that holds a bundle, and runs a trainer in it. Sent to the cluster by value: Ray's nodes need no scheduler."""

    def __init__(self, endpoint: str, token: str, node: str, options: list[str]) -> None:
        import ctypes
        import signal
        import subprocess
        import sys
        import tempfile

        def with_parent() -> None:
            ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG

        import ray

        gpus = ",".join(str(g) for g in ray.get_gpu_ids())
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_VISIBLE"))}
        command = [sys.executable, "-m", "alveary.cli", "node", "join", endpoint, "-", "--name", node, "--gpu-ids", gpus, *options]
        # One for all nodes of a machine, so that they share what they have cached; each works in a folder of its own in it.
        folder = os.environ.get("ALVEARY_STATE_DIR") or os.path.join(tempfile.gettempdir(), f"alveary-ray-{os.getuid()}")
        command += ["--state-dir", folder]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True, preexec_fn=with_parent, env=environment, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(token + "\n")
        self._process.stdin.close()

    def ended(self) -> int | None:
        """The trainer's exit code; None: it runs."""
        return self._process.poll()


class Driver:
    """Groups of one target."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        # Orders of groups that are not created yet.
        self._pending: dict[str, dict[str, Any]] = {}
        self._groups: dict[str, PlacementGroup] = {}
        self._last: dict[str, str] = {}

    def emit(self, **what: Any) -> None:
        """One answer."""
        self._out.write(json.dumps(what) + "\n")
        self._out.flush()

    def recover(self) -> None:
        """Find what an earlier life left; groups that never got their actors are of no use."""
        namespace = ray.get_runtime_context().namespace
        actors = {a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == namespace}
        for one in placement_group_table().values():
            if not one["name"].startswith(f"{namespace}/") or one["state"] == "REMOVED":
                continue
            name = one["name"].partition("/")[2]
            group = get_placement_group(one["name"])
            if any(a.startswith(f"{name}/") for a in actors):
                self._groups[name] = group
            else:
                remove_placement_group(group)

    def named(self, name: str) -> str:
        """A placement group's name in the cluster; these have no namespaces."""
        return f"{ray.get_runtime_context().namespace}/{name}"

    def do(self, order: dict[str, Any]) -> None:
        """Carry out one order."""
        name = order["group"]
        if order["op"] == "make" and name not in self._groups:
            strategy = "STRICT_SPREAD" if order["spread"] and len(order["bundles"]) > 1 else "PACK"
            self._groups[name] = placement_group(order["bundles"], strategy=strategy, name=self.named(name), lifetime="detached")
            self._pending[name] = order
        elif order["op"] == "kill":
            self._kill(f"{name}/{order['index']}")
        elif order["op"] == "drop" and name in self._groups:
            self._pending.pop(name, None)
            remove_placement_group(self._groups.pop(name))  # Ray ends its actors with it

    def _kill(self, actor: str) -> None:
        try:
            ray.kill(ray.get_actor(actor))
        except ValueError:
            return  # it is gone

    def look(self) -> None:
        """Start trainers in groups that have come about."""
        states = {name: placement_group_table(group)["state"] for name, group in self._groups.items()}
        for name, state in states.items():
            if state == "CREATED" and (order := self._pending.pop(name, None)) is not None:
                self._start(name, order)
        if states != self._last:
            self._last = states
            self.emit(event="state", groups=states)

    def _start(self, name: str, order: dict[str, Any]) -> None:
        for index, bundle in enumerate(order["bundles"]):
            where = PlacementGroupSchedulingStrategy(self._groups[name], placement_group_bundle_index=index)
            made = ray.remote(Node).options(
                name=f"{name}/{index}", lifetime="detached", scheduling_strategy=where, num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0), memory=bundle.get("memory"), max_restarts=0,
            )  # fmt: skip
            made.remote(order["endpoint"], order["token"], order["nodes"][index], order["options"][index])


def main() -> int:
    """Serve until stdin ends, which is the scheduler's end."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    address, namespace = sys.argv[1:3]
    driver = Driver(out)

    def give_up() -> None:
        driver.emit(event="unreachable", reason=f"no answer in {_CONNECT:g} s")
        os._exit(1)

    # Ray waits for minutes for a cluster that is not there, and not always in a way that can be interrupted.
    patience = threading.Timer(_CONNECT, give_up)
    patience.daemon = True
    patience.start()
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        driver.emit(event="unreachable", reason=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        return 1
    patience.cancel()
    driver.recover()
    driver.emit(event="connected", groups=sorted(driver._groups))
    orders: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(line)
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    looked = 0.0
    while True:
        try:
            line = orders.get(timeout=_LOOK)
        except queue.Empty:
            line = ""
        if line is None:
            return 0
        if line.strip():
            driver.do(json.loads(line))
        if time.monotonic() - looked >= _LOOK or line:
            driver.look()
            looked = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
