"""The decision core of one compute target: who gets which nodes, who waits and why, who has to make room. Pure.

A `Pool` is told what happened (`submit`, `place`, `finish`, `add`, ...) and asked what to do (`decide`). It has no
clock and does no IO: times come in as arguments, and equal histories give equal decisions.

Who comes first: the higher tier; within a tier those within their guaranteed quota, then the workspace, then the user,
whose dominant share (Ghodsi et al., Dominant Resource Fairness, NSDI'11) of what they hold, plus its average over the
last while, is least for their weight; within one user the earlier. Whoever has waited for `patience` seconds comes
before all others, in the order of arrival.

The first that finds no room holds a reservation: rows that will be free soonest. Others are placed behind it (backfill,
as EASY does) where they take none of those rows, or are over (`max_run_duration`) before it begins.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from alveary_scheduler.packing import POLICIES, WHOLE, Cluster, Ints, Machine, Shape, typical

INFINITE = math.inf
# The tier of those who have waited for too long.
AGED = 10**9
# Rows that are looked at in detail for a reservation or a preemption.
_CANDIDATES = 64
# How many arrivals the mix of shapes is learnt from, and how often it is learnt anew.
_LEARN_FROM, _LEARN_EVERY = 4096, 512
# By how much of it a mix must differ from the one in use (total variation distance) before all is scored anew.
_SHIFT = 0.1


@dataclass(frozen=True, slots=True)
class Amount:
    """Thousandths of a core, bytes, thousandths of a GPU. As a limit: None is none."""

    cpu_milli: int | None = 0
    memory: int | None = 0
    gpu_milli: int | None = 0

    def plus(self, shape: Shape, count: int) -> Amount:
        """With `count` shares of a shape added (or taken away: negative)."""
        return Amount(
            (self.cpu_milli or 0) + count * shape.cpu_milli, (self.memory or 0) + count * shape.memory,
            (self.gpu_milli or 0) + count * shape.gpu_total,
        )  # fmt: skip

    def within(self, limit: Amount) -> bool:
        """Whether no part of it is beyond the limit's."""
        pairs = ((self.cpu_milli, limit.cpu_milli), (self.memory, limit.memory), (self.gpu_milli, limit.gpu_milli))
        return all(most is None or (mine or 0) <= most for mine, most in pairs)

    def __str__(self) -> str:
        parts = [f"{self.cpu_milli / 1000:g} CPU"] if self.cpu_milli is not None else []
        parts += [f"{self.memory / 2**30:.1f} GiB"] if self.memory is not None else []
        parts += [f"{self.gpu_milli / WHOLE:g} GPU"] if self.gpu_milli is not None else []
        return " + ".join(parts) or "no limit"


UNLIMITED = Amount(None, None, None)


@dataclass(frozen=True, slots=True)
class Quota:
    """Of a workspace (user empty) or of one of its users. Unset parts of `guaranteed` guarantee nothing."""

    weight: float = 1.0
    guaranteed: Amount | None = None
    maximum: Amount = UNLIMITED


@dataclass(frozen=True, slots=True)
class Request:
    """A run that wants nodes: `count` shares of one shape, all or none (at least `least` of them where that is less)."""

    run: str
    workspace: str
    user: str
    shape: Shape
    sequence: int
    arrived: float = 0.0
    count: int = 1
    least: int = 0
    # Each share on a node of its own; else as few nodes as will do.
    spread: bool = True
    tier: int = 0
    # Longest duration in seconds; 0: unknown.
    duration: float = 0.0
    preemptible: bool = True
    attempt: int = 1

    @property
    def kind(self) -> Kind:
        """What decides whether there is room for it."""
        return (self.shape, self.count, self.least, self.spread, self.duration)

    def __str__(self) -> str:
        each = f"{self.count} nodes of {self.shape}" if self.count > 1 else str(self.shape)
        return each + ("" if not self.least or self.least == self.count else f" (at least {self.least})")


Kind = tuple[Shape, int, int, bool, float]


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a node."""

    node: str
    gpus: tuple[int, ...] = ()


@dataclass(slots=True)
class Running:
    """An attempt that holds its shares."""

    request: Request
    shares: tuple[Share, ...]
    started: float
    # When it last made sure that less would be lost; its start at first.
    saved: float
    leaving: bool = False

    @property
    def ends(self) -> float:
        """When it will be over at the latest."""
        return self.started + self.request.duration if self.request.duration else INFINITE

    def lost(self, now: float) -> float:
        """GPU-seconds (cores weigh an eighth of a GPU) of work that ending it now would waste."""
        shape = self.request.shape
        return (now - self.saved) * len(self.shares) * (shape.gpu_total + shape.cpu_milli / 8) / WHOLE


@dataclass(frozen=True, slots=True)
class Place:
    """Give a run its nodes."""

    run: str
    attempt: int
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Preempt:
    """Ask an attempt to save what it has and end; it comes back as a new attempt."""

    run: str
    attempt: int
    beneficiary: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Say why a run waits."""

    run: str
    reason: str
    provisioning: bool = False


Decision = Place | Preempt | Wait


@dataclass(frozen=True, slots=True)
class Reservation:
    """Rows that are kept for a run, and from when on it will have them (INFINITE: when those on them end)."""

    run: str
    rows: frozenset[int]
    at: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Why a run is queued."""

    position: int
    ahead: int
    waits_for: str
    would_help: str
    expected: float | None


@dataclass(slots=True)
class _Account:
    """What a workspace or user holds, and held on average."""

    used: Amount = field(default_factory=Amount)
    average: float = 0.0
    at: float = 0.0


# One account's requests of one tier: a heap per kind. Entries of runs that wait no longer are dropped when met.
_Line = dict[Kind, list[tuple[int, str]]]
_Rank = tuple[int, float, float, tuple[str, str]]


class Pool:
    """One compute target's nodes, queue and running attempts."""

    def __init__(
        self, policy: str = "best-fit", *, quotas: Mapping[tuple[str, str], Quota] | None = None, half_life: float = 86400.0,
        patience: float = 6 * 3600.0, most: int = 32, seed: int = 0, mix: Iterable[tuple[Shape, float]] = (),
    ) -> None:  # fmt: skip
        """`half_life`: of the average share, seconds. `most`: placements of one `decide`, so that a round stays short."""
        self.policy = policy
        self.cluster = Cluster(POLICIES[policy](seed, mix))
        self._learns = policy == "fgd" and not mix
        self.quotas: dict[tuple[str, str], Quota] = dict(quotas or {})
        self.half_life, self.patience, self.most = half_life, patience, most
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Running] = {}
        self.reservation: Reservation | None = None
        self.total = Amount()
        self._lines: dict[int, dict[tuple[str, str], _Line]] = {}
        self._tier_of: dict[str, int] = {}
        # How many of each kind wait in a tier.
        self._kinds: dict[int, dict[Kind, int]] = {}
        self._now = 0.0
        self._possible: dict[Kind, bool] = {}
        self._evictable: dict[int, int] = {}
        self._leaving: set[str] = set()
        self._ages: list[tuple[float, int, str]] = []
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._on: dict[int, dict[str, None]] = {}
        self._untold: dict[str, None] = {}
        self._recent: list[Shape] = []
        self._learnt = 0
        self._mix: list[tuple[Shape, float]] = []
        self._failures: dict[str, list[str]] = {}
        self.quarantined: dict[str, float] = {}
        self._drained: set[str] = set()
        self.cordoned: set[str] = set()

    # ---- nodes ----------------------------------------------------------------------------------------------------

    def add(self, machine: Machine) -> None:
        """A node joins, empty."""
        self._possible.clear()
        row = self.cluster.add(machine)
        self._on[row] = {}
        self.total = self.total.plus(_whole(machine), 1)

    def remove(self, node: str) -> list[str]:
        """A node is gone; the runs that had a share of it hold nothing any more, and are named."""
        row = self.cluster.rows[node]
        gone = list(self._on[row])
        for run in gone:
            self.finish(run)
        machine = self.cluster.machines[row]
        assert machine is not None
        self.total = self.total.plus(_whole(machine), -1)
        self._possible.clear()
        self.cluster.remove(node)
        self.quarantined.pop(node, None)
        self._failures.pop(node, None)
        self._drained.discard(node)
        self.cordoned.discard(node)
        self.reservation = None
        return gone

    def drain(self, node: str) -> None:
        """Place nothing more on a node."""
        self._drained.add(node)
        self._possible.clear()
        self.cluster.close(node)
        self.reservation = None

    def cordon(self, nodes: Collection[str]) -> None:
        """Place nothing on these nodes for now, and again on those that were named the last time and are not now."""
        wanted = {node for node in nodes if node in self.cluster.rows}
        if wanted == self.cordoned:
            return
        reopened = self.cordoned - wanted - self._drained - self.quarantined.keys()
        self.cordoned = wanted
        self._possible.clear()
        self.reservation = None
        for node in wanted:
            self.cluster.close(node)
        for node in reopened:
            self.cluster.close(node, False)

    def blame(self, node: str, run: str, now: float, limit: int = 3, seconds: float = 600.0) -> bool:
        """An attempt failed for a reason that may be its node's; True: the node is now in quarantine.

        `limit` different runs in a row put it there, for `seconds`; `absolve` breaks the row.
        """
        runs = self._failures.setdefault(node, [])
        if run not in runs:
            runs.append(run)
        if len(runs) < limit or node in self.quarantined:
            return False
        self.quarantined[node] = now + seconds
        self._possible.clear()
        self.cluster.close(node)
        self.reservation = None
        return True

    def absolve(self, node: str) -> None:
        """An attempt on the node went well."""
        self._failures.pop(node, None)

    def _pardon(self, now: float) -> None:
        for node in [n for n, until in self.quarantined.items() if until <= now]:
            del self.quarantined[node]
            self._failures.pop(node, None)
            self._possible.clear()
            if node not in self._drained and node not in self.cordoned:
                self.cluster.close(node, False)

    # ---- runs -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A run waits."""
        self.waiting[request.run] = request
        self._untold[request.run] = None
        self._line_up(request, request.tier)
        heapq.heappush(self._ages, (request.arrived, request.sequence, request.run))
        if self._learns:
            self._recent.append(request.shape)
            if len(self._recent) - self._learnt >= _LEARN_EVERY or self._learnt == 0:
                del self._recent[:-_LEARN_FROM]
                mix = typical(self._recent)
                if _apart(mix, self._mix) > _SHIFT:
                    self._mix = mix
                    self.cluster.policy.learn(mix)  # type: ignore[attr-defined]
                    self.cluster.forget()
                self._learnt = len(self._recent)

    def _line_up(self, request: Request, tier: int) -> None:
        self._tier_of[request.run] = tier
        line = self._lines.setdefault(tier, {}).setdefault(self._key(request), {})
        heapq.heappush(line.setdefault(request.kind, []), (request.sequence, request.run))
        kinds = self._kinds.setdefault(tier, {})
        kinds[request.kind] = kinds.get(request.kind, 0) + 1

    def _step_out(self, request: Request) -> None:
        tier = self._tier_of.pop(request.run)
        kinds = self._kinds[tier]
        kinds[request.kind] -= 1
        if not kinds[request.kind]:
            del kinds[request.kind]

    def withdraw(self, run: str) -> None:
        """It waits no longer: cancelled, or placed. What the lines still hold of it is passed over."""
        request = self.waiting.pop(run, None)
        self._untold.pop(run, None)
        if request is not None:
            self._step_out(request)
        if self.reservation is not None and self.reservation.run == run:
            self.reservation = None

    def place(self, request: Request, shares: Iterable[Share], now: float) -> None:
        """A run holds these shares from now on."""
        shares = tuple(shares)
        self.withdraw(request.run)
        self.running[request.run] = Running(request, shares, now, now)
        for share in shares:
            row = self.cluster.rows[share.node]
            self.cluster.take(row, request.shape, share.gpus)
            self._on[row][request.run] = None
        self._charge(request, len(shares), now)
        if request.preemptible:
            self._evictable[request.tier] = self._evictable.get(request.tier, 0) + 1

    def finish(self, run: str, now: float | None = None) -> None:
        """It gave its shares back."""
        held = self.running.pop(run, None)
        if held is None:
            return
        self._leaving.discard(run)
        if held.request.preemptible:
            self._evictable[held.request.tier] -= 1
        for share in held.shares:
            row = self.cluster.rows[share.node]
            self.cluster.give(row, held.request.shape, share.gpus)
            self._on[row].pop(run, None)
        self._charge(held.request, -len(held.shares), held.started if now is None else now)

    def unplace(self, run: str, now: float) -> None:
        """Take a placement of `decide` back: it waits as if it had never been placed."""
        request = self.running[run].request
        self.finish(run, now)
        self.waiting[run] = request
        aged = request.arrived + self.patience <= now
        self._line_up(request, AGED if aged else request.tier)
        if not aged:
            heapq.heappush(self._ages, (request.arrived, request.sequence, run))

    def asked(self, run: str) -> None:
        """It was told to make room."""
        if run in self.running:
            self.running[run].leaving = True
            self._leaving.add(run)

    def saved(self, run: str, now: float) -> None:
        """It stored a checkpoint."""
        if run in self.running:
            self.running[run].saved = max(self.running[run].saved, now)

    def _charge(self, request: Request, count: int, now: float) -> None:
        for key in ((request.workspace, ""), (request.workspace, request.user)):
            account = self._accounts.setdefault(key, _Account(at=now))
            self._advance(account, now)
            account.used = account.used.plus(request.shape, count)

    def _advance(self, account: _Account, now: float) -> None:
        if now > account.at:
            kept = 0.5 ** ((now - account.at) / self.half_life)
            account.average = account.average * kept + self.dominant(account.used) * (1 - kept)
            account.at = now

    def dominant(self, used: Amount) -> float:
        """The largest of the shares of what the pool has; 0 to 1."""
        pairs = ((used.cpu_milli, self.total.cpu_milli), (used.memory, self.total.memory), (used.gpu_milli, self.total.gpu_milli))
        return max((mine / all_of for mine, all_of in pairs if mine and all_of), default=0.0)

    def usage(self, workspace: str, user: str = "") -> Amount:
        """What an account holds."""
        account = self._accounts.get((workspace, user))
        return account.used if account else Amount()

    # ---- who comes first ------------------------------------------------------------------------------------------

    def _level(self, key: tuple[str, str], now: float) -> float:
        account = self._accounts.get(key)
        if account is None:
            return 0.0
        self._advance(account, now)
        return (self.dominant(account.used) + account.average) / self._quota(key).weight

    def _quota(self, key: tuple[str, str]) -> Quota:
        return self.quotas.get(key) or _FREE

    def _rank(self, key: tuple[str, str], now: float) -> tuple[int, float, float, tuple[str, str]]:
        workspace = (key[0], "")
        owed = any(self._owed(k) for k in (workspace, key))
        return (0 if owed else 1, self._level(workspace, now), self._level(key, now), key)

    def _owed(self, key: tuple[str, str]) -> bool:
        guaranteed = self._quota(key).guaranteed
        return guaranteed is not None and self.usage(*key).within(guaranteed) and self.usage(*key) != guaranteed

    def _beyond(self, request: Request) -> Amount | None:
        """The maximum that it would exceed."""
        for key in ((request.workspace, ""), (request.workspace, request.user)):
            limit = self._quota(key).maximum
            if limit is not UNLIMITED and not self.usage(*key).plus(request.shape, request.least or request.count).within(limit):
                return limit
        return None

    def most_shares(self, request: Request) -> int:
        """How many shares its quotas let it have; 0: fewer than it needs."""
        most, least = request.count, request.least or request.count
        for key in ((request.workspace, ""), (request.workspace, request.user)):
            limit = self._quota(key).maximum
            while limit is not UNLIMITED and most >= least and not self.usage(*key).plus(request.shape, most).within(limit):
                most -= 1
        return most if most >= least else 0

    def _head(self, tier: int, line: _Line, kind: Kind) -> tuple[int, str, Kind] | None:
        """The earliest of a kind."""
        entries = line.get(kind)
        while entries:
            sequence, run = entries[0]
            request = self.waiting.get(run)
            if request is not None and request.sequence == sequence and self._tier_of[run] == tier and request.kind == kind:
                return (sequence, run, kind)
            heapq.heappop(entries)
        line.pop(kind, None)
        return None

    def _key(self, request: Request) -> tuple[str, str]:
        return ("", "") if self._tier_of[request.run] == AGED else (request.workspace, request.user)

    def _age(self, now: float) -> None:
        while self._ages and self._ages[0][0] + self.patience <= now:
            _, sequence, run = heapq.heappop(self._ages)
            request = self.waiting.get(run)
            if request is not None and request.sequence == sequence and self._tier_of[run] != AGED:
                self._step_out(request)
                self._line_up(request, AGED)

    def order(self, now: float) -> list[Request]:
        """All that wait, in the order in which they would be looked at now."""
        self._age(now)
        ranks: dict[tuple[str, str], tuple[int, float, float, tuple[str, str]]] = {}

        def key(request: Request) -> tuple[object, ...]:
            tier = self._tier_of[request.run]
            if tier == AGED:
                return (-tier, (0, 0.0, 0.0, ("", "")), request.sequence)
            who = (request.workspace, request.user)
            if who not in ranks:
                ranks[who] = self._rank(who, now)
            return (-tier, ranks[who], request.sequence)

        return sorted(self.waiting.values(), key=key)

    # ---- decisions ------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Decision]:
        """What to do now; placements are already carried out in the pool. At most `most` placements: call again."""
        self._pardon(now)
        self._age(now)
        self._now = now
        decisions: list[Decision] = []
        first: Request | None = None
        owner = self.waiting.get(self.reservation.run) if self.reservation is not None else None
        # A reservation binds those who come after its owner: who comes before may take what it keeps.
        bound: Reservation | None = None

        def block(request: Request) -> None:
            nonlocal first, bound
            if first is None and self.possible(request):
                first = request
                self._reserve(request, now)
                bound = self.reservation

        def attempt(request: Request, most: int) -> bool:
            shares = self.find(request, now, most, bound)
            if shares is not None:
                self.place(request, shares, now)
                decisions.append(Place(request.run, request.attempt, shares))
            return shares is not None

        for tier in sorted(self._lines, reverse=True):
            # Its rank may have changed since it was given its rows, its turn has not. Among the aged, arrival alone counts.
            turn = owner is not None and tier != AGED and self._tier_of.get(owner.run) == tier
            if owner is not None and turn and (most := self.most_shares(owner)) and not attempt(owner, most):
                block(owner)
            lines = self._lines[tier]
            live = self._live(tier)
            heap = [self._rank(key, now) for key in lines]
            heapq.heapify(heap)
            if first is None and (ahead := self._first(tier, heap, live)) is not None:
                block(ahead)
            heads: dict[tuple[str, str], list[tuple[int, str, Kind]]] = {}
            ranks: dict[tuple[str, str], _Rank] = {}
            while heap and live and len(decisions) < self.most:
                rank = heapq.heappop(heap)
                key = rank[3]
                if (present := ranks.get(key)) is None:
                    present = ranks[key] = self._rank(key, now)
                if present > rank:  # something was placed for it, or for its workspace, since
                    heapq.heappush(heap, present)
                    continue
                line = lines[key]
                if key not in heads:
                    kinds = live if len(live) < len(line) else list(line)
                    heads[key] = [h for kind in kinds if kind in live and (h := self._head(tier, line, kind)) is not None]
                    heapq.heapify(heads[key])
                mine = heads[key]
                while mine and (mine[0][2] not in live or mine[0][1] not in self.waiting):
                    heapq.heappop(mine)
                if not mine:
                    continue
                _, run, kind = heapq.heappop(mine)
                request = self.waiting[run]
                if not (most := self.most_shares(request)):
                    pass
                elif attempt(request, most):
                    ranks = {k: r for k, r in ranks.items() if k[0] != request.workspace}
                    if (after := self._head(tier, line, kind)) is not None:
                        heapq.heappush(mine, after)
                else:
                    live.discard(kind)
                    block(request)
                heapq.heappush(heap, present)
            if first is None and len(decisions) < self.most and (ahead := self._first(tier, None, set())) is not None:
                block(ahead)
            for key in [k for k, line in lines.items() if not line]:
                del lines[key]
            if not lines:
                del self._lines[tier]
        if first is None and len(decisions) < self.most:
            self.reservation = None
        if first is not None:
            decisions += self._make_room(first, now)
        decisions += [Wait(run, *self.why(self.waiting[run])) for run in self._tell() if run in self.waiting]
        return decisions

    def _live(self, tier: int) -> set[Kind]:
        """Kinds of a tier that may have room; what is not among them has none for certain."""
        free: dict[Shape, int] = {}
        live = set()
        for kind in self._kinds.get(tier, ()):
            shape, count, least, spread, _ = kind
            if shape not in free:
                free[shape] = self.cluster.fitting(shape)
            if free[shape] >= ((least or count) if spread else 1):
                live.add(kind)
        return live

    def _first(self, tier: int, ranks: list[_Rank] | None, live: set[Kind]) -> Request | None:
        """Who of a tier comes before all others, if there is no room for it now, though there could be."""
        lines = self._lines.get(tier, {})
        for rank in heapq.nsmallest(4, ranks) if ranks is not None else heapq.nsmallest(4, (self._rank(k, self._now) for k in lines)):
            line = lines[rank[3]]
            heads = sorted(h for kind in list(line) if (h := self._head(tier, line, kind)) is not None)
            for _, run, kind in heads:
                request = self.waiting[run]
                if kind in live:
                    return None
                if self.most_shares(request) and self.possible(request):
                    return request
        return None

    def _tell(self) -> Iterator[str]:
        for run in list(itertools.islice(self._untold, 100)):
            del self._untold[run]
            yield run

    def find(self, request: Request, now: float, most: int = 0, reserved: Reservation | None = None) -> tuple[Share, ...] | None:
        """Shares for a run that are free now, at most `most`, honouring the reservation of another; None: no room."""
        cluster, shape = self.cluster, request.shape
        kept: frozenset[int] = frozenset()
        if reserved is not None and reserved.run != request.run:
            over = reserved.at < INFINITE and request.duration and now + request.duration <= reserved.at
            kept = frozenset() if over else reserved.rows
        most = most or request.count
        taken: list[tuple[int, tuple[int, ...]]] = []
        without = set(kept)
        while len(taken) < most:
            found = cluster.choose(shape, without=without)
            if found is None:
                break
            taken.append(found)
            if most > 1:
                cluster.take(*found[:1], shape, found[1])
                if request.spread:
                    without.add(found[0])
        if most > 1:
            for row, gpus in taken:
                cluster.give(row, shape, gpus)
        if len(taken) < (request.least or request.count):
            return None
        machines = cluster.machines
        return tuple(Share(machines[row].id, gpus) for row, gpus in taken)  # type: ignore[union-attr]

    def possible(self, request: Request) -> bool:
        """Whether it would have room if nothing ran."""
        kind = request.kind
        if kind not in self._possible:
            self._possible[kind] = self._could(request)
        return self._possible[kind]

    def _could(self, request: Request) -> bool:
        rows = self.cluster.capable(request.shape)
        need = request.least or request.count
        if request.spread or len(rows) >= need:
            return len(rows) >= need
        return sum(self.cluster.times(request.shape, int(r)) for r in rows) >= need

    # ---- reservations ---------------------------------------------------------------------------------------------

    def _reserve(self, request: Request, now: float) -> None:
        held = self.reservation
        if held is not None and held.run == request.run:
            # It keeps its rows: whatever runs on them ends, so that its turn comes.
            at = max((self._free_at(row, request.shape, now)[0] for row in held.rows), default=now)
            self.reservation = replace(held, at=at)
            return
        rows = self._candidates(request)
        times = sorted((*self._free_at(int(row), request.shape, now), int(row)) for row in rows)
        chosen = times[: request.least or request.count]
        self.reservation = Reservation(request.run, frozenset(row for *_, row in chosen), max((t for t, *_ in chosen), default=now))

    def _candidates(self, request: Request) -> Ints:
        """Capable rows, those with the most free first, at most a few."""
        cluster = self.cluster
        rows = cluster.capable(request.shape)
        free = cluster.gpu[rows].sum(axis=1) if request.shape.gpus else cluster.cpu[rows]
        order: Ints = rows[np.argsort(-free, kind="stable")]
        return order[: max(_CANDIDATES, 2 * request.count)]

    def _free_at(self, row: int, shape: Shape, now: float) -> tuple[float, int]:
        """When a row has room for a shape at the latest, and how many attempts end before."""
        cluster = self.cluster
        cpu, memory, gpu = int(cluster.cpu[row]), int(cluster.memory[row]), cluster.gpu[row].copy()
        if _enough(cpu, memory, gpu, shape):
            return now, 0
        runs = sorted((self.running[run].ends, run) for run in self._on[row])
        for done, (ends, run) in enumerate(runs, 1):
            held = self.running[run]
            for share in held.shares:
                if cluster.rows[share.node] == row:
                    cpu += held.request.shape.cpu_milli
                    memory += held.request.shape.memory
                    gpu[list(share.gpus)] += held.request.shape.gpu_milli
            if _enough(cpu, memory, gpu, shape):
                return max(ends, now), done
        return INFINITE, len(runs) + 1

    # ---- preemption -----------------------------------------------------------------------------------------------

    def may_evict(self, request: Request, held: Running) -> bool:
        """A lower tier gives way to a higher one, and a borrower to whoever is owed a guarantee."""
        victim = held.request
        if not victim.preemptible:
            return False
        if victim.tier < request.tier:
            return True
        return victim.tier == request.tier and self._within_guarantee(request) and self._borrows(victim)

    def _within_guarantee(self, request: Request) -> bool:
        for key in ((request.workspace, ""), (request.workspace, request.user)):
            guaranteed = self._quota(key).guaranteed
            if guaranteed is not None and self.usage(*key).plus(request.shape, request.least or request.count).within(guaranteed):
                return True
        return False

    def _borrows(self, victim: Request) -> bool:
        for key in ((victim.workspace, victim.user), (victim.workspace, "")):
            guaranteed = self._quota(key).guaranteed
            if guaranteed is not None and self.usage(*key).within(guaranteed):
                return False
        return True

    def _make_room(self, request: Request, now: float) -> list[Decision]:
        if self._leaving or self._beyond(request) is not None:
            return []  # some are on their way out: see what that gives first
        owed = self._within_guarantee(request)
        if not any(n and (tier < request.tier or (owed and tier == request.tier)) for tier, n in self._evictable.items()):
            return []
        found: list[tuple[float, int, list[str]]] = []
        for row in self._candidates_with_victims(request):
            victims = self._victims(row, request, now)
            if victims is not None:
                found.append((sum(self.running[v].lost(now) for v in victims), row, victims))
        found.sort()
        need = request.least or request.count
        if len(found) < need:
            return []
        chosen = found[:need]
        doomed = list(dict.fromkeys(v for *_, victims in chosen for v in victims))
        self.reservation = Reservation(request.run, frozenset(row for _, row, _ in chosen), now)
        reason = f"makes room for run {request.run}, which comes first"
        decisions: list[Decision] = []
        for run in doomed:
            self.running[run].leaving = True
            self._leaving.add(run)
            decisions.append(Preempt(run, self.running[run].request.attempt, request.run, reason))
        return decisions

    def _candidates_with_victims(self, request: Request) -> list[int]:
        rows = [int(r) for r in self.cluster.capable(request.shape)]
        cheap = (r for r in rows if not self._on[r] or any(self.may_evict(request, self.running[run]) for run in self._on[r]))
        return list(itertools.islice(cheap, max(4 * _CANDIDATES, 4 * request.count)))

    def _victims(self, row: int, request: Request, now: float) -> list[str] | None:
        """Whom to end for one share on this row, least work lost first; None: it would not do."""
        cluster, shape = self.cluster, request.shape
        cpu, memory, gpu = int(cluster.cpu[row]), int(cluster.memory[row]), cluster.gpu[row].copy()
        able = [run for run in self._on[row] if self.may_evict(request, self.running[run])]
        able.sort(key=lambda run: (self.running[run].request.tier, self.running[run].lost(now), run))
        out: list[str] = []

        def shift(run: str, sign: int) -> None:
            nonlocal cpu, memory
            held = self.running[run]
            for share in held.shares:
                if cluster.rows[share.node] == row:
                    cpu += sign * held.request.shape.cpu_milli
                    memory += sign * held.request.shape.memory
                    gpu[list(share.gpus)] += sign * held.request.shape.gpu_milli

        for run in able:
            if _enough(cpu, memory, gpu, shape):
                break
            shift(run, +1)
            out.append(run)
        if not _enough(cpu, memory, gpu, shape):
            return None
        for run in reversed(out.copy()):  # the dearest first: perhaps it need not go
            shift(run, -1)
            if _enough(cpu, memory, gpu, shape):
                out.remove(run)
            else:
                shift(run, +1)
        return out

    # ---- why ------------------------------------------------------------------------------------------------------

    def why(self, request: Request) -> tuple[str, bool]:
        """(what it waits for and what would help, whether nodes are on their way). The same for as long as it is so."""
        if (limit := self._beyond(request)) is not None:
            return f"waits for {request}: it would exceed the quota of {limit}; wait for others of its own to end, or ask for more", False
        if not self.possible(request):
            nodes = sum(m is not None for m in self.cluster.machines)
            return f"waits for {request}: none of the {nodes} nodes that are there has that much, even when empty" if nodes else f"waits for {request}: no node is there", False  # fmt: skip
        return f"waits for {request}: what would fit is in use by earlier runs, or kept for them; wait, or ask for less", False

    def standing(self, run: str, now: float) -> Standing:
        """Position in the queue, what it waits for, what would let it start, and when that is expected.

        Raises:
            KeyError: it does not wait.
        """
        request = self.waiting[run]
        ahead = next(i for i, r in enumerate(self.order(now)) if r.run == run)
        reason, _ = self.why(request)
        waits_for, _, helps = reason.partition(": ")
        return Standing(ahead + 1, ahead, waits_for, helps, self.forecast(run, now))

    def forecast(self, run: str, now: float, steps: int = 200) -> float | None:
        """When a run will begin at the latest, if nobody else comes and all take as long as they may; None: not foreseeable."""
        if len(self.waiting) > 2000:
            return None
        world = copy.deepcopy(self)
        for _ in range(steps):
            while any(isinstance(d, Place) for d in world.decide(now)):
                if run in world.running:
                    return now
            ends = min((r.ends for r in world.running.values()), default=INFINITE)
            if ends == INFINITE:
                return None
            now = max(now, ends)
            for done in [name for name, held in world.running.items() if held.ends <= now]:
                world.finish(done, now)
        return None

    # ---- scaling --------------------------------------------------------------------------------------------------

    def nodes_needed(self, machine: Machine, coming: int, most: int) -> int:
        """How many empty nodes like `machine` the whole queue could use, counting `coming` that are on their way.

        At least `coming`, at most `most`. First fit, the most nodes first, then the largest.
        """
        counts: dict[Kind, int] = {}
        if self.quotas:
            for request in self.waiting.values():
                if self._beyond(request) is None:
                    counts[request.kind] = counts.get(request.kind, 0) + 1
        else:
            for kinds in self._kinds.values():
                for kind, number in kinds.items():
                    counts[kind] = counts.get(kind, 0) + number
        rooms = [Room(machine) for _ in range(coming)]
        for kind in sorted(counts, key=_size, reverse=True):
            shape, count, _, spread, _ = kind
            if not Room(machine).times(shape):
                continue
            left = counts[kind] * count
            per_room = counts[kind] if spread else left
            index = 0
            while left > 0:
                if index == len(rooms):
                    if len(rooms) >= most:
                        break
                    rooms.append(Room(machine))
                fitting = min(rooms[index].times(shape), left, per_room)
                rooms[index].take(shape, fitting)
                left -= fitting
                index += 1
        return len(rooms)


class Room:
    """A node that is yet to come."""

    def __init__(self, machine: Machine) -> None:
        self.cpu, self.memory, self.gpu = machine.cpu_milli, machine.memory, machine.gpus * WHOLE
        self.machine = machine

    def times(self, shape: Shape) -> int:
        """How often a shape fits what is left."""
        if (shape.models and self.machine.model not in shape.models) or not shape.labels <= self.machine.labels:
            return 0
        limits = [10**9]
        limits += [self.cpu // shape.cpu_milli] if shape.cpu_milli else []
        limits += [self.memory // shape.memory] if shape.memory else []
        limits += [self.gpu // shape.gpu_total] if shape.gpu_total else []
        return max(min(limits), 0)

    def take(self, shape: Shape, count: int) -> None:
        """Give shares away."""
        self.cpu -= count * shape.cpu_milli
        self.memory -= count * shape.memory
        self.gpu -= count * shape.gpu_total


_FREE = Quota()


def _apart(one: list[tuple[Shape, float]], other: list[tuple[Shape, float]]) -> float:
    """Total variation distance of two mixes, 0 to 1; 1 where one is empty."""
    if not one or not other:
        return 1.0
    sums = [sum(w for _, w in mix) for mix in (one, other)]
    first, second = ({s: w / total for s, w in mix} for mix, total in zip((one, other), sums, strict=True))
    return sum(abs(first.get(s, 0.0) - second.get(s, 0.0)) for s in first.keys() | second.keys()) / 2


def _size(kind: Kind) -> tuple[float, ...]:
    shape, count, _, spread, duration = kind
    return (count if spread else 1, shape.gpu_total, shape.cpu_milli, shape.memory, count, duration)


def _whole(machine: Machine) -> Shape:
    return Shape(machine.cpu_milli, machine.memory, machine.gpus)


def _enough(cpu: int, memory: int, gpu: Ints, shape: Shape) -> bool:
    if cpu < shape.cpu_milli or memory < shape.memory:
        return False
    return not shape.gpus or int((gpu >= shape.gpu_milli).sum()) >= shape.gpus
