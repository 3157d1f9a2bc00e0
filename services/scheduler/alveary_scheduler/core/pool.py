"""The decision core of one compute target: who gets which nodes, who waits and why, who has to make room. Pure.

A `Pool` records what has happened (`submit`, `place`, `finish`, `add`, ...) and says what to do next (`propose`), which
changes nothing: only what is recorded afterwards does. It has no clock and does no IO: times come in as arguments, and
equal histories give equal proposals.

The order: the higher tier; within a tier as `fairness` ranks accounts; within one user the earlier. A run that has
waited for `aging_seconds` comes before all others, in the order of arrival.

The first that finds no room holds a reservation: nodes that will be free soonest. Others are placed behind it (backfill,
as EASY does) where they take none of those nodes, or are over (`max_run_duration`) before it begins.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from alveary_scheduler.core.fairness import FairShareLedger, FairShares, Quota
from alveary_scheduler.core.inventory import NodeInventory, fits_when_empty
from alveary_scheduler.core.mix import RequestMix
from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.core.planner import Obstacle, Planner, Proposal
from alveary_scheduler.core.preemption import RunningAttempts
from alveary_scheduler.core.quarantine import Quarantine
from alveary_scheduler.core.queue import WaitingQueue
from alveary_scheduler.core.requests import Account, AllocatedNode, Request, RunningAttempt
from alveary_scheduler.core.reservation import ReservationBook
from alveary_scheduler.core.resources import Machine, ResourceVector, Shape

# A longer queue is not simulated to forecast a start.
_MAX_FORECAST_QUEUE = 2000


@dataclass(frozen=True, slots=True)
class QueueExplanation:
    """Where a run is in the queue, what stands against it, and when it starts at the latest (None: not foreseeable)."""

    position: int
    obstacle: Obstacle
    limit: ResourceVector | None
    expected: float | None


class Pool:
    """One compute target's nodes, queue and running attempts."""

    def __init__(
        self,
        policy: str = "best-fit",
        *,
        quotas: Mapping[Account, Quota] | None = None,
        half_life_seconds: float = 86400.0,
        aging_seconds: float = 6 * 3600.0,
        max_placements: int = 32,
        seed: int = 0,
        mix: Iterable[tuple[Shape, float]] = (),
    ) -> None:
        """A pool without nodes.

        `half_life_seconds` is that of the average shares, `max_placements` the most of one proposal, so that a round
        stays short. `seed` is the policy's, where it draws. `mix` is how often each shape is asked for; the policy
        "fgd" learns it from arrivals where it is empty.
        """
        mix = list(mix)
        self.policy = policy
        self.nodes = NodeInventory(POLICIES[policy](seed, mix))
        self.mix = RequestMix() if policy == "fgd" and not mix else None
        self.queue = WaitingQueue(aging_seconds)
        self.ledger = FairShareLedger(quotas or {}, half_life_seconds)
        self.reservations = ReservationBook()
        self.quarantine = Quarantine()
        self.running = RunningAttempts()
        self.max_placements = max_placements

    @property
    def waiting(self) -> Mapping[str, Request]:
        """Requests that wait, by run; those whose time has not come yet included."""
        return self.queue.requests

    # ---- nodes ----------------------------------------------------------------------------------------------------

    def add(self, machine: Machine, now: float = 0.0) -> None:
        """A node joins, empty."""
        self.nodes.add(machine)
        self.ledger.resize(machine.shape, 1, now)

    def remove(self, node: str, now: float | None = None) -> list[str]:
        """A node is gone; returns the runs that had a part of it, which hold nothing any more."""
        gone = list(self.nodes.runs_on(node))
        for run in gone:
            self.finish(run, now)
        machine = self.nodes.remove(node)
        self.ledger.resize(machine.shape, -1, 0.0 if now is None else now)
        self.quarantine.forget(node)
        self.reservations.drop_node(node)
        return gone

    def drain(self, node: str) -> None:
        """Place nothing more on a node."""
        self.nodes.drain(node)
        self.reservations.drop_node(node)

    # ---- runs -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A run waits."""
        self.queue.add(request)
        if self.mix is not None and self.mix.observe(request.shape):
            self.nodes.learn(self.mix.current)

    def withdraw(self, run: str) -> None:
        """A run no longer waits."""
        self.queue.remove(run)
        self.reservations.drop_run(run)

    def place(self, request: Request, allocation: Iterable[AllocatedNode], now: float) -> None:
        """A run holds this allocation from now on."""
        allocation = tuple(allocation)
        self.withdraw(request.run)
        self.running.start(RunningAttempt(request, allocation, now, now))
        self.nodes.take(request, allocation)
        self.ledger.charge(request, len(allocation), now)

    def finish(self, run: str, now: float | None = None) -> None:
        """A run gives its allocation back. Without a time its accounts are charged for none."""
        held = self.running.end(run)
        if held is not None:
            self.nodes.give(held.request, held.allocation)
            self.ledger.charge(held.request, -len(held.allocation), held.started if now is None else now)

    def mark_preempting(self, run: str) -> None:
        """An attempt was asked to make room."""
        self.running.mark_preempting(run)

    def record_checkpoint(self, run: str, time: float) -> None:
        """An attempt stored a checkpoint: less is lost with it."""
        if run in self.running:
            held = self.running[run]
            held.last_checkpoint = max(held.last_checkpoint, time)

    def apply(self, proposal: Proposal, now: float) -> None:
        """Record all of a proposal as done, as a simulation does."""
        for placement in proposal.placements:
            self.place(self.waiting[placement.run], placement.allocation, now)
        for preemption in proposal.preemptions:
            self.mark_preempting(preemption.run)
        self.reservations.set(proposal.reservation)

    # ---- questions; none changes anything --------------------------------------------------------------------------

    def planner(self, now: float, cordoned: Collection[str] = ()) -> Planner:
        """A planning round at a time, without the `cordoned` nodes. Only the newest one of a pool is valid."""
        self.queue.advance(now)
        cluster = self.nodes.planning_copy(self.quarantine.active(now) | set(cordoned))
        shares = FairShares(self.ledger, now)
        return Planner(self.nodes, cluster, self.queue, shares, self.running, self.reservations.current, now, self.max_placements)

    def propose(self, now: float, cordoned: Collection[str] = ()) -> Proposal:
        """What to do now. At most `max_placements` placements: record them and ask again."""
        return self.planner(now, cordoned).propose()

    def possible(self, request: Request) -> bool:
        """Whether the nodes would have room for a request if nothing ran; drained ones have none."""
        return fits_when_empty(self.nodes.cluster, request)

    def used(self, workspace: str, user: str = "") -> ResourceVector:
        """What an account holds."""
        return self.ledger.used((workspace, user))

    def order(self, now: float) -> list[Request]:
        """All that wait and may start, in the order in which they would be looked at."""
        return self.planner(now).order()

    def explain(self, run: str, now: float, cordoned: Collection[str] = ()) -> QueueExplanation:
        """Why a run waits, without the `cordoned` nodes.

        Raises:
            KeyError: it does not wait, or its time has not come yet.
        """
        planner = self.planner(now, cordoned)
        position = next((i for i, request in enumerate(planner.order(), 1) if request.run == run), None)
        if position is None:
            raise KeyError(run)
        obstacle, limit = planner.obstacle(self.waiting[run])
        return QueueExplanation(position, obstacle, limit, self.forecast(run, now, cordoned=cordoned))

    def forecast(self, run: str, now: float, steps: int = 200, cordoned: Collection[str] = ()) -> float | None:
        """When a run starts at the latest, if no other arrives and all take as long as they may; None: not foreseeable.

        The `cordoned` nodes are taken to stay so.
        """
        if len(self.waiting) > _MAX_FORECAST_QUEUE:
            return None
        world = copy.deepcopy(self)
        for _ in range(steps):
            while (proposal := world.propose(now, cordoned)).placements:
                world.apply(proposal, now)
                if run in world.running:
                    return now
            world.apply(proposal, now)
            ends = min((held.ends for held in world.running.values()), default=math.inf)
            if ends == math.inf:
                return None
            now = max(now, ends)
            for done in [name for name, held in world.running.items() if held.ends <= now]:
                world.finish(done, now)
        return None
