"""One planning round of one target: who gets which nodes, for whom nodes are kept, who makes room. Pure.

A round reads queue, ledger and reservation, and writes to its own overlay: planned placements, charges on top of the
ledger, and the inventory's planning copy.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from alveary_scheduler.core.blocked import hold_for, make_room
from alveary_scheduler.core.cluster import Cluster
from alveary_scheduler.core.fairness import FairShares, Rank
from alveary_scheduler.core.inventory import NodeInventory
from alveary_scheduler.core.overlay import Hold, PlanningOverlay
from alveary_scheduler.core.preemption import RunningAttempts
from alveary_scheduler.core.queue import AGED, Line, WaitingQueue
from alveary_scheduler.core.requests import Account, AllocatedNode, Kind, Placement, Preemption, Request
from alveary_scheduler.core.reservation import Reservation
from alveary_scheduler.core.resources import ResourceVector, Shape

# Accounts that are searched for the first request that finds no room.
_ACCOUNTS_SEARCHED = 4
# (sequence, run, kind)
_Head = tuple[int, str, Kind]


class Obstacle(Enum):
    """Why a request has no nodes, as far as the pool itself knows."""

    QUOTA = auto()
    NO_SUCH_NODE = auto()
    IN_USE = auto()


@dataclass(frozen=True)
class Proposal:
    """What to do now. Nothing of it is done yet."""

    placements: Sequence[Placement] = ()
    preemptions: Sequence[Preemption] = ()
    # Whom nodes are to be kept for from now on.
    reservation: Reservation | None = None


class Planner:
    """A round at one moment. `propose` once; then ask about those who wait on."""

    def __init__(
        self,
        nodes: NodeInventory,
        cluster: Cluster,
        queue: WaitingQueue,
        shares: FairShares,
        running: RunningAttempts,
        reservation: Reservation | None,
        now: float,
        max_placements: int,
    ) -> None:
        """`cluster`: the planning copy of `nodes`. `max_placements`: of this round, so that it stays short."""
        self._nodes = nodes
        self._queue = queue
        self.shares = shares
        self._overlay = PlanningOverlay(nodes, cluster, shares, running, now)
        self._max_placements = max_placements
        self._reserved = reservation
        # What this round places, by run.
        self.placed = self._overlay.placed
        self._placements: list[Placement] = []
        self._preemptions: list[Preemption] = []
        # By line: how many of its first entries are placed by this round.
        self._taken: dict[int, int] = {}
        # The aged of all accounts share a line: by line, the accounts whose quota refuses the kind in this round.
        self._refused: dict[int, set[Account]] = {}
        self._mixed = False
        # The first that finds no room though there could be some, and the rows kept for it. They bind those behind it;
        # those before it may take what an earlier round kept.
        self._blocked: Request | None = None
        self.hold: Hold | None = None
        self._ranks: dict[Account, Rank] = {}

    def propose(self) -> Proposal:
        """Placements, preemptions and the reservation of this round."""
        owner = self._queue.requests.get(self._reserved.run) if self._reserved is not None else None
        for tier in self._queue.tiers:
            # The owner's rank may have changed since nodes were kept for it, its turn has not. Among the aged, arrival
            # alone counts.
            if owner is not None and tier != AGED and self._queue.tier_of(owner.run) == tier:
                self._place_owner(owner)
            self._plan_tier(tier)
        return Proposal(self._placements, self._preemptions, self._next_reservation())

    def _place_owner(self, owner: Request) -> None:
        count = self.shares.allowed_count(owner)
        if count and not self._try_place(owner, count):
            self._block(owner)

    @property
    def _full(self) -> bool:
        return len(self._placements) >= self._max_placements

    def _plan_tier(self, tier: int) -> None:
        lines = self._queue.lines(tier)
        live = self._live_kinds(tier)
        self._ranks.clear()
        self._mixed = tier == AGED and self.shares.has_quotas
        heap = [self.shares.rank(account) for account in lines]
        heapq.heapify(heap)
        self._block_first(tier, heap, live)
        heads: dict[Account, list[_Head]] = {}
        while heap and live and not self._full:
            rank = heapq.heappop(heap)
            account = rank[3]
            present = self._rank(account)
            if present > rank:  # something was placed for it, or for its workspace, since
                heapq.heappush(heap, present)
                continue
            line = lines[account]
            if account not in heads:
                heads[account] = self._heads(line, live)
            if self._place_next(heads[account], line, live):
                heapq.heappush(heap, present)
        if self._blocked is None and not self._full:
            self._block_first(tier, [self.shares.rank(account) for account in lines], set())

    def _place_next(self, heads: list[_Head], line: Line, live: set[Kind]) -> bool:
        """Look at an account's next request; False: it has none of a kind that may have room."""
        while heads and heads[0][2] not in live:
            heapq.heappop(heads)
        if not heads:
            return False
        _, run, kind = heapq.heappop(heads)
        request = self._queue.requests[run]
        count = self.shares.allowed_count(request)
        if not count:
            if (after := self._head(line, kind)) is not None and after[1] != run:
                heapq.heappush(heads, after)
            return True
        if self._try_place(request, count):
            self._ranks = {account: rank for account, rank in self._ranks.items() if account[0] != request.workspace}
            if (after := self._head(line, kind)) is not None:
                heapq.heappush(heads, after)
        else:
            live.discard(kind)
            self._block(request)
        return True

    def _rank(self, account: Account) -> Rank:
        rank = self._ranks.get(account)
        if rank is None:
            rank = self._ranks[account] = self.shares.rank(account)
        return rank

    def _live_kinds(self, tier: int) -> set[Kind]:
        """Kinds of a tier that may have room; the others have none for certain."""
        fitting: dict[Shape, int] = {}
        live = set()
        for kind in self._queue.kinds(tier):
            shape, count, min_count, spread, _ = kind
            if shape not in fitting:
                fitting[shape] = self._overlay.cluster.fitting(shape)
            if fitting[shape] >= ((min_count or count) if spread else 1):
                live.add(kind)
        return live

    def _heads(self, line: Line, live: set[Kind]) -> list[_Head]:
        """The earliest of each live kind, as a heap."""
        kinds = live if len(live) < len(line) else line
        heads = [head for kind in kinds if kind in live and (head := self._head(line, kind)) is not None]
        heapq.heapify(heads)
        return heads

    def _head(self, line: Line, kind: Kind) -> _Head | None:
        """The earliest of a kind that this round has not placed; of the aged, the earliest that its quota allows."""
        entries = line.get(kind)
        if entries is None:
            return None
        index = self._taken.get(id(entries), 0)
        while index < len(entries) and (entries[index][1] in self.placed or (self._mixed and self._is_refused(entries, index))):
            index += 1
        self._taken[id(entries)] = index
        return (*entries[index], kind) if index < len(entries) else None

    def _is_refused(self, entries: list[tuple[int, str]], index: int) -> bool:
        """Whether an entry is over the quota of its account. What an account holds only grows in a round."""
        request = self._queue.requests[entries[index][1]]
        refused = self._refused.setdefault(id(entries), set())
        account = (request.workspace, request.user)
        if account not in refused and not self.shares.allowed_count(request):
            refused.add(account)
        return account in refused

    def _block_first(self, tier: int, ranks: list[Rank], live: set[Kind]) -> None:
        """Keep nodes for the request that comes before all others of a tier, if it finds no room now though it could."""
        if self._blocked is not None:
            return
        lines = self._queue.lines(tier)
        for rank in heapq.nsmallest(_ACCOUNTS_SEARCHED, ranks):
            line = lines[rank[3]]
            for _, run, kind in sorted(head for kind in line if (head := self._head(line, kind)) is not None):
                request = self._queue.requests[run]
                if kind in live:
                    return
                if self.shares.allowed_count(request) and self.possible(request):
                    self._block(request)
                    return

    def _block(self, request: Request) -> None:
        if self._blocked is None and self.possible(request):
            self._blocked = request
            # Room is made before others are placed behind it: a run is not placed only to be stopped for it.
            if (made := make_room(self._overlay, request)) is not None:
                self.hold, self._preemptions = made
            else:
                self.hold = hold_for(self._overlay, request, self._reserved)

    # ---- placing --------------------------------------------------------------------------------------------------

    def _try_place(self, request: Request, count: int) -> bool:
        allocation = self.find(request, count, self.hold)
        if allocation is None:
            return False
        self._overlay.place(request, allocation)
        self._placements.append(Placement(request.run, request.attempt, allocation))
        return True

    def find(self, request: Request, count: int, hold: Hold | None = None) -> tuple[AllocatedNode, ...] | None:
        """An allocation of at most `count` members that is free now, honouring a hold for another; None: no room."""
        return self._overlay.find(request, count, hold)

    def possible(self, request: Request) -> bool:
        """Whether it would have room if nothing ran."""
        return self._nodes.possible(request)

    def _next_reservation(self) -> Reservation | None:
        if self._blocked is not None and self.hold is not None:
            return Reservation(self.hold.run, frozenset(self._overlay.node(row) for row in self.hold.rows))
        if not self._full:
            return None
        # The round ended early: what was kept is kept, unless it is for a run that has its nodes now.
        kept = self._reserved
        return kept if kept is not None and kept.run not in self.placed else None

    # ---- those who wait on ----------------------------------------------------------------------------------------

    def obstacle(self, request: Request) -> tuple[Obstacle, ResourceVector | None]:
        """What stands against a request, with the quota that it would exceed."""
        if (limit := self.shares.exceeded_quota(request)) is not None:
            return Obstacle.QUOTA, limit
        return (Obstacle.IN_USE if self.possible(request) else Obstacle.NO_SUCH_NODE), None

    def order(self) -> list[Request]:
        """All that wait on, in the order in which they would be looked at."""
        ranks: dict[Account, Rank] = {}

        def key(request: Request) -> tuple[object, ...]:
            tier = self._queue.tier_of(request.run)
            assert tier is not None
            if tier == AGED:
                return (-tier, (0, 0.0, 0.0, ("", "")), request.sequence)
            account = (request.workspace, request.user)
            if account not in ranks:
                ranks[account] = self.shares.rank(account)
            return (-tier, ranks[account], request.sequence)

        return sorted((r for r in self._queue.ready() if r.run not in self.placed), key=key)

    def waiting_kinds(self) -> dict[Kind, int]:
        """How many of each kind wait on and are within their quotas."""
        counts: dict[Kind, int] = {}
        if self.shares.has_quotas:
            for request in self._queue.ready():
                if request.run not in self.placed and self.shares.exceeded_quota(request) is None:
                    counts[request.kind] = counts.get(request.kind, 0) + 1
            return counts
        for tier in self._queue.tiers:
            for kind, number in self._queue.kinds(tier).items():
                counts[kind] = counts.get(kind, 0) + number
        for held in self.placed.values():
            counts[held.request.kind] -= 1
        return counts
