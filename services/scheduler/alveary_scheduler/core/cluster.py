"""Nodes, what is free on them, and where a shape fits best. Pure.

A shape is scored on all nodes at once. A score stays valid until its node changes, so a placement costs what has
changed since the same shape was last asked for, not the size of the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from alveary_scheduler.core.packing import Floats, Ints, Policy, group_of, tightest
from alveary_scheduler.core.preemption import FreeResources
from alveary_scheduler.core.resources import WHOLE, Machine, Shape

NOWHERE = -np.inf
# How many shapes scores are cached for; the oldest is dropped first.
_MAX_VIEWS = 512
# Rows of removed nodes are given up once there are more than these beyond as many as nodes.
_MAX_EMPTY_ROWS = 16
_ARRAYS = ("open", "cpu", "memory", "cpu_total", "memory_total", "gpu", "gpu_count", "model")


class _View:
    """Of one shape on all rows: where it fits, and, as far as that was asked for, how well."""

    __slots__ = ("fit", "fitting", "gpu", "position", "score", "scored")

    def __init__(self, size: int) -> None:
        self.position = self.scored = -1
        self.fit: npt.NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self.fitting = 0
        self.score: Floats = np.full(size, NOWHERE)
        self.gpu: Ints = np.full(size, -1)


class Cluster:
    """Nodes and what is free on them.

    Rows are in the order in which the nodes joined: ties, which go to the lowest row, depend on the nodes that are there
    and not on those that were.
    """

    def __init__(self, policy: Policy, gpus_per_node: int = 8) -> None:
        self.policy = policy
        self.machines: list[Machine | None] = []
        self.rows: dict[str, int] = {}
        # Rows that changed since somebody cleared this.
        self.touched: set[int] = set()
        size = 16
        self.open: npt.NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self.cpu: Ints = np.zeros(size, dtype=np.int64)
        self.memory: Ints = np.zeros(size, dtype=np.int64)
        self.cpu_total: Ints = np.zeros(size, dtype=np.int64)
        self.memory_total: Ints = np.zeros(size, dtype=np.int64)
        # Thousandths free of each GPU; GPUs that a node does not have count as full.
        self.gpu: Ints = np.zeros((size, gpus_per_node), dtype=np.int64)
        self.gpu_count: Ints = np.zeros(size, dtype=np.int64)
        self.model: Ints = np.zeros(size, dtype=np.int64)
        # Of each row: how many requests of each kind (group_of) are on it.
        self.groups: list[dict[int, int]] = []
        self._models: dict[str, int] = {"": 0}
        self._changes: list[int] = []
        self._dropped = 0
        self._views: dict[Shape, _View] = {}
        self._labelled: dict[frozenset[tuple[str, str]], npt.NDArray[np.bool_]] = {}
        self._allowed: dict[frozenset[str], npt.NDArray[np.bool_]] = {}

    # ---- nodes ----------------------------------------------------------------------------------------------------

    def add(self, machine: Machine) -> int:
        """A node joins, empty; returns its row."""
        row = len(self.machines)
        self.machines.append(None)
        self.groups.append({})
        if row == len(self.cpu):
            self._grow()
        if machine.gpus > self.gpu.shape[1]:
            wider = np.zeros((len(self.gpu), machine.gpus), dtype=np.int64)
            wider[:, : self.gpu.shape[1]] = self.gpu
            self.gpu = wider
            self._views.clear()
        self.machines[row], self.rows[machine.id] = machine, row
        self.open[row] = True
        self.cpu[row], self.memory[row], self.gpu_count[row] = machine.cpu_milli, machine.memory, machine.gpus
        self.cpu_total[row], self.memory_total[row] = machine.cpu_milli, machine.memory
        self.gpu[row] = 0
        self.gpu[row, : machine.gpus] = WHOLE
        self.model[row] = self._models.setdefault(machine.model, len(self._models))
        self.groups[row] = {}
        self._labelled.clear()
        self._allowed.clear()
        self._changed(row)
        return row

    def _grow(self) -> None:
        for name in _ARRAYS:
            old = getattr(self, name)
            new = np.zeros((2 * len(old), *old.shape[1:]), dtype=old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
        self._views.clear()

    def remove(self, ident: str) -> None:
        """A node is gone, with all that was on it."""
        row = self.rows.pop(ident)
        self.machines[row] = None
        self.open[row] = False
        self._labelled.clear()
        self._allowed.clear()
        self._changed(row)
        if len(self.machines) > 2 * len(self.rows) + _MAX_EMPTY_ROWS:
            self._compact()

    def _compact(self) -> None:
        """Give up rows without a node, keeping the order of the others."""
        kept = [row for row, machine in enumerate(self.machines) if machine is not None]
        for name in _ARRAYS:
            array = getattr(self, name)
            array[: len(kept)] = array[kept]
            array[len(kept) :] = 0
        self.groups = [self.groups[row] for row in kept]
        self.machines = [self.machines[row] for row in kept]
        self.rows = {machine.id: row for row, machine in enumerate(self.machines) if machine is not None}
        self.touched = set(range(len(kept)))
        self._views.clear()

    def close(self, ident: str, closed: bool = True) -> None:
        """Take nothing more on a node (draining, quarantined), or again."""
        row = self.rows[ident]
        if self.open[row] == closed:
            self.open[row] = not closed
            self._changed(row)

    def copy_row(self, row: int, other: Cluster, source: int) -> None:
        """Make what is free on a row the same as on another cluster's row of the same node."""
        same = self.cpu[row] == other.cpu[source] and self.memory[row] == other.memory[source] and self.groups[row] == other.groups[source]
        if same and (self.gpu[row] == other.gpu[source, : self.gpu.shape[1]]).all():
            return
        self.cpu[row] = other.cpu[source]
        self.memory[row] = other.memory[source]
        self.gpu[row] = other.gpu[source, : self.gpu.shape[1]]
        self.groups[row] = dict(other.groups[source])
        self._changed(row)

    def _changed(self, row: int) -> None:
        self.touched.add(row)
        self._changes.append(row)
        if len(self._changes) > 4 * len(self.cpu) + 1024:
            self._dropped += len(self._changes)
            self._changes.clear()

    # ---- requests -------------------------------------------------------------------------------------------------

    def take(self, row: int, shape: Shape, gpus: Iterable[int]) -> None:
        """Give a share of a node away."""
        self._move(row, shape, gpus, -1)

    def give(self, row: int, shape: Shape, gpus: Iterable[int]) -> None:
        """Get it back."""
        self._move(row, shape, gpus, +1)

    def _move(self, row: int, shape: Shape, gpus: Iterable[int], sign: int) -> None:
        self.cpu[row] += sign * shape.cpu_milli
        self.memory[row] += sign * shape.memory
        for index in gpus:
            self.gpu[row, index] += sign * shape.gpu_milli
        if shape.gpus:
            kind = group_of(shape)
            groups = self.groups[row]
            groups[kind] = groups.get(kind, 0) - sign
            if not groups[kind]:
                del groups[kind]
        self._changed(row)

    def fits(self, shape: Shape, rows: Ints | slice = slice(None)) -> npt.NDArray[np.bool_]:
        """Which rows have room for it."""
        found: npt.NDArray[np.bool_] = self.open[rows] & (self.cpu[rows] >= shape.cpu_milli) & (self.memory[rows] >= shape.memory)
        if shape.gpus == 1:
            found &= self.gpu[rows].max(axis=1) >= shape.gpu_milli
        elif shape.gpus:
            found &= (self.gpu[rows] >= shape.gpu_milli).sum(axis=1) >= shape.gpus
        if shape.gpus and shape.models:
            found &= self.allowed(shape.models)[rows]
        if shape.labels:
            found &= self._with_labels(shape.labels)[rows]
        return found

    def capable(self, shape: Shape) -> Ints:
        """Rows that would have room for it were they empty."""
        found: npt.NDArray[np.bool_] = self.open & (self.cpu_total >= shape.cpu_milli) & (self.memory_total >= shape.memory)
        found &= self.gpu_count >= shape.gpus
        if shape.gpus and shape.models:
            found &= self.allowed(shape.models)
        if shape.labels:
            found &= self._with_labels(shape.labels)
        return np.flatnonzero(found)

    def times(self, shape: Shape, row: int) -> int:
        """How often a shape fits an empty row."""
        limits = [1 << 30]
        limits += [int(self.cpu_total[row]) // shape.cpu_milli] if shape.cpu_milli else []
        limits += [int(self.memory_total[row]) // shape.memory] if shape.memory else []
        if shape.shares:
            limits.append(int(self.gpu_count[row]) * (WHOLE // shape.gpu_milli))
        elif shape.gpus:
            limits.append(int(self.gpu_count[row]) // shape.gpus)
        return min(limits)

    def forget(self) -> None:
        """Score everything again: the policy has changed."""
        self._views.clear()

    def free(self, row: int) -> FreeResources:
        """What is free on a row."""
        return FreeResources(int(self.cpu[row]), int(self.memory[row]), self.gpu[row])

    def allowed(self, models: frozenset[str]) -> npt.NDArray[np.bool_]:
        """Which rows have one of these GPU models."""
        if models not in self._allowed:
            self._allowed[models] = np.isin(self.model, [self._models[m] for m in models if m in self._models])
        return self._allowed[models]

    def _with_labels(self, labels: frozenset[tuple[str, str]]) -> npt.NDArray[np.bool_]:
        if labels not in self._labelled:
            found = np.zeros(len(self.cpu), dtype=bool)
            for row, machine in enumerate(self.machines):
                found[row] = machine is not None and labels <= machine.labels
            self._labelled[labels] = found
        return self._labelled[labels]

    def _view(self, shape: Shape) -> _View:
        view = self._views.get(shape)
        if view is None or len(view.fit) != len(self.cpu):
            if len(self._views) >= _MAX_VIEWS:
                del self._views[next(iter(self._views))]
            view = self._views[shape] = _View(len(self.cpu))
        return view

    def _since(self, position: int) -> Ints:
        """Rows that changed since a position of the list of changes."""
        if position < self._dropped:
            return np.arange(len(self.machines))
        return np.unique(np.array(self._changes[position - self._dropped :], dtype=np.int64))

    def fitting(self, shape: Shape) -> int:
        """How many rows have room for it."""
        return self._fit(shape).fitting

    def _fit(self, shape: Shape) -> _View:
        view, now = self._view(shape), self._dropped + len(self._changes)
        if view.position != now:
            rows = self._since(view.position)
            fits = self.fits(shape, rows)
            view.fitting += int(fits.sum()) - int(view.fit[rows].sum())
            view.fit[rows] = fits
            view.position = now
        return view

    def scores(self, shape: Shape) -> _View:
        """Scores of all rows, NOWHERE where it does not fit; computed again only where something changed."""
        view = self._fit(shape)
        if view.scored != view.position:
            rows = self._since(view.scored)
            view.score[rows] = NOWHERE
            rows = rows[view.fit[rows]]
            if len(rows):
                view.score[rows], view.gpu[rows] = self.policy.score(self, shape, rows)
            view.scored = view.position
        return view

    def choose(self, shape: Shape, without: Iterable[int] = ()) -> tuple[int, tuple[int, ...]] | None:
        """The best row and its GPUs; None: it fits nowhere. Of equals the lowest row, unless the policy picks."""
        view = self.scores(shape)
        score = view.score
        if without:
            score = score.copy()
            score[list(without)] = NOWHERE
        if not len(score):
            return None
        row = int(score.argmax())
        best = score[row]
        if best == NOWHERE:
            return None
        if (pick := getattr(self.policy, "pick", None)) is not None:
            row = pick(np.flatnonzero(score == best))
        return row, self.gpus_for(row, shape, int(view.gpu[row]))

    def gpus_for(self, row: int, shape: Shape, chosen: int = -1) -> tuple[int, ...]:
        """Indexes of GPUs of a row that a shape would get."""
        if not shape.gpus:
            return ()
        if shape.shares:
            if chosen < 0:
                chosen = int(tightest(self.gpu[row : row + 1], shape.gpu_milli)[0])
            return (chosen,)
        free = np.flatnonzero(self.gpu[row] >= shape.gpu_milli)
        return tuple(int(i) for i in free[: shape.gpus])
