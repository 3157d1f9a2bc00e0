"""Which node, and which of its GPUs: many nodes, many requests, a policy. Pure: no clock, no IO.

Amounts are whole numbers: CPUs in thousandths of a core, memory in bytes, GPUs in thousandths of one GPU, so that
nothing is lost to rounding. Policies score in whole numbers of 0 to 100, as the published ones do, so that nodes that
are alike tie and the lowest row wins: that order packs, and finer scores spread (measured: FGD allocates 89 % of the
published trace instead of 95 %). A request of a whole node's share (`Shape`) is scored on all nodes at once; a score stays
valid until its node changes, so a placement costs what changed since the same shape was last asked for, not the size
of the cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
WHOLE = 1000
NOWHERE = -np.inf
# The largest node of the published experiments (ATC'23): what scores of best fit and dot product are relative to.
_MAX_CPU, _MAX_GPU = 128_000, 8 * WHOLE
# GPUs of one node, at most.
_MOST_GPUS = 64
_BEFORE = np.tri(_MOST_GPUS, k=-1, dtype=bool)
# Views of shapes that were not asked for in long are forgotten.
_VIEWS = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """What one node is to give: its share of a run.

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


class Policy(Protocol):
    """Scores rows of a cluster for a shape that fits them; more is better."""

    name: str

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """Scores, and for a shared GPU which one of the node (else -1)."""
        ...


class _View:
    """Of one shape on all rows: where it fits, and, as far as somebody wanted to know, how well."""

    __slots__ = ("fit", "fitting", "gpu", "position", "score", "scored")

    def __init__(self, size: int) -> None:
        self.position = self.scored = -1
        self.fit: npt.NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self.fitting = 0
        self.score: Floats = np.full(size, NOWHERE)
        self.gpu: Ints = np.full(size, -1)


class Cluster:
    """Nodes and what is free on them. Rows are reused when nodes go."""

    def __init__(self, policy: Policy, gpus_per_node: int = 8) -> None:
        self.policy = policy
        self.machines: list[Machine | None] = []
        self.rows: dict[str, int] = {}
        self._free_rows: list[int] = []
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
        row = self._free_rows.pop() if self._free_rows else len(self.machines)
        if row == len(self.machines):
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
        for name in ("open", "cpu", "memory", "cpu_total", "memory_total", "gpu", "gpu_count", "model"):
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
        self._free_rows.append(row)
        self._labelled.clear()
        self._allowed.clear()
        self._changed(row)

    def close(self, ident: str, closed: bool = True) -> None:
        """Take nothing more on a node (draining, quarantined), or again."""
        row = self.rows[ident]
        if self.open[row] == closed:
            self.open[row] = not closed
            self._changed(row)

    def _changed(self, row: int) -> None:
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
        """Score everything anew: the policy changed its mind."""
        self._views.clear()

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
            if len(self._views) >= _VIEWS:
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
        """Scores of all rows, NOWHERE where it does not fit; computed anew only where something changed."""
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


def group_of(shape: Shape) -> int:
    """Which requests are of one kind to GPU clustering: 0 for shared ones, else the number of whole GPUs."""
    return 0 if shape.shares else shape.gpus


def tightest(gpu: Ints, milli: int) -> Ints:
    """For each row the GPU with the least room that is enough; the first of equals."""
    found: Ints = np.where(gpu >= milli, gpu, np.iinfo(np.int64).max).argmin(axis=1)
    return found


def _none(rows: Ints) -> Ints:
    return np.full(len(rows), -1)


class Random:
    """Any node that has room; a shared GPU is any that has room."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def pick(self, rows: Ints) -> int:
        """One of equals."""
        return int(self._random.choice(rows))

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """All the same."""
        if not shape.shares:
            return np.zeros(len(rows)), _none(rows)
        drawn = np.where(cluster.gpu[rows] >= shape.gpu_milli, self._random.random((len(rows), cluster.gpu.shape[1])), -1.0)
        return np.zeros(len(rows)), drawn.argmax(axis=1)


class BestFit:
    """The node that has the least left afterwards, CPUs and GPUs weighing the same."""

    name = "best-fit"

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """100 less what is left, as a share of the largest node."""
        left = (cluster.cpu[rows] - shape.cpu_milli) / _MAX_CPU + (cluster.gpu[rows].sum(axis=1) - shape.gpu_total) / _MAX_GPU
        return np.floor(100 * (1 - left / 2)), tightest(cluster.gpu[rows], shape.gpu_milli) if shape.shares else _none(rows)


class DotProduct:
    """The node whose free amounts are least like the request (Panigrahy et al. 2011, as ATC'23 compares it)."""

    name = "dot-product"

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """100 less the product of free and asked amounts, each as a share of the largest node."""
        product = cluster.cpu[rows] * (shape.cpu_milli / _MAX_CPU**2) + cluster.gpu[rows].sum(axis=1) * (shape.gpu_total / _MAX_GPU**2)
        return np.floor(100 * (1 - product / 2)), tightest(cluster.gpu[rows], shape.gpu_milli) if shape.shares else _none(rows)


class Clustering:
    """Nodes that hold requests of the same number of GPUs first, then empty ones, then others (ATC'23)."""

    name = "gpu-clustering"

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """Four classes; within one, the fuller node."""
        if not shape.gpus:
            return np.zeros(len(rows)), _none(rows)
        kind = group_of(shape)
        classes = np.array([_kinship(cluster.groups[row], kind) for row in rows], dtype=np.int64)
        fullness = 25 * (_MAX_GPU - cluster.gpu[rows].sum(axis=1)) // _MAX_GPU
        return (25 * classes + fullness).astype(float), tightest(cluster.gpu[rows], shape.gpu_milli) if shape.shares else _none(rows)


def _kinship(groups: Mapping[int, int], kind: int) -> int:
    if kind in groups:
        return 3 if len(groups) == 1 else 2
    return 0 if groups else 1


class Packing:
    """GPUs that are in use first, then free GPUs of nodes in use, then empty nodes (MLaaS in the wild; ATC'23)."""

    name = "gpu-packing"

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """Three classes as ATC'23 ranks them, within each the one with less free."""
        if not shape.gpus:
            return np.zeros(len(rows)), _none(rows)
        gpu = cluster.gpu[rows]
        whole = (gpu == WHOLE).sum(axis=1)
        idle = whole == cluster.gpu_count[rows]
        if shape.shares:
            least = np.where(gpu >= shape.gpu_milli, gpu, np.iinfo(np.int64).max).min(axis=1)
            uses_free = least == WHOLE
            used = 100.0 - np.where(uses_free, 0, least) // 100
            score = np.where(uses_free, 50.0 - 1, used)
        else:
            score = np.full(len(rows), max(50.0 - shape.gpus, 33.0))
        score = np.where(idle, 33.0 - whole, score)
        return score, tightest(gpu, shape.gpu_milli) if shape.shares else _none(rows)


class Fgd:
    """Fragmentation Gradient Descent (Weng et al., Beware of Fragmentation, ATC'23).

    A GPU's free part is fragmented for a request that cannot use it where it is. The policy knows how often each shape
    is asked for (`mix`), and places where the expected fragmented amount of the node grows least.
    """

    name = "fgd"

    def __init__(self, mix: Iterable[tuple[Shape, float]]) -> None:
        self.learn(mix)

    def learn(self, mix: Iterable[tuple[Shape, float]]) -> None:
        """Take another mix: shapes with their weights. Scores made before are not made anew by themselves."""
        found = [(s, w) for s, w in mix if w > 0]
        total = sum(w for _, w in found)
        # Requests without a GPU can use none of it wherever they run: they add the same to every node.
        asked = [(s, w / total) for s, w in found if s.gpus]
        self._weight = np.array([w for _, w in asked])
        self._cpu = np.array([s.cpu_milli for s, _ in asked], dtype=np.int64)
        self._count = np.array([s.gpus for s, _ in asked], dtype=np.int64)
        steps = sorted({s.gpu_milli for s, _ in asked})
        self._steps = np.array(steps, dtype=np.int64)
        self._step = np.array([steps.index(s.gpu_milli) for s, _ in asked], dtype=np.int64)
        self._models = [(i, s.models) for i, (s, _) in enumerate(asked) if s.models]

    def usable(self, cluster: Cluster, rows: Ints, cpu: Ints, gpu: Ints) -> Floats:
        """Expected thousandths of GPU that the next request can use on each of the rows, had they `cpu` and `gpu` free."""
        if not len(self._weight):
            return np.zeros(len(rows))
        enough = gpu[:, None, :] >= self._steps[None, :, None]  # rows, steps, GPUs
        count = enough.sum(axis=2)
        amount = (enough * gpu[:, None, :]).sum(axis=2)
        able = (cpu[:, None] >= self._cpu) & (count[:, self._step] >= self._count)
        for column, models in self._models:
            able[:, column] &= cluster.allowed(models)[rows]
        found: Floats = (able * amount[:, self._step]) @ self._weight
        return found

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """A sigmoid of how much less is fragmented afterwards, in GPUs."""
        cpu, gpu = cluster.cpu[rows], cluster.gpu[rows]
        before = self.usable(cluster, rows, cpu, gpu)
        cpu = cpu - shape.cpu_milli
        if not shape.gpus:
            return _graded(self.usable(cluster, rows, cpu, gpu) - before), _none(rows)
        if not shape.shares:
            after = gpu.copy()
            free = gpu >= WHOLE
            after[free & (free.cumsum(axis=1) <= shape.gpus)] = 0
            return _graded(self.usable(cluster, rows, cpu, after) - before + shape.gpu_total), _none(rows)
        # GPUs of a node with equally much left are alike: the first stands for them.
        alike = ((gpu[:, :, None] == gpu[:, None, :]) & _BEFORE[: gpu.shape[1], : gpu.shape[1]]).any(axis=2)
        of_row, index = np.nonzero((gpu >= shape.gpu_milli) & ~alike)
        after = gpu[of_row]
        after[np.arange(len(of_row)), index] -= shape.gpu_milli
        gain = _graded(self.usable(cluster, rows[of_row], cpu[of_row], after) - before[of_row] + shape.gpu_milli)
        # The best of each row, the first of equals: scores are whole numbers.
        starts = np.flatnonzero(np.diff(of_row, prepend=-1))
        best = np.maximum.reduceat(gain * _MOST_GPUS + (_MOST_GPUS - 1 - index), starts)
        return best // _MOST_GPUS, _MOST_GPUS - 1 - (best % _MOST_GPUS).astype(np.int64)


def _graded(gain: Floats) -> Floats:
    found: Floats = np.floor(100 / (1 + np.exp(-gain / WHOLE)))
    return found


# What a target's `placement_policy` may be, and how each is made from a seed and a mix of requests.
POLICIES: Mapping[str, Callable[[int, Iterable[tuple[Shape, float]]], Any]] = {
    "fgd": lambda _, mix: Fgd(mix),
    "best-fit": lambda _, __: BestFit(),
    "random": lambda seed, _: Random(seed),
    "dot-product": lambda _, __: DotProduct(),
    "gpu-clustering": lambda _, __: Clustering(),
    "gpu-packing": lambda _, __: Packing(),
}


def typical(shapes: Iterable[Shape], share: float = 0.95) -> list[tuple[Shape, float]]:
    """The most frequent shapes that make up `share` of all (ATC'23: 95 %), memory left aside, with their counts."""
    counts: dict[Shape, int] = {}
    for shape in shapes:
        plain = Shape(shape.cpu_milli, 0, shape.gpus, shape.gpu_milli, shape.models)
        counts[plain] = counts.get(plain, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    wanted, found = share * sum(counts.values()), list[tuple[Shape, float]]()
    for shape, count in ordered:
        if wanted <= 0:
            break
        found.append((shape, float(count)))
        wanted -= count
    return found
