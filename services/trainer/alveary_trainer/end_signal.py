"""Why an attempt must end before its processes do by themselves: one value that every phase gets, and can wait for."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from alveary_contracts.common.v1 import common_pb2 as c

T = TypeVar("T")


class EndReason(enum.Enum):
    """Who or what ends an attempt; the value is the sentence for its user where the request has none."""

    CANCELED = "canceled"
    TIMEOUT = "it ran longer than it may"
    PREEMPTED = "a run that comes first needs its place"
    PEER_FAILURE = "another node of the run failed"
    OUT_OF_MEMORY = "it used more memory than it asked for"
    DISK_FULL = "it filled the disk of its node"
    TOO_MANY_PROCESSES = "it had more processes than a run may have"
    # Its placement was revoked, or the node's lease is over: the attempt publishes and stores nothing more.
    FENCED = "its placement was revoked"

    @property
    def exit_reason(self) -> c.ExitReason.ValueType:
        """The reason in the exit status of an attempt that ended so; a fenced one has no exit status."""
        return _EXIT_REASONS.get(self, c.EXIT_REASON_UNSPECIFIED)

    @property
    def graceful(self) -> bool:
        """Whether the processes get SIGTERM and the run's grace period before SIGKILL."""
        return self in REQUESTED_ENDS or self is EndReason.PEER_FAILURE


_EXIT_REASONS = {
    EndReason.CANCELED: c.EXIT_REASON_CANCELED,
    EndReason.TIMEOUT: c.EXIT_REASON_TIMEOUT,
    EndReason.PREEMPTED: c.EXIT_REASON_PREEMPTED,
    EndReason.PEER_FAILURE: c.EXIT_REASON_PEER_FAILURE,
    EndReason.OUT_OF_MEMORY: c.EXIT_REASON_OUT_OF_MEMORY,
    EndReason.DISK_FULL: c.EXIT_REASON_DISK_FULL,
    EndReason.TOO_MANY_PROCESSES: c.EXIT_REASON_SIGNAL,
}
# Ends that were requested of the whole attempt: they are its exit reason, however its processes ended.
REQUESTED_ENDS = (EndReason.CANCELED, EndReason.TIMEOUT, EndReason.PREEMPTED)
# Requests that interrupt the storing of outputs as well.
_INTERRUPTING = (EndReason.CANCELED, EndReason.TIMEOUT)
# Of these, nothing is stored, not even checkpoints.
_STORES_NOTHING = (EndReason.FENCED, EndReason.DISK_FULL)


def from_exit_reason(reason: c.ExitReason.ValueType) -> EndReason:
    """The end that a leader orders with a reason.

    Raises:
        ValueError: no end has that reason.
    """
    for end, value in _EXIT_REASONS.items():
        if value == reason:
            return end
    raise ValueError(f"no attempt is ended with the reason {reason}")


@dataclass(frozen=True)
class End:
    """A request to end an attempt."""

    reason: EndReason
    # A sentence for the user; empty: the reason's own.
    message: str = ""

    @property
    def sentence(self) -> str:
        """What the user is told."""
        return self.message or self.reason.value


class Fenced(Exception):
    """The attempt lost its placement: it publishes and stores nothing more."""


class EndSignal:
    """The end that was requested of an attempt, if any.

    The first request decides; a later fence overrides it. From `begin_storing` on there are no processes to end: a cancel or a
    timeout then interrupts the storing instead.
    """

    def __init__(self) -> None:
        self.end: End | None = None
        # Why the storing is interrupted; None: it is not.
        self.interruption: End | None = None
        # Whether the processes have ended.
        self.storing = False
        self._requested, self._fenced, self._interrupted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._listeners: list[Callable[[End], None]] = []

    @property
    def fenced(self) -> bool:
        """Whether the attempt lost its placement."""
        return self._fenced.is_set()

    @property
    def stores_nothing(self) -> bool:
        """Whether nothing more of the attempt is to be stored."""
        return self.end is not None and self.end.reason in _STORES_NOTHING

    def request(self, reason: EndReason, message: str = "") -> None:
        """Ask for the end of the attempt, or interrupt its storing; later requests change nothing, but for a fence."""
        end = End(reason, message)
        if self.storing and reason in _INTERRUPTING:
            self.interruption = self.interruption or end
            self._interrupted.set()
            return
        if self.end is not None and reason is not EndReason.FENCED:
            return
        self.end = end
        self._requested.set()
        if reason is EndReason.FENCED:
            self._fenced.set()
        for listener in list(self._listeners):
            listener(end)

    def subscribe(self, listener: Callable[[End], None]) -> None:
        """Call `listener` with each request that is accepted, before `request` returns."""
        self._listeners.append(listener)

    def begin_storing(self) -> None:
        """The processes have ended: from now on a cancel or a timeout interrupts the storing."""
        self.storing = True

    async def wait(self) -> End:
        """The end, once it is requested."""
        await self._requested.wait()
        assert self.end is not None
        return self.end

    def raise_if_fenced(self) -> None:
        """Go on only with a placement.

        Raises:
            Fenced: the attempt lost its placement.
        """
        if self.fenced:
            raise Fenced

    async def run_until_end(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None, and `work` is cancelled, where the end of the attempt is requested first."""
        return await _run_until(self._requested, work)

    async def run_until_interrupted(self, work: Awaitable[T]) -> T | None:
        """The result of `work`; None, and `work` is cancelled, where the storing is interrupted first."""
        return await _run_until(self._interrupted, work)

    async def run_until_fenced(self, work: Awaitable[T]) -> T:
        """The result of `work`.

        Raises:
            Fenced: the attempt lost its placement first; `work` is cancelled.
        """
        result = await _run_until(self._fenced, work)
        self.raise_if_fenced()
        return result  # type: ignore[return-value]


async def _run_until(event: asyncio.Event, work: Awaitable[T]) -> T | None:
    doing, waiting = asyncio.ensure_future(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, waiting):
            task.cancel()
        await asyncio.gather(doing, waiting, return_exceptions=True)
