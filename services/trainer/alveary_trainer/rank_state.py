"""How the ranks of one node ended, as their launcher started them last. Pure; ranks.py keeps it up to date."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from alveary_contracts.common.v1 import common_pb2 as c

_TAIL_LINES = 20


@dataclass(eq=False)
class Rank:
    """One training process of an attempt."""

    number: int
    # How often its launcher had started it before.
    restarts: int
    # Its newest lines as text.
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    exit_code: int | None = None
    signal: int | None = None
    # Its launcher ended it.
    stopped: bool = False
    # Unix seconds; 0: it has not ended.
    ended_at: float = 0.0
    # Why its program could not be started.
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, with a signal or an exit code other than 0."""
        return bool(self.ended_at) and not self.stopped and (self.exit_code or self.signal) not in (0, None)

    def describe_end(self) -> str:
        """How it ended, as the rest of a sentence that begins with the rank."""
        if self.problem:
            return f"could not start: {self.problem}"
        if self.signal is not None:
            return f"was ended by {signal_name(self.signal)}"
        return f"ended with exit code {self.exit_code}"


def signal_name(number: int) -> str:
    """ "SIGKILL" of 9; the number where this system has no such signal."""
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def first_failure(ranks: Mapping[int, Rank]) -> Rank | None:
    """The rank that failed first, of those that were restarted most often; None: none failed."""
    newest = max((rank.restarts for rank in ranks.values()), default=0)
    failed = [rank for rank in ranks.values() if rank.failed and rank.restarts == newest]
    return min(failed, key=lambda rank: (rank.ended_at, rank.number), default=None)


def rank_exits(ranks: Mapping[int, Rank], node: str) -> list[c.RankExit]:
    """How each rank of `node` ended, by rank."""
    exits = []
    for _, rank in sorted(ranks.items()):
        one = c.RankExit(rank=rank.number, node=node, restarts=rank.restarts, stopped=rank.stopped)
        if rank.exit_code is not None:
            one.exit_code = rank.exit_code
        if rank.signal is not None:
            one.signal = rank.signal
        exits.append(one)
    return exits
