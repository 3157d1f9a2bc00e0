"""The waiting requests of one target, in the order in which they are looked at. Pure."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Mapping

from alveary_scheduler.core.requests import Account, Kind, Request

# The tier of requests that have waited for too long.
AGED = 10**9
_AGED_ACCOUNT: Account = ("", "")
_NONE: Mapping[Kind, int] = {}

# One account's requests of one tier: by kind, (sequence, run) in ascending order.
Line = dict[Kind, list[tuple[int, str]]]


class WaitingQueue:
    """Requests by tier, account and kind.

    Two things depend on the time alone: a request whose `not_before` lies ahead is not ready, and one that has waited
    for `aging_seconds` belongs to the tier AGED. The index is kept for one moment, and `advance` brings it to another;
    what it holds then is a function of the requests and that moment, however it got there.
    """

    def __init__(self, aging_seconds: float) -> None:
        self.aging_seconds = aging_seconds
        self.requests: dict[str, Request] = {}
        self._now = 0.0
        self._tiers: dict[str, int] = {}
        self._lines: dict[int, dict[Account, Line]] = {}
        self._kinds: dict[int, dict[Kind, int]] = {}
        # (time, sequence, run) of what changes its tier later. Entries of requests that have left are skipped when met.
        self._becomes_ready: list[tuple[float, int, str]] = []
        self._becomes_aged: list[tuple[float, int, str]] = []

    def add(self, request: Request) -> None:
        """A run waits; replaces an earlier request of the same run."""
        self.remove(request.run)
        self.requests[request.run] = request
        self._index(request)

    def remove(self, run: str) -> Request | None:
        """A run no longer waits; returns its request, None if there is none."""
        request = self.requests.pop(run, None)
        if request is not None and run in self._tiers:
            self._dequeue(request)
        return request

    def advance(self, now: float) -> None:
        """Bring the index to `now`, which may also lie in the past."""
        if now < self._now:
            self._rebuild(now)
            return
        self._now = now
        while self._becomes_ready and self._becomes_ready[0][0] <= now:
            if (request := self._due(self._becomes_ready)) is not None and request.run not in self._tiers:
                self._index(request)
        while self._becomes_aged and self._becomes_aged[0][0] <= now:
            request = self._due(self._becomes_aged)
            if request is not None and self._tiers.get(request.run, AGED) != AGED:
                self._dequeue(request)
                self._enqueue(request, AGED)

    def _due(self, heap: list[tuple[float, int, str]]) -> Request | None:
        _, sequence, run = heapq.heappop(heap)
        request = self.requests.get(run)
        if request is None or request.sequence != sequence:
            return None
        # A later attempt of the same run may have come in its place, with times of its own.
        late = request.not_before > self._now or (heap is self._becomes_aged and request.arrived + self.aging_seconds > self._now)
        return None if late else request

    def _rebuild(self, now: float) -> None:
        self._now = now
        for index in (self._tiers, self._lines, self._kinds, self._becomes_ready, self._becomes_aged):
            index.clear()
        for request in self.requests.values():
            self._index(request)

    def _index(self, request: Request) -> None:
        if request.not_before > self._now:
            heapq.heappush(self._becomes_ready, (request.not_before, request.sequence, request.run))
        elif (aged := request.arrived + self.aging_seconds) <= self._now:
            self._enqueue(request, AGED)
        else:
            self._enqueue(request, request.tier)
            heapq.heappush(self._becomes_aged, (aged, request.sequence, request.run))

    def _enqueue(self, request: Request, tier: int) -> None:
        self._tiers[request.run] = tier
        kind = request.kind
        line = self._lines.setdefault(tier, {}).setdefault(_account(request, tier), {})
        insort(line.setdefault(kind, []), (request.sequence, request.run))
        kinds = self._kinds.setdefault(tier, {})
        kinds[kind] = kinds.get(kind, 0) + 1

    def _dequeue(self, request: Request) -> None:
        tier = self._tiers.pop(request.run)
        account, kind = _account(request, tier), request.kind
        lines = self._lines[tier]
        entries = lines[account][kind]
        del entries[bisect_left(entries, (request.sequence, request.run))]
        if not entries:
            del lines[account][kind]
            if not lines[account]:
                del lines[account]
        kinds = self._kinds[tier]
        kinds[kind] -= 1
        if not kinds[kind]:
            del kinds[kind]
        if not lines:
            del self._lines[tier], self._kinds[tier]

    # ---- as of the moment of `advance` ----------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many are ready."""
        return len(self._tiers)

    def tier_of(self, run: str) -> int | None:
        """The tier that a run waits in now; None: it does not wait, or is not ready."""
        return self._tiers.get(run)

    @property
    def tiers(self) -> list[int]:
        """Tiers that somebody waits in, highest first."""
        return sorted(self._lines, reverse=True)

    def lines(self, tier: int) -> Mapping[Account, Line]:
        """Requests of one tier, by account."""
        return self._lines[tier]

    def kinds(self, tier: int) -> Mapping[Kind, int]:
        """How many of each kind wait in a tier."""
        return self._kinds.get(tier, _NONE)

    def ready(self) -> list[Request]:
        """All that may start now, in no particular order."""
        return [self.requests[run] for run in self._tiers]


def _account(request: Request, tier: int) -> Account:
    """Among the aged, arrival alone counts: they share one account."""
    return _AGED_ACCOUNT if tier == AGED else (request.workspace, request.user)
