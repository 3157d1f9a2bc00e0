"""Who has used how much, and who is entitled to more. Pure.

Accounts are workspaces and their users. Within a tier, accounts below their guaranteed quota come first, then those
whose dominant share (Ghodsi et al., Dominant Resource Fairness, NSDI'11) of what they hold, plus its average over time,
is least for their weight. The average decays with a half-life.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from alveary_scheduler.core.requests import Account, Request
from alveary_scheduler.core.resources import UNLIMITED, ResourceVector, Shape

# (0 within its guarantee, else 1; level of the workspace; level of the user; account): less comes first.
Rank = tuple[int, float, float, Account]
_EMPTY = ResourceVector()


@dataclass(frozen=True, slots=True)
class Quota:
    """Of a workspace (user empty) or of one of its users. Unset parts of `guaranteed` guarantee nothing."""

    weight: float = 1.0
    guaranteed: ResourceVector | None = None
    maximum: ResourceVector = UNLIMITED


_DEFAULT_QUOTA = Quota()


@dataclass(slots=True)
class Usage:
    """What an account holds, and the average of its dominant share up to the time `at`."""

    used: ResourceVector = field(default_factory=ResourceVector)
    average: float = 0.0
    at: float = 0.0


class FairShareLedger:
    """Usage of all accounts of one target. It changes with placements and nodes alone; looking at it changes nothing."""

    def __init__(self, quotas: Mapping[Account, Quota], half_life_seconds: float) -> None:
        self.quotas: dict[Account, Quota] = dict(quotas)
        self.half_life_seconds = half_life_seconds
        # What all nodes have together.
        self.total = ResourceVector()
        self.accounts: dict[Account, Usage] = {}
        # Accounts whose average has changed since somebody cleared this.
        self.changed: set[Account] = set()

    def charge(self, request: Request, count: int, now: float) -> None:
        """Add `count` times a request's shape to its accounts; a negative count gives back."""
        for account in request.accounts:
            usage = self.accounts.setdefault(account, Usage(at=now))
            self._advance(account, usage, now)
            usage.used = usage.used.plus(request.shape, count)

    def resize(self, shape: Shape, count: int, now: float) -> None:
        """Nodes came (or went, where `count` is negative): shares are of another total from now on."""
        for account, usage in self.accounts.items():
            if usage.used != _EMPTY:
                self._advance(account, usage, now)
        self.total = self.total.plus(shape, count)

    def restore(self, averages: Mapping[Account, tuple[float, float]]) -> None:
        """Set the averages of all accounts, and the times up to which they are, as they were."""
        for account, (average, at) in averages.items():
            usage = self.accounts.setdefault(account, Usage())
            usage.average = average
            usage.at = at
        self.changed.clear()

    def _advance(self, account: Account, usage: Usage, now: float) -> None:
        if now > usage.at:
            usage.average = self._average_at(usage, now)
            usage.at = now
        self.changed.add(account)

    def _average_at(self, usage: Usage, now: float) -> float:
        if now <= usage.at:
            return usage.average
        kept: float = 0.5 ** ((now - usage.at) / self.half_life_seconds)
        return usage.average * kept + self.dominant(usage.used) * (1 - kept)

    def dominant(self, used: ResourceVector) -> float:
        """The largest share of what all nodes have; 0 to 1."""
        total = self.total
        pairs = ((used.cpu_milli, total.cpu_milli), (used.memory, total.memory), (used.gpu_milli, total.gpu_milli))
        return max((mine / whole for mine, whole in pairs if mine and whole), default=0.0)

    def used(self, account: Account) -> ResourceVector:
        """What an account holds."""
        usage = self.accounts.get(account)
        return usage.used if usage else _EMPTY

    def average(self, account: Account, now: float) -> float:
        """The decayed average of an account's dominant share at a time."""
        usage = self.accounts.get(account)
        return self._average_at(usage, now) if usage else 0.0

    def quota(self, account: Account) -> Quota:
        """An account's quota; the default has weight 1, no guarantee and no maximum."""
        return self.quotas.get(account) or _DEFAULT_QUOTA


class FairShares:
    """The ledger at one moment, with planned placements on top. Planning charges this, never the ledger."""

    def __init__(self, ledger: FairShareLedger, now: float) -> None:
        self._ledger = ledger
        self._now = now
        self._planned: dict[Account, ResourceVector] = {}
        self._averages: dict[Account, float] = {}

    def charge(self, request: Request, count: int) -> None:
        """Count a planned placement of `count` members."""
        for account in request.accounts:
            self._planned[account] = self.used(account).plus(request.shape, count)

    @property
    def has_quotas(self) -> bool:
        """Whether any account has a quota."""
        return bool(self._ledger.quotas)

    def used(self, account: Account) -> ResourceVector:
        """What an account holds, planned placements included."""
        return self._planned.get(account) or self._ledger.used(account)

    def rank(self, account: Account) -> Rank:
        """An account's place among those of one tier; less comes first."""
        workspace = (account[0], "")
        owed = self._is_owed(workspace) or self._is_owed(account)
        return (0 if owed else 1, self._level(workspace), self._level(account), account)

    def _level(self, account: Account) -> float:
        average = self._averages.get(account)
        if average is None:
            average = self._averages[account] = self._ledger.average(account, self._now)
        return (self._ledger.dominant(self.used(account)) + average) / self._ledger.quota(account).weight

    def _is_owed(self, account: Account) -> bool:
        guaranteed = self._ledger.quota(account).guaranteed
        if guaranteed is None:
            return False
        used = self.used(account)
        return used.within(guaranteed) and used != guaranteed

    def exceeded_quota(self, request: Request) -> ResourceVector | None:
        """The maximum that the request would exceed; None: none."""
        for account in request.accounts:
            limit = self._ledger.quota(account).maximum
            if limit is not UNLIMITED and not self.used(account).plus(request.shape, request.needed).within(limit):
                return limit
        return None

    def allowed_count(self, request: Request) -> int:
        """How many members the quotas allow; 0: fewer than it needs."""
        count = request.count
        for account in request.accounts:
            limit = self._ledger.quota(account).maximum
            if limit is UNLIMITED:
                continue
            used = self.used(account)
            while count >= request.needed and not used.plus(request.shape, count).within(limit):
                count -= 1
        return count if count >= request.needed else 0

    def within_guarantee(self, request: Request) -> bool:
        """Whether the request is covered by a guaranteed quota."""
        for account in request.accounts:
            guaranteed = self._ledger.quota(account).guaranteed
            if guaranteed is not None and self.used(account).plus(request.shape, request.needed).within(guaranteed):
                return True
        return False

    def borrows(self, victim: Request) -> bool:
        """Whether the accounts of a running request hold more than any guarantee of theirs covers."""
        for account in reversed(victim.accounts):
            guaranteed = self._ledger.quota(account).guaranteed
            if guaranteed is not None and self.used(account).within(guaranteed):
                return False
        return True
