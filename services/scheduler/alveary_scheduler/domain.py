"""Targets, nodes, queue and placements, folded from events; and what to do next. Pure.

The state is a fold of events (`evolve`); each target's `pool.Pool` is a part of it. `plan` looks at it and says what to
do next: place, make room, wait (and why), start or stop nodes. What it says changes the state only when it comes back
as events.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event
from alveary_scheduler.packing import POLICIES, WHOLE, Machine, Shape
from alveary_scheduler.pool import UNLIMITED, Amount, Place, Pool, Preempt, Quota, Request, Room, Share

_MOST_CPUS = 1e6
# Failures that may be the node's fault rather than the run's.
_NODE_FAULTS = ("staging_failed", "launch_failed", "upload_failed")
# Runs whose reason for waiting is looked at in one round, beside those that have none yet.
_RETOLD, _TOLD = 50, 200


def _milli(value: float) -> int:
    """Thousandths; of what is no number, or none that makes sense, 0 or the most there can be."""
    return 0 if math.isnan(value) else round(min(max(value, 0.0), _MOST_CPUS) * 1000)


def shape_of(resources: c.Resources, labels: Mapping[str, str]) -> Shape:
    """What each node of a run is to give."""
    gpus = 1 if resources.gpu_milli else resources.gpus
    return Shape(
        _milli(resources.cpus), resources.memory_bytes, gpus, resources.gpu_milli or WHOLE,
        frozenset(resources.gpu_models) if gpus else frozenset(), frozenset(labels.items()),
    )  # fmt: skip


def resources_of(shape: Shape) -> c.Resources:
    """The inverse, without labels."""
    milli = shape.gpu_milli if shape.shares else 0
    return c.Resources(
        cpus=shape.cpu_milli / 1000, memory_bytes=shape.memory, gpus=shape.gpus, gpu_milli=milli, gpu_models=sorted(shape.models)
    )


@dataclass(frozen=True)
class Target:
    """A compute target."""

    workspace: str
    name: str
    spec: ev.ComputeSpec


@dataclass(frozen=True)
class Node:
    """A node that joined and was not lost."""

    id: str
    target: str
    workspace: str
    incarnation: str
    total: c.Resources
    draining: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiting:
    """A run in the queue."""

    workspace: str
    target: str
    request: Request
    reason: str = ""
    provisioning: bool = False

    @property
    def run(self) -> str:
        """Its id."""
        return self.request.run

    @property
    def attempt(self) -> int:
        """The attempt that comes next."""
        return self.request.attempt


@dataclass(frozen=True)
class Placed:
    """An attempt that holds its shares: parts of nodes, each in the life it had then."""

    workspace: str
    target: str
    # (node, incarnation), in the order of the shares.
    nodes: tuple[tuple[str, str], ...]
    request: Request
    # Of each share.
    gpus: tuple[tuple[int, ...], ...] = ()

    @property
    def run(self) -> str:
        """Its id."""
        return self.request.run

    @property
    def attempt(self) -> int:
        """Which one."""
        return self.request.attempt

    def on(self, node: str) -> int:
        """How many of its shares a node has."""
        return sum(name == node for name, _ in self.nodes)


@dataclass
class State:
    """All that is live; keyed by id, targets and pools by (workspace, name)."""

    targets: dict[tuple[str, str], Target] = field(default_factory=dict)
    pools: dict[tuple[str, str], Pool] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    queue: dict[str, Waiting] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    # Runs that were cancelled while they held no place, with their workspaces.
    canceled: dict[str, str] = field(default_factory=dict)
    # Runs in the queue that nobody has told why; where each run was in it at first.
    silent: dict[str, None] = field(default_factory=dict)
    arrivals: dict[str, int] = field(default_factory=dict)
    # Runs whose next attempt may not begin before a time.
    held: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Wait:
    """Say why a run waits."""

    run: str
    reason: str
    provisioning: bool


@dataclass(frozen=True)
class Scale:
    """Have this many nodes of a target."""

    workspace: str
    target: str
    nodes: int
    reason: str


@dataclass(frozen=True)
class Gather:
    """Have a group of nodes made for a run: as many as it asks for, each as large."""

    workspace: str
    target: str
    run: str
    shape: Shape
    count: int
    spread: bool


@dataclass(frozen=True)
class Dismiss:
    """Give up a group whose run needs it no more."""

    workspace: str
    target: str
    run: str


Decision = Place | Preempt | Wait | Scale | Gather | Dismiss
# By target: the runs for which groups of nodes are on their way, and how many nodes each is still to bring.
Groups = Mapping[tuple[str, str], Mapping[str, int]]


def evolve(state: State, event: Event) -> None:
    """Fold one event into `state`, in place: this is the one mutable state, owned by the projection."""
    key, message = event.key, event.message
    match message:
        case ev.TargetCreated():
            _create(state, Target(key.workspace, key.id, message.spec))
        case ev.TargetUpdated():
            name = (key.workspace, key.id)
            if name in state.targets:
                state.targets[name] = replace(state.targets[name], spec=message.spec)
                state.pools[name].quotas = quotas_of(key.workspace, message.spec)
        case ev.TargetDeleted():
            state.targets.pop((key.workspace, key.id), None)
            state.pools.pop((key.workspace, key.id), None)
        case ev.NodeJoined():
            _leave(state, key.id)
            node = Node(key.id, message.target, key.workspace, message.incarnation, message.resources, labels=dict(message.labels))
            state.nodes[key.id] = node
            if (pool := state.pools.get((key.workspace, message.target))) is not None:
                pool.add(machine_of(node, message.gpu_models[0] if message.gpu_models else ""))
        case ev.NodeDraining():
            if key.id in state.nodes:
                node = state.nodes[key.id] = replace(state.nodes[key.id], draining=True)
                if (pool := state.pools.get((node.workspace, node.target))) is not None:
                    pool.drain(key.id)
        case ev.NodeLost() | ev.NodeLeft():
            if key.id in state.nodes and state.nodes[key.id].incarnation == message.incarnation:
                _leave(state, key.id)
        case ev.RunPrepared():
            state.arrivals.setdefault(key.id, event.sequence)
            _enqueue(state, event, message.spec, message.submitted_by, message.attempts_used + 1)
        case ev.RunRetrying():
            _unplace(state, key.id, event.time)
            _enqueue(state, event, message.spec, message.submitted_by, message.attempt, message.delay_seconds)
        case ev.RunCancelRequested():
            _dequeue(state, key.id)
            if key.id not in state.placed:
                state.canceled[key.id] = key.workspace
        case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
            _judge(state, event)
            _dequeue(state, key.id)
            _unplace(state, key.id, event.time)
            state.canceled.pop(key.id, None)
            state.arrivals.pop(key.id, None)
        case ev.PlacementWaiting():
            _reason(state, key.id, message.reason, provisioning=False)
        case ev.PlacementProvisioning():
            _reason(state, key.id, message.reason, provisioning=True)
        case ev.PlacementMade():
            _place(state, event, message)
        case ev.PlacementPreempting():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt and (pool := state.pools.get((held.workspace, held.target))) is not None:
                pool.asked(key.id)
        case ev.PlacementRevoked() | ev.PlacementReleased():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt:
                _unplace(state, key.id, event.time)


def machine_of(node: Node, model: str) -> Machine:
    """A node as its pool sees it."""
    total = node.total
    return Machine(node.id, _milli(total.cpus), total.memory_bytes, total.gpus, model, frozenset(node.labels.items()))


def quotas_of(workspace: str, spec: ev.ComputeSpec) -> dict[tuple[str, str], Quota]:
    """By (workspace, user)."""
    found = {}
    for one in spec.quotas:
        maximum = UNLIMITED
        if one.HasField("maximum") or one.forbid_gpus:
            limit = one.maximum
            maximum = Amount(_milli(limit.cpus) or None, limit.memory_bytes or None, 0 if one.forbid_gpus else limit.gpus * WHOLE or None)
        guaranteed = None
        if one.HasField("guaranteed"):
            guaranteed = Amount(_milli(one.guaranteed.cpus), one.guaranteed.memory_bytes or None, one.guaranteed.gpus * WHOLE)
        found[workspace, one.user] = Quota(one.weight or 1.0, guaranteed, maximum)
    return found


def _create(state: State, target: Target) -> None:
    key = (target.workspace, target.name)
    state.targets[key] = target
    spec = target.spec
    default = "fgd" if spec.gpu_sharing else "best-fit"
    # A newer version may know more.
    pool = Pool(spec.placement_policy if spec.placement_policy in POLICIES else default, quotas=quotas_of(target.workspace, spec))
    state.pools[key] = pool
    # Runs that waited while the target was gone.
    for waiting in state.queue.values():
        if (waiting.workspace, waiting.target) == key and waiting.run not in state.held:
            pool.submit(waiting.request)


def _leave(state: State, node: str) -> None:
    """What its runs held is free; that they are lost is said by PlacementRevoked."""
    gone = state.nodes.pop(node, None)
    if gone is not None and (pool := state.pools.get((gone.workspace, gone.target))) is not None and node in pool.cluster.rows:
        pool.remove(node)


def _enqueue(state: State, event: Event, spec: c.RunSpec, user: str, attempt: int, delay: float = 0.0) -> None:
    run, workspace = event.key.id, event.key.workspace
    if run in state.canceled:
        return
    target = state.targets.get((workspace, spec.compute_target))
    # Whoever is placed at lower tiers, on cheap targets, or where guarantees are given, may have to make room.
    gives_way = spec.priority < 0 or (target is not None and (target.spec.vm_priority == "lowpriority" or any(q.HasField("guaranteed") for q in target.spec.quotas)))  # fmt: skip
    request = Request(
        run, workspace, user, shape_of(spec.resources, spec.node_labels), state.arrivals.get(run, event.sequence), event.time,
        spec.node_count or 1, spec.min_node_count, not spec.pack, spec.priority, spec.max_run_duration_seconds, preemptible=gives_way,
        attempt=attempt,
    )  # fmt: skip
    _dequeue(state, run)
    state.queue[run] = Waiting(workspace, spec.compute_target, request)
    if delay:
        state.held[run] = event.time + delay
        return
    state.silent[run] = None
    if (pool := state.pools.get((workspace, spec.compute_target))) is not None:
        pool.submit(request)


def _dequeue(state: State, run: str) -> None:
    waiting = state.queue.pop(run, None)
    state.silent.pop(run, None)
    state.held.pop(run, None)
    if waiting is not None and (pool := state.pools.get((waiting.workspace, waiting.target))) is not None:
        pool.withdraw(run)


def _place(state: State, event: Event, made: ev.PlacementMade) -> None:
    run, workspace = event.key.id, event.key.workspace
    waiting = state.queue.get(run)
    if waiting is not None:
        request = replace(waiting.request, attempt=made.attempt)
    else:
        spec = made.spec
        request = Request(
            run, workspace, made.submitted_by, shape_of(spec.resources, spec.node_labels), event.sequence, event.time,
            spec.node_count or 1, spec.min_node_count, not spec.pack, spec.priority, spec.max_run_duration_seconds,
            attempt=made.attempt,
        )  # fmt: skip
    _unplace(state, run, event.time)
    _dequeue(state, run)
    placed = state.placed[run] = Placed(
        workspace, made.target, tuple((s.node, s.incarnation) for s in made.nodes), request, tuple(tuple(s.gpu_indexes) for s in made.nodes)
    )
    pool = state.pools.get((workspace, made.target))
    # A node that was lost meanwhile, or lives another life, has nothing to give: the placement is about to be revoked.
    if pool is not None and not lost_nodes(state, placed) and all(s.node in pool.cluster.rows for s in made.nodes):
        pool.place(request, [Share(one.node, tuple(one.gpu_indexes)) for one in made.nodes], event.time)


def lost_nodes(state: State, placed: Placed) -> list[str]:
    """Nodes of an attempt that are gone, or live another life than the one it was placed on."""
    return [name for name, life in placed.nodes if (node := state.nodes.get(name)) is None or node.incarnation != life]


def _unplace(state: State, run: str, now: float) -> None:
    held = state.placed.pop(run, None)
    if held is not None and (pool := state.pools.get((held.workspace, held.target))) is not None:
        pool.finish(run, now)


def _judge(state: State, event: Event) -> None:
    """Whether a run's end speaks against its node, or for its nodes."""
    held = state.placed.get(event.key.id)
    if held is None or (pool := state.pools.get((held.workspace, held.target))) is None:
        return
    message = event.message
    failed = isinstance(message, ev.RunFailed) and message.exit.reason in _NODE_FAULTS
    names = {name for name, _ in held.nodes} & pool.cluster.rows.keys()
    if failed and isinstance(message, ev.RunFailed):
        culprit = message.exit.node or held.nodes[0][0]
        if culprit in names:
            pool.blame(culprit, event.key.id, event.time)
        return
    for name in sorted(names):
        pool.absolve(name)


def _reason(state: State, run: str, reason: str, *, provisioning: bool) -> None:
    if run in state.queue:
        state.queue[run] = replace(state.queue[run], reason=reason, provisioning=provisioning)
        state.silent.pop(run, None)


def plan(
    state: State, starting: Mapping[tuple[str, str], int], idle: Mapping[tuple[str, str], int], now: float, groups: Groups | None = None,
    troubles: Mapping[tuple[str, str], str] | None = None, cordoned: Mapping[str, str] | None = None,
) -> list[Decision]:  # fmt: skip
    """What to do now.

    `starting` is how many nodes of a target are on their way, `idle` how many have been idle for as long as the
    target allows, `groups` what is on its way for single runs, `troubles` why nothing can be had for a target,
    `cordoned` which nodes take no new runs for now, and why.
    """
    for each in state.pools.values():
        each.cordon((cordoned or {}).keys())
    for run in [run for run, until in state.held.items() if until <= now]:
        del state.held[run]
        waiting = state.queue[run]
        state.silent[run] = None
        if (pool := state.pools.get((waiting.workspace, waiting.target))) is not None:
            pool.submit(waiting.request)
    decisions: list[Decision] = []
    growing: dict[tuple[str, str], bool | set[str]] = {}
    placed: set[str] = set()
    for key in sorted(state.targets):
        coming = (groups or {}).get(key, {})
        found, growing[key] = _plan_target(state, state.targets[key], starting.get(key, 0), idle.get(key, 0), now, coming)
        placed |= {d.run for d in found if isinstance(d, Place)}
        decisions += found
    heads = itertools.chain(itertools.islice(state.silent, _TOLD), itertools.islice(state.queue, _RETOLD))
    for run in dict.fromkeys(heads):
        if run in placed or run in state.held:
            continue
        waiting = state.queue[run]
        grows = growing.get((waiting.workspace, waiting.target), False)
        trouble = (troubles or {}).get((waiting.workspace, waiting.target), "")
        wait = Wait(run, trouble, False) if trouble else _wait(state, waiting, grows if isinstance(grows, bool) else run in grows, cordoned)
        if (waiting.reason, waiting.provisioning) != (wait.reason, wait.provisioning):
            decisions.append(wait)
    return decisions


def _plan_target(
    state: State, target: Target, starting: int, idle: int, now: float, coming: Mapping[str, int]
) -> tuple[list[Decision], bool | set[str]]:  # fmt: skip
    """Decisions, and whether nodes are on their way for those who wait (or for whom)."""
    spec, pool = target.spec, state.pools[target.workspace, target.name]
    reserved = pool.reservation
    decisions: list[Decision] = [d for d in pool.decide(now) if isinstance(d, (Place, Preempt))]
    places = [d for d in decisions if isinstance(d, Place)]
    queued = len(pool.waiting)
    joined = sum((n.workspace, n.target) == (target.workspace, target.name) and not n.draining for n in state.nodes.values())
    wanted = joined + starting
    # A further node of a machine that has no space has none either.
    if spec.kind == "local" and not pool.cordoned:
        wanted = joined + max(starting, pool.nodes_needed(_fresh(state, target), starting, spec.max_nodes - joined))
    # The pool learns of them when they are in the log; who is next to reserve is found out after that.
    for place in reversed(places):
        pool.unplace(place.run, now)
    if places:
        pool.reservation = reserved
    if spec.kind == "ray":
        grouped, served = _plan_groups(target, pool, joined, idle, coming, {p.run for p in places}, now)
        return decisions + grouped, served
    if spec.kind != "local":
        return decisions, False  # nodes come and go as whoever runs them says
    if wanted == joined + starting and not queued and not places:
        wanted = max(wanted - idle, spec.min_nodes)
    wanted = min(max(wanted, spec.min_nodes), spec.max_nodes)
    if wanted != joined + starting:
        reason = f"{queued} runs wait" if wanted > joined + starting else "idle nodes"
        decisions.append(Scale(target.workspace, target.name, wanted, reason))
    return decisions, wanted > joined


def _plan_groups(
    target: Target, pool: Pool, joined: int, idle: int, coming: Mapping[str, int], placed: set[str], now: float
) -> tuple[list[Decision], set[str]]:  # fmt: skip
    """Groups of nodes to gather and to give up; and the runs that a group is on its way for."""
    workspace, name, most = target.workspace, target.name, target.spec.max_nodes
    decisions: list[Decision] = [Dismiss(workspace, name, run) for run in sorted(coming) if run not in pool.waiting]
    nodes = joined + sum(count for run, count in coming.items() if run in pool.waiting)
    served = {run for run in coming if run in pool.waiting}
    crowded = False
    for request in itertools.islice(pool.order(now), most):
        if request.run in served or request.run in placed or not pool.most_shares(request):
            continue
        if most - nodes < (request.least or request.count):
            crowded = True  # those behind it wait, so that it gets its turn
            break
        count = min(request.count, most - nodes)
        nodes += count
        served.add(request.run)
        decisions.append(Gather(workspace, name, request.run, request.shape, count, request.spread))
    # Idle nodes are as large as some run that is over: where they are in the way of one that waits, they go at once.
    gone = joined if crowded and not placed else idle if not placed else 0
    if gone and joined:
        decisions.append(Scale(workspace, name, max(joined - gone, 0), "idle nodes"))
    return decisions, served


def _fresh(state: State, target: Target) -> Machine:
    """A node that is yet to come; its labels and GPUs are those of other nodes of this machine."""
    whole = target.spec.node_resources
    local = (pool for key, pool in state.pools.items() if state.targets[key].spec.kind == "local")
    like = next((m for pool in local for m in pool.cluster.machines if m is not None), Machine("", 0, 0))
    return Machine("", _milli(whole.cpus), whole.memory_bytes, whole.gpus, like.model, like.labels)


def _wait(state: State, waiting: Waiting, growing: bool, cordoned: Mapping[str, str] | None = None) -> Wait:
    name, request, run = waiting.target, waiting.request, waiting.run
    pool, target = state.pools.get((waiting.workspace, name)), state.targets.get((waiting.workspace, name))
    if pool is None or target is None:
        return Wait(run, f"its compute target {name!r} was deleted: cancel the run, or create the target again", False)
    reason, _ = pool.why(request)
    if "quota" in reason:
        return Wait(run, reason, False)
    there = sum(m is not None for m in pool.cluster.machines)
    if pool.cordoned and cordoned and not growing:
        first, count = min(pool.cordoned), len(pool.cordoned)
        who = f"node {first} takes" if count == 1 else f"{count} of the {there} nodes of {name} take"
        return Wait(run, f"waits for {request}: {who} no new runs: {cordoned[first]}", False)
    if target.spec.kind == "ray":
        if growing:
            return Wait(run, f"Ray is asked for {request}; if no node of the cluster has that free, its autoscaler starts some", True)
        return Wait(
            run, f"waits for {request}: {name} has as many nodes as its maximum of {target.spec.max_nodes} allows; raise max_nodes, use "
            "another target, or wait", False,
        )  # fmt: skip
    if target.spec.kind == "nodes":
        if not there:
            return Wait(run, f"waits for {request}: no node has joined {name}: start a trainer for it", False)
        if not pool.possible(request):
            return Wait(run, f"{reason}; start another trainer for {name}, or ask for less", False)
        return Wait(
            run, f"waits for {request}: the {there} nodes of {name} are in use by earlier runs, or kept for them; "
            "start another trainer for it, or wait", False,
        )  # fmt: skip
    if not Room(_fresh(state, target)).times(request.shape) and not pool.possible(request):
        return Wait(
            run, f"waits for {request}: no node of {name} is like that, nor would a new one be; ask for less, or use another target", False
        )
    if growing:
        return Wait(run, f"{name} is starting a node for it ({request})", True)
    return Wait(
        run, f"waits for {request}: the nodes of {name} are in use by earlier runs, or kept for them, and it has its maximum of "
        f"{target.spec.max_nodes}; raise max_nodes, use another target, or wait", False,
    )  # fmt: skip
