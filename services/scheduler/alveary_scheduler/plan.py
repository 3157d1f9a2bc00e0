"""What to do next: place, make room, say why a run waits, start or stop nodes. Pure.

`plan` reads the state and changes nothing; its decisions change it when they come back as events.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from alveary_scheduler.core.planner import Obstacle, Planner
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import Placement, Preemption
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import HypotheticalNode, Machine, Shape
from alveary_scheduler.state import State, Target, TargetKey, Waiting, milli

# Runs whose wait reason is looked at in one round: those that have one, and those that have none yet.
_MAX_EXPLAINED_AGAIN = 50
_MAX_EXPLAINED = 200


@dataclass(frozen=True)
class Wait:
    """Say why a run waits."""

    run: str
    reason: str
    provisioning: bool


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
        wait = _wait(state, waiting, target_plan, (troubles or {}).get(key, ""), cordoned or {})
        if (waiting.reason, waiting.provisioning) != (wait.reason, wait.provisioning):
            decisions.append(wait)
    return decisions


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
    found.decisions += _reserve(target.workspace, pool, planner, proposal.reservation)
    joined = sum((n.workspace, n.target) == (target.workspace, target.name) and not n.draining for n in state.nodes.values())
    if target.spec.kind == "ray":
        _plan_groups(found, target, pool, joined, idle, coming)
    elif target.spec.kind == "local":
        _plan_scale(found, state, target, pool, joined, starting, idle, cordoned)
    return found  # of other kinds nodes come and go as those who run them say


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
        needed = planner.nodes_needed(_like_new(state, target), starting, spec.max_nodes - joined)
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
    local = (pool for key, pool in state.pools.items() if state.targets[key].spec.kind == "local")
    like = next((machine for pool in local for machine in pool.nodes.machines()), Machine("", 0, 0))
    return Machine("", milli(whole.cpus), whole.memory_bytes, whole.gpus, like.model, like.labels)


def _wait(state: State, waiting: Waiting, found: _TargetPlan | None, trouble: str, cordoned: Mapping[str, str]) -> Wait:
    name, request, run = waiting.target, waiting.request, waiting.run
    if trouble:
        return Wait(run, trouble, False)
    if found is None:
        return Wait(run, f"its compute target {name!r} was deleted: cancel the run, or create the target again", False)
    pool, target, growing = state.pools[waiting.workspace, name], state.targets[waiting.workspace, name], found.grows_for(run)
    obstacle, limit = found.planner.obstacle(request)
    if obstacle is Obstacle.QUOTA:
        text = f"waits for {request}: it would exceed the quota of {limit}; wait for others of its own to end, or ask for more"
        return Wait(run, text, False)
    there = len(pool.nodes)
    closed = [node for node in cordoned if node in pool.nodes]
    if closed and not growing:
        first, count = min(closed), len(closed)
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
        if obstacle is Obstacle.NO_SUCH_NODE:
            text = f"waits for {request}: none of the {there} nodes that are there has that much, even when empty"
            return Wait(run, f"{text}; start another trainer for {name}, or ask for less", False)
        return Wait(
            run, f"waits for {request}: the {there} nodes of {name} are in use by earlier runs, or kept for them; "
            "start another trainer for it, or wait", False,
        )  # fmt: skip
    if not HypotheticalNode(_like_new(state, target)).times(request.shape) and obstacle is Obstacle.NO_SUCH_NODE:
        return Wait(
            run, f"waits for {request}: no node of {name} is like that, nor would a new one be; ask for less, or use another target", False
        )
    if growing:
        return Wait(run, f"{name} is starting a node for it ({request})", True)
    return Wait(
        run, f"waits for {request}: the nodes of {name} are in use by earlier runs, or kept for them, and it has its maximum of "
        f"{target.spec.max_nodes}; raise max_nodes, use another target, or wait", False,
    )  # fmt: skip
