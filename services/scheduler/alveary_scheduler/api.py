"""The gRPC servicers: translate, call, translate back."""

from __future__ import annotations

import re
import time
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import name_problem
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb
from alveary_contracts.scheduler.v1 import scheduler_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from alveary_core.events import Key
from alveary_scheduler import domain
from alveary_scheduler.adapters.local import machine
from alveary_scheduler.service import Scheduler

MAX_LOCAL_NODES, MAX_NODES = 64, 10_000
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class ComputeService(rpc.ComputeServiceServicer):
    """alveary.scheduler.v1.ComputeService."""

    def __init__(self, scheduler: Scheduler, default_kind: str = "local") -> None:
        self._scheduler, self._default_kind = scheduler, default_kind

    async def CreateTarget(self, request: pb.CreateTargetRequest, context: Any) -> pb.CreateTargetResponse:
        who = auth.require("writer")
        spec = complete(request.name, request.spec, self._default_kind)
        present = self._scheduler.state.targets.get((who.workspace, request.name))
        if present is not None:
            if present.spec == spec:
                return pb.CreateTargetResponse(target=self._target(present))
            raise AlreadyExists("compute target", request.name, "with another specification; delete it first or choose another name")
        sequence = await self._scheduler.append(Key(who.workspace, "target", request.name), ev.TargetCreated(spec=spec))
        target = self._scheduler.state.targets[who.workspace, request.name]
        return pb.CreateTargetResponse(target=self._target(target), sequence=sequence)

    async def GetTarget(self, request: pb.GetTargetRequest, context: Any) -> pb.GetTargetResponse:
        who = auth.require("reader")
        await self._scheduler.view.wait_for(request.min_sequence)
        target = self._scheduler.state.targets.get((who.workspace, request.name))
        if target is None:
            raise NotFound("compute target", request.name, "`alveary compute list` shows those there are")
        return pb.GetTargetResponse(target=self._target(target))

    async def ListTargets(self, request: pb.ListTargetsRequest, context: Any) -> pb.ListTargetsResponse:
        who = auth.require("reader")
        found = [t for (workspace, _), t in sorted(self._scheduler.state.targets.items()) if workspace == who.workspace]
        return pb.ListTargetsResponse(targets=[self._target(t) for t in found])

    async def DeleteTarget(self, request: pb.DeleteTargetRequest, context: Any) -> pb.DeleteTargetResponse:
        who = auth.require("writer")
        state = self._scheduler.state
        target = state.targets.get((who.workspace, request.name))
        if target is None:
            raise NotFound("compute target", request.name)
        shown = self._target(target)
        if shown.running or shown.waiting:
            raise FailedPrecondition(
                f"compute target {request.name!r} has {shown.running} running and {shown.waiting} waiting runs: cancel them or wait",
                f"target/{request.name}",
            )
        sequence = await self._scheduler.append(Key(who.workspace, "target", request.name), ev.TargetDeleted())
        return pb.DeleteTargetResponse(sequence=sequence)

    def _target(self, target: domain.Target) -> pb.Target:
        state = self._scheduler.state
        nodes = {n.id for n in state.nodes.values() if (n.workspace, n.target) == (target.workspace, target.name)}
        desired = self._scheduler.desired((target.workspace, target.name))
        return pb.Target(
            name=target.name, spec=target.spec, current_nodes=len(nodes), desired_nodes=desired,
            running=sum(p.node in nodes for p in state.placed.values()),
            waiting=sum((w.workspace, w.target) == (target.workspace, target.name) for w in state.queue.values()),
            state="Succeeded" if desired == len(nodes) else "Resizing",
        )  # fmt: skip


def complete(name: str, asked: ev.ComputeSpec, default_kind: str = "local") -> ev.ComputeSpec:
    """Defaults filled in: Azure's four nodes and half an hour.

    Raises:
        InvalidArgument: with every fault.
    """
    spec = ev.ComputeSpec()
    spec.CopyFrom(asked)
    spec.kind = asked.kind or default_kind
    spec.max_nodes = asked.max_nodes or 4
    spec.vm_priority = asked.vm_priority or "dedicated"
    spec.network = asked.network or ("none" if asked.multi_tenant else "bridge")
    faults = []
    if not _NETWORK.fullmatch(spec.network) or spec.network == "host":
        faults.append(("spec.network", f"{spec.network[:80]!r}: 'none', 'bridge' or the name of a docker network"))
    if problem := name_problem(name):
        faults.append(("name", problem))
    if spec.kind not in ("local", "nodes"):
        faults.append(("spec.kind", f"{spec.kind!r}: 'local' (this machine) or 'nodes' (trainers that join by themselves)"))
    if spec.kind == "local" and default_kind != "local":
        faults.append(("spec.kind", "'local': this platform starts no trainers by itself; use 'nodes', and start trainers for the target"))
    if spec.kind == "nodes":
        spec.max_nodes = asked.max_nodes or MAX_NODES
    most = MAX_NODES if spec.kind == "nodes" else MAX_LOCAL_NODES
    if not 0 <= spec.min_nodes <= spec.max_nodes <= most:
        faults.append(("spec.max_nodes", f"0 <= min_nodes ({spec.min_nodes}) <= max_nodes ({spec.max_nodes}) <= {most} must hold"))
    if spec.idle_seconds_before_scaledown < 0:
        faults.append(("spec.idle_seconds_before_scaledown", "cannot be negative"))
    if spec.vm_priority not in ("dedicated", "lowpriority"):
        faults.append(("spec.vm_priority", f"{spec.vm_priority!r}: 'dedicated' or 'lowpriority'"))
    here, _ = machine(spec.max_nodes)
    want = spec.node_resources
    if spec.kind == "local" and (
        want.cpus > here.cpus
        or want.memory_bytes > here.memory_bytes
        or want.gpus > here.gpus
        or min(want.cpus, want.memory_bytes, want.gpus) < 0
    ):
        faults.append(
            (
                "spec.node_resources",
                f"this machine can give a node {here.cpus:g} CPUs, {here.memory_bytes / 2**30:.1f} GiB and {here.gpus} GPUs",
            )
        )
    if faults:
        raise InvalidArgument(*faults)
    given = spec.HasField("node_resources")
    spec.node_resources.CopyFrom(
        c.Resources(
            cpus=want.cpus or here.cpus, memory_bytes=want.memory_bytes or here.memory_bytes,
            gpus=want.gpus if given else here.gpus,
        )
    )  # fmt: skip
    return spec


class NodeService(rpc.NodeServiceServicer):
    """alveary.scheduler.v1.NodeService."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        who = auth.require("reader")
        state, found = self._scheduler.state, []
        for node in sorted(state.nodes.values(), key=lambda n: n.id):
            if node.workspace != who.workspace or request.target not in ("", node.target):
                continue
            held = [p for p in state.placed.values() if p.node == node.id]
            pulse = self._scheduler.pulses.get(node.id)
            one = pb.Node(
                id=node.id, target=node.target, resources=_resources(node.total), run_ids=[p.run for p in held],
                used=c.Resources(
                    cpus=sum(p.need.cpus for p in held), memory_bytes=sum(p.need.memory for p in held),
                    gpus=sum(p.need.gpus for p in held),
                ),
            )  # fmt: skip
            if pulse is not None:
                one.gpu_models[:] = pulse.beat.gpu_models
                one.hostname, one.cpu_percent = pulse.beat.hostname, pulse.beat.cpu_percent
                one.memory_used_bytes = pulse.beat.memory_used_bytes
                one.seconds_since_beat = time.monotonic() - pulse.at
            found.append(one)
        return pb.ListNodesResponse(nodes=found)


class QueueService(rpc.QueueServiceServicer):
    """alveary.scheduler.v1.QueueService."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def ListQueue(self, request: pb.ListQueueRequest, context: Any) -> pb.ListQueueResponse:
        who = auth.require("reader")
        waiting = [
            w for w in domain.order(self._scheduler.state.queue.values())
            if w.workspace == who.workspace and request.target in ("", w.target)
        ]  # fmt: skip
        return pb.ListQueueResponse(
            waiting=[
                pb.Waiting(run_id=w.run, position=i, reason=w.reason, priority=w.priority, target=w.target)
                for i, w in enumerate(waiting, 1)
            ]
        )


def _resources(need: domain.Need) -> c.Resources:
    return c.Resources(cpus=need.cpus, memory_bytes=need.memory, gpus=need.gpus)
