"""Targets, nodes, queue and placements, folded from events. Pure.

`evolve` is the only thing that changes the state; each target's `Pool` is a part of it. `plan` says what to do next, and
changes the state only when its decisions come back as events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event
from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import AllocatedNode, Request
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import Machine
from alveary_scheduler.resources import milli, quotas_of, shape_of

TargetKey = tuple[str, str]
# Failures that may be the node's fault rather than the run's.
_NODE_FAULTS = (c.EXIT_REASON_STAGING_FAILED, c.EXIT_REASON_LAUNCH_FAILED, c.EXIT_REASON_UPLOAD_FAILED)


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
    # What its run was told last; None: nothing yet.
    reason: c.WaitReason | None = None

    @property
    def run(self) -> str:
        """The run's id."""
        return self.request.run

    @property
    def attempt(self) -> int:
        """The attempt that comes next."""
        return self.request.attempt

    @property
    def provisioning(self) -> bool:
        """Whether nodes are being started for it."""
        return self.reason is not None and self.reason.code == c.WAIT_CODE_PROVISIONING


@dataclass(frozen=True)
class Placed:
    """An attempt that holds its allocation: parts of nodes, each in the incarnation that it had then."""

    workspace: str
    target: str
    # (node, incarnation) of each part.
    nodes: tuple[tuple[str, str], ...]
    request: Request
    # GPU indexes of each part.
    gpus: tuple[tuple[int, ...], ...] = ()

    @property
    def run(self) -> str:
        """The run's id."""
        return self.request.run

    @property
    def attempt(self) -> int:
        """Its number."""
        return self.request.attempt

    def on(self, node: str) -> int:
        """How many parts of its allocation are on a node."""
        return sum(name == node for name, _ in self.nodes)


@dataclass
class State:
    """All that is live; keyed by id, targets and pools by (workspace, name)."""

    targets: dict[TargetKey, Target] = field(default_factory=dict)
    pools: dict[TargetKey, Pool] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    queue: dict[str, Waiting] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    # Runs that were cancelled while they held no nodes, with their workspaces.
    canceled: dict[str, str] = field(default_factory=dict)
    # Runs in the queue without a wait reason yet.
    unexplained: dict[str, None] = field(default_factory=dict)
    # The sequence with which each run came first: later attempts keep its place in the queue.
    arrivals: dict[str, int] = field(default_factory=dict)

    def pool_of(self, entry: Node | Waiting | Placed) -> Pool | None:
        """The pool of an entry's target; None: the target was deleted."""
        return self.pools.get((entry.workspace, entry.target))


def evolve(state: State, event: Event) -> None:
    """Fold one event into `state`, in place: the projection owns it, and nothing else changes it."""
    key, message = event.key, event.message
    match message:
        case ev.TargetCreated():
            _create(state, Target(key.workspace, key.id, message.spec))
        case ev.TargetUpdated():
            name = (key.workspace, key.id)
            if name in state.targets:
                state.targets[name] = replace(state.targets[name], spec=message.spec)
                state.pools[name].ledger.quotas = quotas_of(key.workspace, message.spec)
        case ev.TargetDeleted():
            state.targets.pop((key.workspace, key.id), None)
            state.pools.pop((key.workspace, key.id), None)
        case ev.NodeJoined():
            _leave(state, key.id, event.time)
            node = Node(key.id, message.target, key.workspace, message.incarnation, message.resources, labels=dict(message.labels))
            state.nodes[key.id] = node
            if (pool := state.pools.get((key.workspace, message.target))) is not None:
                pool.add(machine_of(node, message.gpu_models[0] if message.gpu_models else ""), event.time)
        case ev.NodeDraining():
            if key.id in state.nodes:
                node = state.nodes[key.id] = replace(state.nodes[key.id], draining=True)
                if (pool := state.pool_of(node)) is not None and key.id in pool.nodes:
                    pool.drain(key.id)
        case ev.NodeLost() | ev.NodeLeft():
            if key.id in state.nodes and state.nodes[key.id].incarnation == message.incarnation:
                _leave(state, key.id, event.time)
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
            _attribute_end(state, event)
            _dequeue(state, key.id)
            _unplace(state, key.id, event.time)
            state.canceled.pop(key.id, None)
            state.arrivals.pop(key.id, None)
        case ev.PlacementWaiting() | ev.PlacementProvisioning():
            _explain(state, key.id, message.wait_reason)
        case ev.PlacementMade():
            _place(state, event, message)
        case ev.PlacementReserved():
            _reserve(state, key.id, message.nodes)
        case ev.PlacementCheckpointed():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt and (pool := state.pool_of(held)) is not None:
                pool.record_checkpoint(key.id, message.stored_at)
        case ev.PlacementPreempting():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt and (pool := state.pool_of(held)) is not None:
                pool.mark_preempting(key.id)
        case ev.PlacementRevoked() | ev.PlacementReleased():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt:
                _unplace(state, key.id, event.time)


def machine_of(node: Node, model: str) -> Machine:
    """A node as its pool sees it."""
    total = node.total
    return Machine(node.id, milli(total.cpus), total.memory_bytes, total.gpus, model, frozenset(node.labels.items()))


def _create(state: State, target: Target) -> None:
    key = (target.workspace, target.name)
    state.targets[key] = target
    spec = target.spec
    default = "fgd" if spec.gpu_sharing else "best-fit"
    # A newer version may know more.
    pool = Pool(spec.placement_policy if spec.placement_policy in POLICIES else default, quotas=quotas_of(target.workspace, spec))
    state.pools[key] = pool
    # Runs that waited while the target was gone.
    for run, waiting in state.queue.items():
        if (waiting.workspace, waiting.target) == key:
            request = replace(waiting.request, preemptible=_gives_way(waiting.request.tier, target))
            state.queue[run] = replace(waiting, request=request)
            pool.submit(request)


def _leave(state: State, node: str, now: float) -> None:
    """Free what runs held of a node; that they are lost is what PlacementRevoked says."""
    gone = state.nodes.pop(node, None)
    if gone is not None and (pool := state.pool_of(gone)) is not None and node in pool.nodes:
        pool.remove(node, now)


def _enqueue(state: State, event: Event, spec: c.RunSpec, user: str, attempt: int, delay: float = 0.0) -> None:
    run, workspace = event.key.id, event.key.workspace
    if run in state.canceled:
        return
    target = state.targets.get((workspace, spec.compute_target))
    request = Request(
        run,
        workspace,
        user,
        shape_of(spec.resources, spec.node_labels),
        state.arrivals.get(run, event.sequence),
        event.time,
        spec.node_count or 1,
        spec.min_node_count,
        not spec.pack_nodes,
        spec.priority,
        spec.max_run_duration_seconds,
        preemptible=_gives_way(spec.priority, target),
        attempt=attempt,
        not_before=event.time + delay if delay > 0 else 0.0,
    )
    _dequeue(state, run)
    state.queue[run] = waiting = Waiting(workspace, spec.compute_target, request)
    state.unexplained[run] = None
    if (pool := state.pool_of(waiting)) is not None:
        pool.submit(request)


def _gives_way(priority: int, target: Target | None) -> bool:
    """Whether a run may be preempted: below priority 0, on low-priority targets, and where quotas are guaranteed."""
    if priority < 0:
        return True
    return target is not None and (target.spec.vm_priority == "lowpriority" or any(q.HasField("guaranteed") for q in target.spec.quotas))


def _reserve(state: State, run: str, nodes: Sequence[str]) -> None:
    """Keep nodes for a run, unless it or one of them is gone; no nodes end its reservation."""
    waiting = state.queue.get(run)
    if waiting is None or (pool := state.pool_of(waiting)) is None:
        return
    if nodes and all(node in pool.nodes for node in nodes):
        pool.reservations.set(Reservation(run, frozenset(nodes)))
    else:
        pool.reservations.drop_run(run)


def _dequeue(state: State, run: str) -> None:
    waiting = state.queue.pop(run, None)
    state.unexplained.pop(run, None)
    if waiting is not None and (pool := state.pool_of(waiting)) is not None:
        pool.withdraw(run)


def _place(state: State, event: Event, made: ev.PlacementMade) -> None:
    run, workspace = event.key.id, event.key.workspace
    waiting = state.queue.get(run)
    if waiting is not None:
        request = replace(waiting.request, attempt=made.attempt)
    else:
        spec = made.spec
        request = Request(
            run,
            workspace,
            made.submitted_by,
            shape_of(spec.resources, spec.node_labels),
            event.sequence,
            event.time,
            spec.node_count or 1,
            spec.min_node_count,
            not spec.pack_nodes,
            spec.priority,
            spec.max_run_duration_seconds,
            attempt=made.attempt,
        )
    _unplace(state, run, event.time)
    _dequeue(state, run)
    nodes = tuple((part.node, part.incarnation) for part in made.nodes)
    placed = state.placed[run] = Placed(workspace, made.target, nodes, request, tuple(tuple(part.gpu_indexes) for part in made.nodes))
    pool = state.pool_of(placed)
    # A node that was lost meanwhile, or has restarted, has nothing to give: the placement is about to be revoked.
    if pool is not None and not lost_nodes(state, placed) and all(part.node in pool.nodes for part in made.nodes):
        pool.place(request, [AllocatedNode(part.node, tuple(part.gpu_indexes)) for part in made.nodes], event.time)


def lost_nodes(state: State, placed: Placed) -> list[str]:
    """Nodes of an attempt that are gone, or have restarted since it was placed."""
    return [name for name, incarnation in placed.nodes if (node := state.nodes.get(name)) is None or node.incarnation != incarnation]


def _unplace(state: State, run: str, now: float) -> None:
    held = state.placed.pop(run, None)
    if held is not None and (pool := state.pool_of(held)) is not None:
        pool.finish(run, now)


def _attribute_end(state: State, event: Event) -> None:
    """Count a run's end against the node that is to blame, or clear its nodes."""
    held = state.placed.get(event.key.id)
    if held is None or (pool := state.pool_of(held)) is None:
        return
    message = event.message
    names = {name for name, _ in held.nodes if name in pool.nodes}
    if isinstance(message, ev.RunFailed) and message.exit.reason in _NODE_FAULTS:
        culprit = message.exit.node or (held.nodes[0][0] if held.nodes else "")
        if culprit in names and pool.quarantine.record_node_failure(culprit, event.key.id, event.time):
            pool.reservations.drop_node(culprit)
        return
    for name in sorted(names):
        pool.quarantine.clear_failures(name, event.time)


def _explain(state: State, run: str, reason: c.WaitReason) -> None:
    if run in state.queue:
        state.queue[run] = replace(state.queue[run], reason=reason)
        state.unexplained.pop(run, None)
