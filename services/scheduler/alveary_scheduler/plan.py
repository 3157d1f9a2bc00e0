"""What to do next: place, make room, say why a run waits, start or stop nodes. Pure.

`plan` reads the state and changes nothing; its decisions change it when they come back as events.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_scheduler.core.planner import Obstacle, Planner
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import Placement, Preemption, Request
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import HypotheticalNode, Machine, Shape
from alveary_scheduler.core.sizing import nodes_needed
from alveary_scheduler.resources import milli
from alveary_scheduler.state import State, Target, TargetKey, Waiting
from alveary_scheduler.wait_reason import limit_of, reason_for

# Runs whose wait reason is looked at in one round: those that have one, and those that have none yet.
_MAX_EXPLAINED_AGAIN = 50
_MAX_EXPLAINED = 200


@dataclass(frozen=True)
class Wait:
    """Say why a run waits."""

    run: str
    reason: c.WaitReason


@dataclass(frozen=True)
class Reserve:
    """Keep nodes for a run until it starts, and no others for any run; no nodes end its reservation."""

    workspace: str
    run: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Scale:
    """Have this many nodes of a target."""

    workspace: str
    target: str
    nodes: int
    reason: str


@dataclass(frozen=True)
class ProvisionGroup:
    """Start a group of nodes for a run: as many as it asks for, each as large."""

    workspace: str
    target: str
    run: str
    shape: Shape
    count: int
    spread: bool


@dataclass(frozen=True)
class ReleaseGroup:
    """Give up a group whose run no longer needs it."""

    workspace: str
    target: str
    run: str


Decision = Placement | Preemption | Reserve | Wait | Scale | ProvisionGroup | ReleaseGroup
# By target: the runs for which groups of nodes are on their way, and how many nodes each is still to bring.
Groups = Mapping[TargetKey, Mapping[str, int]]


@dataclass
class _TargetPlan:
    """One target's decisions, and what its waiting runs are told by."""

    planner: Planner
    decisions: list[Decision] = field(default_factory=list)
    # Whether nodes are on their way: for all that wait, or for these runs.
    growing: bool = False
    # Nodes that take no new runs, and why.
    closed: Mapping[str, str] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)

    def grows_for(self, run: str) -> bool:
        """Whether nodes are on their way for a run."""
        return self.growing or run in self.served


def plan(
    state: State,
    starting: Mapping[TargetKey, int],
    idle: Mapping[TargetKey, int],
    now: float,
    groups: Groups | None = None,
    troubles: Mapping[TargetKey, str] | None = None,
    cordoned: Mapping[str, str] | None = None,
) -> list[Decision]:
    """Decisions for all targets, in the order in which to carry them out.

    `starting` is how many nodes of a target are on their way, `idle` how many have been idle for as long as the target
    allows, `groups` what is on its way for single runs, `troubles` why nothing can be had for a target, `cordoned`
    which nodes take no new runs for now, and why. `now` is in Unix seconds.
    """
    plans: dict[TargetKey, _TargetPlan] = {}
    for key in sorted(state.targets):
        coming = (groups or {}).get(key, {})
        plans[key] = _plan_target(state, state.targets[key], starting.get(key, 0), idle.get(key, 0), now, coming, cordoned or {})
    decisions = [decision for one in plans.values() for decision in one.decisions]
    for waiting in _to_explain(state, now):
        key = (waiting.workspace, waiting.target)
        target_plan = plans.get(key)
        if target_plan is not None and waiting.run in target_plan.planner.placed:
            continue
        reason = _explain(state, waiting, target_plan, (troubles or {}).get(key, ""))
        if reason != waiting.reason:
            decisions.append(Wait(waiting.run, reason))
    return decisions


def explain(
    state: State, waiting: Waiting, starting: int, now: float, coming: Mapping[str, int], trouble: str, cordoned: Mapping[str, str]
) -> c.WaitReason | None:
    """The reason that a round at `now` gives for a waiting run; None: the round places it.

    `starting`, `coming` and `trouble` are those of its target, as in `plan`.
    """
    target = state.targets.get((waiting.workspace, waiting.target))
    found = _plan_target(state, target, starting, 0, now, coming, cordoned) if target is not None else None
    if found is not None and waiting.run in found.planner.placed:
        return None
    return _explain(state, waiting, found, trouble)


def _to_explain(state: State, now: float) -> list[Waiting]:
    """Runs whose wait reason is looked at: the first without one, and the first of the queue."""
    unexplained = (run for run in state.unexplained if state.queue[run].request.not_before <= now)
    heads = itertools.chain(itertools.islice(unexplained, _MAX_EXPLAINED), itertools.islice(state.queue, _MAX_EXPLAINED_AGAIN))
    return [state.queue[run] for run in dict.fromkeys(heads) if state.queue[run].request.not_before <= now]


def _plan_target(
    state: State, target: Target, starting: int, idle: int, now: float, coming: Mapping[str, int], cordoned: Mapping[str, str]
) -> _TargetPlan:
    pool = state.pools[target.workspace, target.name]
    planner = pool.planner(now, cordoned.keys())
    proposal = planner.propose()
    found = _TargetPlan(planner, [*proposal.placements, *proposal.preemptions])
    found.closed = _closed_nodes(target, pool, now, cordoned)
    found.decisions += _reserve(target.workspace, pool, planner, proposal.reservation)
    joined = sum((n.workspace, n.target) == (target.workspace, target.name) and not n.draining for n in state.nodes.values())
    if target.spec.kind == c.TARGET_KIND_RAY:
        _plan_groups(found, target, pool, joined, idle, coming)
    elif target.spec.kind == c.TARGET_KIND_LOCAL:
        _plan_scale(found, state, target, pool, joined, starting, idle, cordoned)
    return found  # of other kinds nodes come and go as those who run them say


def _closed_nodes(target: Target, pool: Pool, now: float, cordoned: Mapping[str, str]) -> dict[str, str]:
    """Nodes of a pool that take no new runs, and why. Where the scheduler starts nodes, drained ones are replaced."""
    closed = dict.fromkeys(pool.quarantine.active(now), "different runs failed there in a row")
    if target.spec.kind == c.TARGET_KIND_NODES:
        closed |= dict.fromkeys(pool.nodes.drained, "it is being drained")
    return closed | {node: reason for node, reason in cordoned.items() if node in pool.nodes}


def _reserve(workspace: str, pool: Pool, planner: Planner, wanted: Reservation | None) -> list[Decision]:
    """The change from the reservation that there is to the one that is wanted."""
    present = pool.reservations.current
    if wanted == present:
        return []
    if wanted is not None:
        return [Reserve(workspace, wanted.run, tuple(sorted(wanted.nodes)))]
    assert present is not None
    return [] if present.run in planner.placed else [Reserve(workspace, present.run, ())]


def _plan_scale(
    found: _TargetPlan, state: State, target: Target, pool: Pool, joined: int, starting: int, idle: int, cordoned: Mapping[str, str]
) -> None:
    spec, planner = target.spec, found.planner
    waiting = len(pool.queue) - len(planner.placed)
    present = wanted = joined + starting
    # A further node of a machine that has no space has none either.
    if not any(node in pool.nodes for node in cordoned):
        needed = nodes_needed(planner.waiting_kinds(), _like_new(state, target), starting, spec.max_nodes - joined)
        wanted = joined + max(starting, needed)
    if wanted == present and not waiting and not planner.placed:
        wanted = max(wanted - idle, spec.min_nodes)
    wanted = min(max(wanted, spec.min_nodes), spec.max_nodes)
    if wanted != present:
        reason = f"{waiting} runs wait" if wanted > present else "idle nodes"
        found.decisions.append(Scale(target.workspace, target.name, wanted, reason))
    found.growing = wanted > joined


def _plan_groups(found: _TargetPlan, target: Target, pool: Pool, joined: int, idle: int, coming: Mapping[str, int]) -> None:
    """Groups of nodes to start and to give up."""
    workspace, name, limit = target.workspace, target.name, target.spec.max_nodes
    planner = found.planner
    wanted = {run: count for run, count in coming.items() if pool.queue.tier_of(run) is not None}
    found.decisions += [ReleaseGroup(workspace, name, run) for run in sorted(coming) if run not in wanted]
    nodes = joined + sum(wanted.values())
    found.served.update(wanted)
    crowded = False
    for request in itertools.islice(planner.order(), limit):
        if request.run in found.served or not planner.shares.allowed_count(request):
            continue
        if limit - nodes < request.needed:
            crowded = True  # those behind it wait, so that it gets its turn
            break
        count = min(request.count, limit - nodes)
        nodes += count
        found.served.add(request.run)
        found.decisions.append(ProvisionGroup(workspace, name, request.run, request.shape, count, request.spread))
    if planner.placed or not joined:
        return
    # Idle nodes are as large as a run that is over: where they are in the way of one that waits, they go at once.
    surplus = joined if crowded else idle
    if surplus:
        found.decisions.append(Scale(workspace, name, max(joined - surplus, 0), "idle nodes"))


def _like_new(state: State, target: Target) -> Machine:
    """A node that does not exist yet; its labels and GPU model are those of other nodes of this machine."""
    whole = target.spec.node_resources
    local = (pool for key, pool in state.pools.items() if state.targets[key].spec.kind == c.TARGET_KIND_LOCAL)
    like = next((machine for pool in local for machine in pool.nodes.machines()), Machine("", 0, 0))
    return Machine("", milli(whole.cpus), whole.memory_bytes, whole.gpus, like.model, like.labels)


def _explain(state: State, waiting: Waiting, found: _TargetPlan | None, trouble: str) -> c.WaitReason:
    request, name = waiting.request, waiting.target
    if trouble:
        reason = reason_for(c.WAIT_CODE_PROVIDER_UNAVAILABLE, request, name)
        reason.detail = trouble
        return reason
    if found is None:
        return reason_for(c.WAIT_CODE_TARGET_DELETED, request, name)
    target, pool = state.targets[waiting.workspace, name], state.pools[waiting.workspace, name]
    obstacle, limit = found.planner.obstacle(request)
    reason = reason_for(_wait_code(state, target, found, request, obstacle), request, name)
    reason.target_kind = target.spec.kind
    reason.max_nodes = target.spec.max_nodes
    # Only where the sentence names the number: a reason that differs is told again.
    if target.spec.kind == c.TARGET_KIND_NODES:
        reason.nodes = len(pool.nodes)
    closed = found.closed
    if obstacle is Obstacle.QUOTA and limit is not None:
        reason.limit.CopyFrom(limit_of(limit))
    elif closed and not found.grows_for(request.run):
        reason.code = c.WAIT_CODE_CORDONED
        reason.nodes = len(pool.nodes)
        reason.cordoned_nodes = len(closed)
        reason.node = min(closed)
        reason.detail = closed[reason.node]
    return reason


def _fits_new_node(state: State, target: Target, request: Request) -> bool:
    return HypotheticalNode(_like_new(state, target)).times(request.shape) > 0


def _wait_code(state: State, target: Target, found: _TargetPlan, request: Request, obstacle: Obstacle) -> c.WaitCode.ValueType:
    """The code of a reason, cordoned nodes aside."""
    if obstacle is Obstacle.QUOTA:
        return c.WAIT_CODE_QUOTA
    kind = target.spec.kind
    if kind == c.TARGET_KIND_NODES:
        if not state.pools[target.workspace, target.name].nodes:
            return c.WAIT_CODE_NO_NODES
        return c.WAIT_CODE_NO_SUCH_NODE if obstacle is Obstacle.NO_SUCH_NODE else c.WAIT_CODE_IN_USE
    if kind == c.TARGET_KIND_LOCAL and obstacle is Obstacle.NO_SUCH_NODE and not _fits_new_node(state, target, request):
        return c.WAIT_CODE_NO_SUCH_NODE
    return c.WAIT_CODE_PROVISIONING if found.grows_for(request.run) else c.WAIT_CODE_IN_USE
