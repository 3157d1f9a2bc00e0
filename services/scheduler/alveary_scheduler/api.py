"""The gRPC servicers: translate, call, translate back."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb
from alveary_contracts.scheduler.v1 import scheduler_pb2_grpc as rpc
from alveary_core import auth, telemetry
from alveary_core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from alveary_core.events import Key
from alveary_scheduler.core.resources import WHOLE
from alveary_scheduler.joining import DAY, YEAR, Joining
from alveary_scheduler.plan import explain
from alveary_scheduler.service import Scheduler
from alveary_scheduler.state import Node, Placed, Target, TargetKey, Waiting
from alveary_scheduler.targets import kind_name, validate_and_default
from alveary_scheduler.wait_reason import reason_for, render

# What may change while runs use a target.
_CHANGEABLE = ("min_nodes", "max_nodes", "idle_seconds_before_scaledown", "cooldown_seconds", "quotas", "tags", "description")


class ComputeService(rpc.ComputeServiceServicer):
    """alveary.scheduler.v1.ComputeService."""

    def __init__(self, scheduler: Scheduler, default_kind: c.TargetKind.ValueType = c.TARGET_KIND_LOCAL) -> None:
        self._scheduler, self._default_kind = scheduler, default_kind

    async def CreateTarget(self, request: pb.CreateTargetRequest, context: Any) -> pb.CreateTargetResponse:
        who = auth.require("writer")
        spec = validate_and_default(request.name, request.spec, self._default_kind)
        present = self._scheduler.state.targets.get((who.workspace, request.name))
        if present is not None:
            if present.spec == spec:
                return pb.CreateTargetResponse(target=self._target(present))
            raise AlreadyExists("compute target", request.name, "with another specification; delete it first or choose another name")
        if spec.kind == c.TARGET_KIND_RAY:
            self._scheduler.joining.require_ray()
        sequence = await self._scheduler.append(Key(who.workspace, "target", request.name), ev.TargetCreated(spec=spec))
        target = self._scheduler.state.targets[who.workspace, request.name]
        return pb.CreateTargetResponse(target=self._target(target), sequence=sequence)

    async def UpdateTarget(self, request: pb.UpdateTargetRequest, context: Any) -> pb.UpdateTargetResponse:
        who = auth.require("writer")
        present = self._scheduler.state.targets.get((who.workspace, request.name))
        if present is None:
            raise NotFound("compute target", request.name, "`alveary compute list` shows those there are")
        spec = validate_and_default(request.name, request.spec, self._default_kind)
        fixed = [
            f.name for f in spec.DESCRIPTOR.fields if f.name not in _CHANGEABLE and getattr(spec, f.name) != getattr(present.spec, f.name)
        ]
        if fixed:
            raise InvalidArgument(*((f"spec.{name}", "cannot change: delete the target and create it again") for name in fixed))
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
        desired = self._scheduler.fleet.desired((target.workspace, target.name))
        return pb.Target(
            name=target.name, spec=target.spec, current_nodes=len(nodes), desired_nodes=desired,
            running=sum(any(name in nodes for name, _ in p.nodes) for p in state.placed.values()),
            waiting=sum((w.workspace, w.target) == (target.workspace, target.name) for w in state.queue.values()),
            state="Succeeded" if desired == len(nodes) else "Resizing",
        )  # fmt: skip


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
            last = self._scheduler.heartbeats.last.get(node.id)
            one = pb.Node(
                id=node.id, target=node.target, resources=node.total, run_ids=[p.run for p in held], used=_used(held, node.id),
                state=self._state(node), labels=node.labels,
            )  # fmt: skip
            if last is not None:
                one.gpu_models[:] = last.message.gpu_models
                one.hostname, one.cpu_percent = last.message.hostname, last.message.cpu_percent
                one.memory_used_bytes = last.message.memory_used_bytes
                one.seconds_since_heartbeat = time.monotonic() - last.at
                one.disk_total_bytes, one.disk_free_bytes = last.message.disk_total_bytes, last.message.disk_free_bytes
                one.cordon_reason = last.message.cordon_reason
                if one.cordon_reason and one.state == pb.NODE_STATE_READY:
                    one.state = pb.NODE_STATE_CORDONED
            found.append(one)
        return pb.ListNodesResponse(nodes=found)

    def _state(self, node: Node) -> pb.NodeState.ValueType:
        if node.draining:
            return pb.NODE_STATE_DRAINING
        pool = self._scheduler.state.pool_of(node)
        quarantined = pool is not None and node.id in pool.quarantine.active(time.time())
        return pb.NODE_STATE_QUARANTINED if quarantined else pb.NODE_STATE_READY

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        auth.require("reader")
        disk = await self._scheduler.disk.look()
        answer = pb.GetStatusResponse(
            version=version("alveary-core"), hostname=socket.gethostname(), disk_total_bytes=disk.total, disk_free_bytes=disk.free,
            disk_reserve_bytes=disk.reserve, trouble=await self._scheduler.loop.trouble(),
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
        self._require_joinable(who.workspace, request.target, c.TARGET_KIND_NODES)
        endpoint = self._joining.endpoint
        token = self._joining.token(who.workspace, request.target, request.valid_seconds or DAY)
        return pb.CreateJoinTokenResponse(token=token, endpoint=endpoint)

    async def JoinNode(self, request: pb.JoinNodeRequest, context: Any) -> pb.JoinNodeResponse:
        who = auth.require("joiner")
        target = self._joining.target(who)
        self._require_joinable(who.workspace, target, c.TARGET_KIND_NODES, c.TARGET_KIND_RAY)
        telemetry.logger().info("node.admitted", workspace=who.workspace, target=target, hostname=request.hostname[:200])
        return pb.JoinNodeResponse(
            workspace=who.workspace, target=target, environment=self._joining.environment(who.workspace, target)
        )  # fmt: skip

    def _require_joinable(self, workspace: str, name: str, *kinds: c.TargetKind.ValueType) -> None:
        target = self._scheduler.state.targets.get((workspace, name))
        if target is None:
            raise NotFound("compute target", name, "`alveary compute create NAME --kind nodes` makes one that machines can join")
        if target.spec.kind not in kinds:
            raise FailedPrecondition(
                f"compute target {name!r} is of kind {kind_name(target.spec.kind)!r}, and starts its nodes itself: machines join those of kind "
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
        cordoned = await self._scheduler.loop.cordoned()
        waiting = self._scheduler.state.queue.get(request.run_id)
        if waiting is None or waiting.workspace != who.workspace:
            raise NotFound("waiting run", request.run_id, "it does not wait for a place: `alveary run show` says what it does")
        answer = pb.ExplainRunResponse(waiting=_waiting(waiting, 0), waits_for=str(waiting.request))
        now = time.time()
        pool = self._scheduler.state.pool_of(waiting)
        if (until := waiting.request.not_before) > now:
            answer.waiting.wait_reason.CopyFrom(reason_for(c.WAIT_CODE_RETRY_DELAY, waiting.request, waiting.target))
            answer.waiting.wait_reason.seconds = until - now
            answer.expected_start.FromNanoseconds(int(until * 1e9))
        else:
            if waiting.reason is None and (reason := self._explain(waiting, now, cordoned)) is not None:
                answer.waiting.wait_reason.CopyFrom(reason)
            if pool is not None:
                found = pool.explain(request.run_id, now, cordoned)
                answer.waiting.position = found.position
                if found.expected is not None:
                    answer.expected_start.FromNanoseconds(int(found.expected * 1e9))
        answer.would_help = render(answer.waiting.wait_reason)
        return answer

    def _explain(self, waiting: Waiting, now: float, cordoned: Mapping[str, str]) -> c.WaitReason | None:
        """The reason that the next round gives for a run that none has explained yet."""
        fleet, key = self._scheduler.fleet, target_key(waiting)
        starting, coming = fleet.starting().get(key, 0), fleet.coming().get(key, {})
        return explain(self._scheduler.state, waiting, starting, now, coming, fleet.troubles().get(key, ""), cordoned)


def target_key(waiting: Waiting) -> TargetKey:
    """The key of a waiting run's target."""
    return (waiting.workspace, waiting.target)


def _waiting(waiting: Waiting, position: int) -> pb.Waiting:
    found = pb.Waiting(run_id=waiting.run, position=position, priority=waiting.request.tier, target=waiting.target)
    if waiting.reason is not None:
        found.reason = render(waiting.reason)
        found.wait_reason.CopyFrom(waiting.reason)
    return found


def _used(held: list[Placed], node: str) -> c.Resources:
    shapes = [p.request.shape for p in held for _ in range(p.on(node))]
    milli = sum(s.gpu_total for s in shapes)
    return c.Resources(
        cpus=sum(s.cpu_milli for s in shapes) / 1000,
        memory_bytes=sum(s.memory for s in shapes),
        gpus=milli // WHOLE,
        gpu_milli=milli % WHOLE,
    )
