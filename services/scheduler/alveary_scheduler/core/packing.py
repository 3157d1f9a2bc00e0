"""Placement policies: which node suits a shape best, and which of its GPUs. Pure.

Policies score in whole numbers of 0 to 100, as the published ones do, so that nodes that are alike tie and the lowest
row wins: that order packs. Finer scores spread (measured: FGD allocates 89 % of the published trace instead of 95 %).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from alveary_scheduler.core.resources import WHOLE, Shape

if TYPE_CHECKING:
    from alveary_scheduler.core.cluster import Cluster

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# The largest node of the published experiments (ATC'23): what scores of best fit and dot product are relative to.
_MAX_CPU, _MAX_GPU = 128_000, 8 * WHOLE
# GPUs of one node, at most.
_MOST_GPUS = 64
_BEFORE = np.tri(_MOST_GPUS, k=-1, dtype=bool)


class Policy(Protocol):
    """Scores rows of a cluster for a shape that fits them; more is better."""

    name: str

    def score(self, cluster: Cluster, shape: Shape, rows: Ints) -> tuple[Floats, Ints]:
        """Scores, and for a shared GPU which one of the node (else -1)."""
        ...


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
        self._seed = seed
        self._random = np.random.default_rng(seed)

    def restart(self, number: int) -> None:
        """Draw as at the start, for the request of this number: equal states give equal decisions."""
        self._random = np.random.default_rng((self._seed, number))

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
        """Take another mix: shapes with their weights. Cached scores are those of the old one: call `Cluster.forget`."""
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
