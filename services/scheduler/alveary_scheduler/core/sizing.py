"""How many nodes a queue could use. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from alveary_scheduler.core.requests import Kind
from alveary_scheduler.core.resources import HypotheticalNode, Machine


def nodes_needed(counts: Mapping[Kind, int], machine: Machine, coming: int, limit: int) -> int:
    """How many empty nodes like `machine` as many requests of each kind as `counts` says could use, counting `coming` that are on their way.

    At least `coming`, at most `limit`. First fit, the most nodes first, then the largest.
    """
    nodes = [HypotheticalNode(machine) for _ in range(coming)]
    for kind in sorted(counts, key=_size, reverse=True):
        shape, count, _, spread, _ = kind
        if not HypotheticalNode(machine).times(shape):
            continue
        left = counts[kind] * count
        per_node = counts[kind] if spread else left
        index = 0
        while left > 0:
            if index == len(nodes):
                if len(nodes) >= limit:
                    break
                nodes.append(HypotheticalNode(machine))
            fitting = min(nodes[index].times(shape), left, per_node)
            nodes[index].take(shape, fitting)
            left -= fitting
            index += 1
    return len(nodes)


def _size(kind: Kind) -> tuple[object, ...]:
    shape, count, min_count, spread, duration = kind
    size = (count if spread else 1, shape.gpu_total, shape.cpu_milli, shape.memory, count, duration)
    return (*size, min_count, shape.gpus, spread, sorted(shape.models), sorted(shape.labels))
