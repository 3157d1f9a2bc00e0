"""What is done for the first request that finds no room: nodes are kept for it, or made free by preemption. Pure."""

from __future__ import annotations

import math

import numpy as np

from alveary_scheduler.core.overlay import Hold, PlanningOverlay
from alveary_scheduler.core.packing import Ints
from alveary_scheduler.core.preemption import cheapest_victims, enough, freed
from alveary_scheduler.core.requests import Preemption, Request
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import Shape

# Rows that are looked at in detail for a reservation or a preemption.
_CANDIDATES = 64


def hold_for(plan: PlanningOverlay, request: Request, kept: Reservation | None) -> Hold:
    """The rows that will have room soonest; those that an earlier round kept for it, as long as they take runs."""
    if kept is not None and kept.run == request.run and not any(plan.nodes.is_closed(node) for node in kept.nodes):
        rows = [plan.cluster.rows[node] for node in kept.nodes]
        at = max((_free_at(plan, row, request.shape)[0] for row in rows), default=plan.now)
        return Hold(request.run, frozenset(rows), at)
    times = sorted((*_free_at(plan, row, request.shape), row) for row in _candidates(plan, request))
    chosen = times[: request.needed]
    return Hold(request.run, frozenset(row for *_, row in chosen), max((time for time, *_ in chosen), default=plan.now))


def _candidates(plan: PlanningOverlay, request: Request) -> list[int]:
    """Capable rows, those with the most free first, at most a few."""
    cluster = plan.cluster
    rows = cluster.capable(request.shape)
    free = cluster.gpu[rows].sum(axis=1) if request.shape.gpus else cluster.cpu[rows]
    order: Ints = rows[np.argsort(-free, kind="stable")]
    return [int(row) for row in order[: max(_CANDIDATES, 2 * request.count)]]


def _free_at(plan: PlanningOverlay, row: int, shape: Shape) -> tuple[float, int]:
    """When a row has room for a shape at the latest, and how many attempts end before."""
    room = plan.cluster.free(row)
    if enough(room, shape):
        return plan.now, 0
    held = {run: plan.attempt(run) for run in plan.runs_on(row)}
    for done, (ends, run) in enumerate(sorted((attempt.ends, run) for run, attempt in held.items()), 1):
        room = freed(room, held[run], plan.node(row))
        if enough(room, shape):
            return max(ends, plan.now), done
    return math.inf, len(held) + 1


def _may_preempt(plan: PlanningOverlay, request: Request, run: str) -> bool:
    """A lower tier gives way to a higher one, and a borrower to a request that a guarantee covers."""
    held = plan.running.get(run)
    if held is None or not held.request.preemptible:
        return False  # planned by this round, or never to be stopped
    victim = held.request
    if victim.tier < request.tier:
        return True
    return victim.tier == request.tier and plan.shares.within_guarantee(request) and plan.shares.borrows(victim)


def make_room(plan: PlanningOverlay, request: Request) -> tuple[Hold, list[Preemption]] | None:
    """Preemptions that give a request its nodes, and a hold of these; None: there are none, or some are under way."""
    running = plan.running
    if running.preempting or plan.shares.exceeded_quota(request) is not None:
        return None
    if not running.any_preemptible(request.tier, same_tier=plan.shares.within_guarantee(request)):
        return None
    found: list[tuple[float, int, list[str]]] = []
    for row in _rows_with_victims(plan, request):
        able = [running[run] for run in plan.nodes.runs_on(plan.node(row)) if _may_preempt(plan, request, run)]
        victims = cheapest_victims(plan.cluster.free(row), able, request.shape, plan.node(row), plan.now)
        if victims is not None:
            found.append((sum(running[run].preemption_cost(plan.now) for run in victims), row, victims))
    found.sort()
    chosen = found[: request.needed]
    doomed = dict.fromkeys(run for *_, victims in chosen for run in victims)
    if len(chosen) < request.needed or not doomed:
        return None
    reason = f"makes room for run {request.run}, which comes first"
    preemptions = [Preemption(run, running[run].request.attempt, request.run, reason) for run in doomed]
    return Hold(request.run, frozenset(row for _, row, _ in chosen), plan.now), preemptions


def _rows_with_victims(plan: PlanningOverlay, request: Request) -> list[int]:
    """Capable rows that are empty or have a run that may be preempted, at most a few."""
    limit = max(4 * _CANDIDATES, 4 * request.count)
    found: list[int] = []
    for row in plan.cluster.capable(request.shape):
        runs = list(plan.runs_on(int(row)))
        if not runs or any(_may_preempt(plan, request, run) for run in runs):
            found.append(int(row))
            if len(found) == limit:
                break
    return found
