"""Which attempts on a node to end so that a shape fits, wasting the least work. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from alveary_scheduler.core.packing import Ints
from alveary_scheduler.core.requests import RunningAttempt
from alveary_scheduler.core.resources import Shape


class RunningAttempts(dict[str, RunningAttempt]):
    """Attempts that hold an allocation, by run, and what a round asks about all of them."""

    def __init__(self) -> None:
        super().__init__()
        # Runs that were asked to make room and have not ended yet.
        self.preempting: set[str] = set()
        # How many may be preempted, by tier.
        self.preemptible: dict[int, int] = {}

    def start(self, attempt: RunningAttempt) -> None:
        """An attempt holds its allocation."""
        request = attempt.request
        self[request.run] = attempt
        if request.preemptible:
            self.preemptible[request.tier] = self.preemptible.get(request.tier, 0) + 1

    def end(self, run: str) -> RunningAttempt | None:
        """An attempt holds nothing any more; None: it did not run."""
        attempt = self.pop(run, None)
        if attempt is None:
            return None
        self.preempting.discard(run)
        if attempt.request.preemptible:
            self.preemptible[attempt.request.tier] -= 1
        return attempt

    def mark_preempting(self, run: str) -> None:
        """An attempt was asked to make room."""
        if run in self:
            self[run].preempting = True
            self.preempting.add(run)

    def any_preemptible(self, tier: int, same_tier: bool) -> bool:
        """Whether an attempt below a tier may be preempted, or one of the same tier where that counts."""
        return any(count and (other < tier or (same_tier and other == tier)) for other, count in self.preemptible.items())


class FreeResources(NamedTuple):
    """What is free on one node."""

    cpu: int
    memory: int
    # Thousandths free of each GPU.
    gpu: Ints


def enough(room: FreeResources, shape: Shape) -> bool:
    """Whether a shape fits."""
    if room.cpu < shape.cpu_milli or room.memory < shape.memory:
        return False
    return not shape.gpus or int((room.gpu >= shape.gpu_milli).sum()) >= shape.gpus


def freed(room: FreeResources, held: RunningAttempt, node: str, sign: int = 1) -> FreeResources:
    """The room on a node once an attempt has ended (with sign -1: before it has)."""
    cpu, memory, gpu = room.cpu, room.memory, room.gpu.copy()
    shape = held.request.shape
    for part in held.allocation:
        if part.node == node:
            cpu += sign * shape.cpu_milli
            memory += sign * shape.memory
            gpu[list(part.gpus)] += sign * shape.gpu_milli
    return FreeResources(cpu, memory, gpu)


def cheapest_victims(room: FreeResources, able: Iterable[RunningAttempt], shape: Shape, node: str, now: float) -> list[str] | None:
    """Runs to end for one member on a node, those of the lowest tier and the least work lost first.

    None: it does not fit even if all that are `able` to make room end.
    """
    victims: list[RunningAttempt] = []
    for held in sorted(able, key=lambda held: (held.request.tier, held.preemption_cost(now), held.request.run)):
        if enough(room, shape):
            break
        room = freed(room, held, node)
        victims.append(held)
    if not enough(room, shape):
        return None
    for held in reversed(victims.copy()):  # the most expensive first: perhaps it need not end
        without = freed(room, held, node, -1)
        if enough(without, shape):
            room = without
            victims.remove(held)
    return [held.request.run for held in victims]
