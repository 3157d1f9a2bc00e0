"""The gRPC servicers: translate, call, translate back."""

from __future__ import annotations

import re
import socket
import time
from importlib.metadata import version
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import name_problem
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb
from alveary_contracts.scheduler.v1 import scheduler_pb2_grpc as rpc
from alveary_core import auth, telemetry
from alveary_core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from alveary_core.events import Key
from alveary_scheduler.adapters.local import machine
from alveary_scheduler.adapters.ray_nodes import installed
from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.core.resources import WHOLE
from alveary_scheduler.joining import DAY, YEAR, Joining
from alveary_scheduler.service import Scheduler
from alveary_scheduler.state import Node, Placed, Target, TargetKey, Waiting

MAX_LOCAL_NODES, MAX_NODES = 64, 10_000
# What may change while runs use a target.
_CHANGEABLE = ("min_nodes", "max_nodes", "idle_seconds_before_scaledown", "cooldown_seconds", "quotas", "tags", "description")
KINDS = ("local", "nodes", "ray")
_ADDRESS = re.compile(r"(ray://)?[A-Za-z0-9_.-]+:\d{1,5}")
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
        if spec.kind == "ray":
            self._scheduler.joining.require_ray()
        sequence = await self._scheduler.append(Key(who.workspace, "target", request.name), ev.TargetCreated(spec=spec))
        target = self._scheduler.state.targets[who.workspace, request.name]
        return pb.CreateTargetResponse(target=self._target(target), sequence=sequence)

    async def UpdateTarget(self, request: pb.UpdateTargetRequest, context: Any) -> pb.UpdateTargetResponse:
        who = auth.require("writer")
        present = self._scheduler.state.targets.get((who.workspace, request.name))
        if present is None:
            raise NotFound("compute target", request.name, "`alveary compute list` shows those there are")
        # What it has now counts as given, so that limits of this machine are not filled in anew.
        spec = complete(request.name, request.spec, self._default_kind)
        fixed = [
            f.name for f in spec.DESCRIPTOR.fields if f.name not in _CHANGEABLE and getattr(spec, f.name) != getattr(present.spec, f.name)
        ]
        if fixed:
            raise InvalidArgument(*((f"spec.{name}", "cannot change: delete the target and create it anew") for name in fixed))
        key, sequence = Key(who.workspace, "target", request.name), 0
        if spec != present.spec:
            sequence = await self._scheduler.append(key, ev.TargetUpdated(spec=spec))
        return pb.UpdateTargetResponse(target=self._target(self._scheduler.state.targets[who.workspace, request.name]), sequence=sequence)

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

    def _target(self, target: Target) -> pb.Target:
        state = self._scheduler.state
        nodes = {n.id for n in state.nodes.values() if (n.workspace, n.target) == (target.workspace, target.name)}
        desired = self._scheduler.desired((target.workspace, target.name))
        return pb.Target(
            name=target.name, spec=target.spec, current_nodes=len(nodes), desired_nodes=desired,
            running=sum(any(name in nodes for name, _ in p.nodes) for p in state.placed.values()),
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
    if spec.placement_policy and spec.placement_policy not in POLICIES:
        faults.append(("spec.placement_policy", f"{spec.placement_policy!r}: one of {', '.join(sorted(POLICIES))}"))
    users = [q.user for q in spec.quotas]
    for quota in spec.quotas:
        if quota.weight < 0 or users.count(quota.user) > 1:
            faults.append(("spec.quotas", f"user {quota.user!r}: one quota each, with a weight above 0"))
    if not _NETWORK.fullmatch(spec.network) or spec.network == "host":
        faults.append(("spec.network", f"{spec.network[:80]!r}: 'none', 'bridge' or the name of a docker network"))
    if problem := name_problem(name):
        faults.append(("name", problem))
    if spec.kind not in KINDS:
        faults.append(
            ("spec.kind", f"{spec.kind!r}: 'local' (this machine), 'nodes' (machines that join) or 'ray' (an existing Ray cluster)")
        )
    if spec.kind == "ray":
        if not _ADDRESS.fullmatch(spec.address):
            faults.append(("spec.address", f"{spec.address!r}: the Ray cluster's 'host:port' or 'ray://host:port'"))
        if spec.min_nodes or asked.HasField("node_resources"):
            faults.append(("spec.min_nodes", "nodes of a Ray cluster are as large as each run asks for, and none is kept for none"))
        if not installed():
            faults.append(("spec.kind", "'ray': Ray is not installed beside the scheduler: pip install 'alveary-scheduler[ray]'"))
    elif spec.address:
        faults.append(("spec.address", f"only targets of kind 'ray' have one, and this is of kind {spec.kind!r}"))
    if spec.cooldown_seconds < 0:
        faults.append(("spec.cooldown_seconds", "cannot be negative"))
    if spec.kind == "local" and default_kind != "local":
        faults.append(("spec.kind", "'local': this platform starts no trainers by itself; use 'nodes', and start trainers for the target"))
    if spec.kind == "nodes":
        spec.max_nodes = asked.max_nodes or MAX_NODES
    most = MAX_LOCAL_NODES if spec.kind == "local" else MAX_NODES
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
    if spec.kind == "ray" or (spec.kind == "nodes" and not given):
        return spec  # whatever joins
    spec.node_resources.CopyFrom(
        c.Resources(
            cpus=want.cpus or here.cpus, memory_bytes=want.memory_bytes or here.memory_bytes,
            gpus=want.gpus if given else here.gpus,
        )
    )  # fmt: skip
    return spec


class NodeService(rpc.NodeServiceServicer):
    """alveary.scheduler.v1.NodeService."""

    def __init__(self, scheduler: Scheduler, joining: Joining) -> None:
        self._scheduler, self._joining = scheduler, joining

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:
        who = auth.require("reader")
        state, found = self._scheduler.state, []
        for node in sorted(state.nodes.values(), key=lambda n: n.id):
            if node.workspace != who.workspace or request.target not in ("", node.target):
                continue
            held = [p for p in state.placed.values() if p.on(node.id)]
            pulse = self._scheduler.pulses.get(node.id)
            one = pb.Node(
                id=node.id, target=node.target, resources=node.total, run_ids=[p.run for p in held], used=_used(held, node.id),
                state=self._state(node), labels=node.labels,
            )  # fmt: skip
            if pulse is not None:
                one.gpu_models[:] = pulse.beat.gpu_models
                one.hostname, one.cpu_percent = pulse.beat.hostname, pulse.beat.cpu_percent
                one.memory_used_bytes = pulse.beat.memory_used_bytes
                one.seconds_since_beat = time.monotonic() - pulse.at
                one.disk_total_bytes, one.disk_free_bytes = pulse.beat.disk_total_bytes, pulse.beat.disk_free_bytes
                one.cordon_reason = pulse.beat.cordon_reason
                if one.cordon_reason and one.state == "ready":
                    one.state = "cordoned"
            found.append(one)
        return pb.ListNodesResponse(nodes=found)

    def _state(self, node: Node) -> str:
        pool = self._scheduler.state.pools.get((node.workspace, node.target))
        if node.draining:
            return "draining"
        return "quarantined" if pool is not None and node.id in pool.quarantine.active(time.time()) else "ready"

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        auth.require("reader")
        disk = await self._scheduler.disk.look()
        answer = pb.GetStatusResponse(
            version=version("alveary-core"), hostname=socket.gethostname(), disk_total_bytes=disk.total, disk_free_bytes=disk.free,
            disk_reserve_bytes=disk.reserve, trouble=await self._scheduler.trouble(),
        )  # fmt: skip
        answer.time.GetCurrentTime()
        return answer

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:
        who = auth.require("owner")
        node = self._scheduler.state.nodes.get(request.node)
        if node is None or node.workspace != who.workspace:
            raise NotFound("node", request.node, "`alveary compute nodes` shows those there are")
        if node.draining:
            return pb.DrainNodeResponse()
        reason = request.reason or f"{who.subject} drained it"
        return pb.DrainNodeResponse(
            sequence=await self._scheduler.append(Key(node.workspace, "node", node.id), ev.NodeDraining(reason=reason))
        )

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: Any) -> pb.CreateJoinTokenResponse:
        who = auth.require("owner")
        if not 0 <= request.valid_seconds <= YEAR:
            raise InvalidArgument(("valid_seconds", f"{request.valid_seconds:g}: 0 (a day) to {YEAR:g}"))
        self._joined_by_itself(who.workspace, request.target)
        endpoint = self._joining.endpoint
        token = self._joining.token(who.workspace, request.target, request.valid_seconds or DAY)
        return pb.CreateJoinTokenResponse(token=token, endpoint=endpoint)

    async def JoinNode(self, request: pb.JoinNodeRequest, context: Any) -> pb.JoinNodeResponse:
        who = auth.require("joiner")
        target = self._joining.target(who)
        self._joined_by_itself(who.workspace, target, "nodes", "ray")
        telemetry.logger().info("node.admitted", workspace=who.workspace, target=target, hostname=request.hostname[:200])
        return pb.JoinNodeResponse(
            workspace=who.workspace, target=target, environment=self._joining.environment(who.workspace, target)
        )  # fmt: skip

    def _joined_by_itself(self, workspace: str, name: str, *kinds: str) -> None:
        target = self._scheduler.state.targets.get((workspace, name))
        if target is None:
            raise NotFound("compute target", name, "`alveary compute create NAME --kind nodes` makes one that machines can join")
        if target.spec.kind not in (kinds or ("nodes",)):
            raise FailedPrecondition(
                f"compute target {name!r} is of kind {target.spec.kind!r}, and starts its nodes itself: machines join those of kind "
                "'nodes' (`alveary compute create NAME --kind nodes`)", f"target/{name}",
            )  # fmt: skip


class QueueService(rpc.QueueServiceServicer):
    """alveary.scheduler.v1.QueueService."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def ListQueue(self, request: pb.ListQueueRequest, context: Any) -> pb.ListQueueResponse:
        who = auth.require("reader")
        state, found = self._scheduler.state, []
        for (workspace, name), pool in sorted(state.pools.items()):
            if workspace == who.workspace and request.target in ("", name):
                found += [_waiting(state.queue[r.run], i) for i, r in enumerate(pool.order(time.time()), 1) if r.run in state.queue]
        orphans = [w for w in state.queue.values() if w.workspace == who.workspace and (target_key(w) not in state.pools)]
        found += [_waiting(w, i) for i, w in enumerate(orphans, 1) if request.target in ("", w.target)]
        return pb.ListQueueResponse(waiting=found)

    async def ExplainRun(self, request: pb.ExplainRunRequest, context: Any) -> pb.ExplainRunResponse:
        who = auth.require("reader")
        waiting = self._scheduler.state.queue.get(request.run_id)
        if waiting is None or waiting.workspace != who.workspace:
            raise NotFound("waiting run", request.run_id, "it does not wait for a place: `alveary run show` says what it does")
        pool = self._scheduler.state.pools.get(target_key(waiting))
        if pool is None:
            return pb.ExplainRunResponse(waiting=_waiting(waiting, 0), would_help=waiting.reason)
        now = time.time()
        if (until := waiting.request.not_before) > now:
            text = f"its next attempt may begin in {until - now:.0f} s, as its retry policy says"
            answer = pb.ExplainRunResponse(waiting=_waiting(waiting, 0), waits_for=str(waiting.request), would_help=text)
            answer.expected_start.FromNanoseconds(int(until * 1e9))
            return answer
        found = pool.explain(request.run_id, now)
        answer = pb.ExplainRunResponse(waiting=_waiting(waiting, found.position), waits_for=str(waiting.request), would_help=waiting.reason)
        if found.expected is not None:
            answer.expected_start.FromNanoseconds(int(found.expected * 1e9))
        return answer


def target_key(waiting: Waiting) -> TargetKey:
    """The key of a waiting run's target."""
    return (waiting.workspace, waiting.target)


def _waiting(waiting: Waiting, position: int) -> pb.Waiting:
    return pb.Waiting(run_id=waiting.run, position=position, reason=waiting.reason, priority=waiting.request.tier, target=waiting.target)


def _used(held: list[Placed], node: str) -> c.Resources:
    shapes = [p.request.shape for p in held for _ in range(p.on(node))]
    milli = sum(s.gpu_total for s in shapes)
    return c.Resources(
        cpus=sum(s.cpu_milli for s in shapes) / 1000,
        memory_bytes=sum(s.memory for s in shapes),
        gpus=milli // WHOLE,
        gpu_milli=milli % WHOLE,
    )
