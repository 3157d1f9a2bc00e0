"""Requests, what they were given, and what is decided about them. Pure values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from alveary_scheduler.core.resources import WHOLE, Shape

# (workspace, user); the user is empty for the workspace's own account.
Account = tuple[str, str]
# Everything that decides whether there is room for a request: shape, count, min_count, spread, duration.
Kind = tuple[Shape, int, int, bool, float]


@dataclass(frozen=True, slots=True)
class Request:
    """A run that asks for nodes: `count` times one shape, all or none (at least `min_count` of them, where that is set).

    Times are Unix seconds (virtual in the simulator).
    """

    run: str
    workspace: str
    user: str
    shape: Shape
    sequence: int
    arrived: float = 0.0
    count: int = 1
    min_count: int = 0
    # Each member on a node of its own; else on as few nodes as possible.
    spread: bool = True
    tier: int = 0
    # Longest duration in seconds; 0: unknown.
    duration: float = 0.0
    preemptible: bool = True
    attempt: int = 1
    # It may not start earlier (the delay of a retry).
    not_before: float = 0.0

    @property
    def needed(self) -> int:
        """The fewest members it starts with."""
        return self.min_count or self.count

    @property
    def kind(self) -> Kind:
        """What decides whether there is room for it."""
        return (self.shape, self.count, self.min_count, self.spread, self.duration)

    @property
    def accounts(self) -> tuple[Account, ...]:
        """The accounts that it is charged to: its workspace's and its user's."""
        workspace = (self.workspace, "")
        return (workspace, (self.workspace, self.user)) if self.user else (workspace,)

    def __str__(self) -> str:
        return describe(self.shape, self.count, self.min_count)


def describe(shape: Shape, count: int, min_count: int) -> str:
    """What a request asks for, as text: "2 nodes of 4 CPU + 1 GPU (at least 1)"."""
    each = f"{count} nodes of {shape}" if count > 1 else str(shape)
    return each + ("" if not min_count or min_count == count else f" (at least {min_count})")


@dataclass(frozen=True, slots=True)
class AllocatedNode:
    """A part of one node: which node, and which of its GPUs."""

    node: str
    gpus: tuple[int, ...] = ()


@dataclass(slots=True)
class RunningAttempt:
    """An attempt that holds its allocation."""

    request: Request
    allocation: tuple[AllocatedNode, ...]
    started: float
    # When it last stored a checkpoint; its start at first.
    last_checkpoint: float
    # It was asked to make room.
    preempting: bool = False

    @property
    def ends(self) -> float:
        """When it ends at the latest; infinite where it has no limit."""
        return self.started + self.request.duration if self.request.duration else math.inf

    def preemption_cost(self, now: float) -> float:
        """GPU-seconds of work that ending it now would waste; a core weighs an eighth of a GPU."""
        shape = self.request.shape
        return (now - self.last_checkpoint) * len(self.allocation) * (shape.gpu_total + shape.cpu_milli / 8) / WHOLE


@dataclass(frozen=True, slots=True)
class Placement:
    """Give an attempt its nodes."""

    run: str
    attempt: int
    allocation: tuple[AllocatedNode, ...]


@dataclass(frozen=True, slots=True)
class Preemption:
    """Ask an attempt to save its work and end; its run comes back with a new attempt."""

    run: str
    attempt: int
    beneficiary: str
    reason: str
