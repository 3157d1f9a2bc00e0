"""Amounts of resources: what nodes have, what requests ask for, what limits allow. Pure.

CPUs are counted in thousandths of a core, memory in bytes, GPUs in thousandths of one GPU, so that sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

WHOLE = 1000


@dataclass(frozen=True, slots=True)
class Shape:
    """What one node gives to a run.

    `gpus` GPUs of `gpu_milli` thousandths each; less than a whole one (1000) only for a single GPU. `models` are the
    GPU models that will do (empty: any), `labels` what the node must be labelled with.
    """

    cpu_milli: int = 0
    memory: int = 0
    gpus: int = 0
    gpu_milli: int = WHOLE
    models: frozenset[str] = frozenset()
    labels: frozenset[tuple[str, str]] = frozenset()

    @property
    def gpu_total(self) -> int:
        """Thousandths of a GPU in all."""
        return self.gpus * self.gpu_milli

    @property
    def shares(self) -> bool:
        """Whether it takes a part of one GPU."""
        return self.gpus == 1 and self.gpu_milli < WHOLE

    def __str__(self) -> str:
        parts = [f"{self.cpu_milli / 1000:g} CPU"]
        if self.memory:
            parts.append(f"{self.memory / 2**30:.1f} GiB")
        if self.gpus:
            models = f" ({' or '.join(sorted(self.models))})" if self.models else ""
            parts.append(f"{self.gpu_total / WHOLE:g} GPU{models}")
        parts += [f"{key}={value}" for key, value in sorted(self.labels)]
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Machine:
    """A node as a whole."""

    id: str
    cpu_milli: int
    memory: int
    gpus: int = 0
    model: str = ""
    labels: frozenset[tuple[str, str]] = frozenset()

    @property
    def shape(self) -> Shape:
        """All that it has, as a shape."""
        return Shape(self.cpu_milli, self.memory, self.gpus)


@dataclass(frozen=True, slots=True)
class ResourceVector:
    """CPUs, memory and GPUs. As a limit, a part that is None is unlimited."""

    cpu_milli: int | None = 0
    memory: int | None = 0
    gpu_milli: int | None = 0

    def plus(self, shape: Shape, count: int) -> ResourceVector:
        """The sum with `count` times a shape; a negative count subtracts."""
        return ResourceVector(
            (self.cpu_milli or 0) + count * shape.cpu_milli,
            (self.memory or 0) + count * shape.memory,
            (self.gpu_milli or 0) + count * shape.gpu_total,
        )

    def within(self, limit: ResourceVector) -> bool:
        """Whether no part exceeds the limit's."""
        return (
            (limit.cpu_milli is None or (self.cpu_milli or 0) <= limit.cpu_milli)
            and (limit.memory is None or (self.memory or 0) <= limit.memory)
            and (limit.gpu_milli is None or (self.gpu_milli or 0) <= limit.gpu_milli)
        )

    def __str__(self) -> str:
        parts = [f"{self.cpu_milli / 1000:g} CPU"] if self.cpu_milli is not None else []
        parts += [f"{self.memory / 2**30:.1f} GiB"] if self.memory is not None else []
        parts += [f"{self.gpu_milli / WHOLE:g} GPU"] if self.gpu_milli is not None else []
        return " + ".join(parts) or "no limit"


UNLIMITED = ResourceVector(None, None, None)


class HypotheticalNode:
    """A node that does not exist yet, filled on paper to find out how many nodes a queue could use."""

    def __init__(self, machine: Machine) -> None:
        self.cpu = machine.cpu_milli
        self.memory = machine.memory
        self.gpu = machine.gpus * WHOLE
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
        """Subtract `count` times a shape."""
        self.cpu -= count * shape.cpu_milli
        self.memory -= count * shape.memory
        self.gpu -= count * shape.gpu_total
