"""What a planning round has planned so far, on top of what is so. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from alveary_scheduler.core.cluster import Cluster
from alveary_scheduler.core.fairness import FairShares
from alveary_scheduler.core.inventory import NodeInventory
from alveary_scheduler.core.preemption import RunningAttempts
from alveary_scheduler.core.requests import AllocatedNode, Request, RunningAttempt


@dataclass(frozen=True, slots=True)
class Hold:
    """Rows that are kept for a run, and from when on it will have them (infinite: when those on them end)."""

    run: str
    rows: frozenset[int]
    at: float


class PlanningOverlay:
    """Planned placements, charged to `shares` and taken from `cluster`, which are the round's own."""

    def __init__(self, nodes: NodeInventory, cluster: Cluster, shares: FairShares, running: RunningAttempts, now: float) -> None:
        """`cluster`: the planning copy of `nodes`."""
        self.nodes = nodes
        self.cluster = cluster
        self.shares = shares
        self.running = running
        self.now = now
        self.placed: dict[str, RunningAttempt] = {}
        self._planned_on: dict[int, list[str]] = {}

    def node(self, row: int) -> str:
        """The node of a row."""
        machine = self.cluster.machines[row]
        assert machine is not None
        return machine.id

    def runs_on(self, row: int) -> Iterator[str]:
        """Runs that hold a part of a row, planned ones included."""
        yield from self.nodes.runs_on(self.node(row))
        yield from dict.fromkeys(self._planned_on.get(row, ()))

    def attempt(self, run: str) -> RunningAttempt:
        """The attempt of a run that runs or is planned."""
        return self.placed.get(run) or self.running[run]

    def place(self, request: Request, allocation: tuple[AllocatedNode, ...]) -> None:
        """Plan a placement."""
        for part in allocation:
            row = self.cluster.rows[part.node]
            self.cluster.take(row, request.shape, part.gpus)
            self._planned_on.setdefault(row, []).append(request.run)
        self.placed[request.run] = RunningAttempt(request, allocation, self.now, self.now)
        self.shares.charge(request, len(allocation))

    def find(self, request: Request, count: int, hold: Hold | None = None) -> tuple[AllocatedNode, ...] | None:
        """An allocation of at most `count` members that is free now, honouring a hold for another; None: no room."""
        cluster, shape = self.cluster, request.shape
        if (restart := getattr(cluster.policy, "restart", None)) is not None:
            restart(request.sequence)
        without: set[int] = set()
        if hold is not None and hold.run != request.run:
            over = hold.at < math.inf and request.duration and self.now + request.duration <= hold.at
            without = set() if over else set(hold.rows)
        taken: list[tuple[int, tuple[int, ...]]] = []
        while len(taken) < count:
            found = cluster.choose(shape, without=without)
            if found is None:
                break
            taken.append(found)
            if count > 1:
                cluster.take(found[0], shape, found[1])
                if request.spread:
                    without.add(found[0])
        if count > 1:
            for row, gpus in taken:
                cluster.give(row, shape, gpus)
        if len(taken) < request.needed:
            return None
        return tuple(AllocatedNode(self.node(row), gpus) for row, gpus in taken)
