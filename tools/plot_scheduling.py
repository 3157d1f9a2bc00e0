"""docs/scheduling-allocated.svg from the Alibaba 2023 trace: `python tools/plot_scheduling.py FOLDER`. A minute."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from plot import write

from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.sim import read_nodes, read_pods, saturate


def main(folder: Path) -> None:
    """Ten seeds of each policy."""
    machines, pods = read_nodes(folder / "nodes.csv"), read_pods(folder / "pods.csv")
    series = {}
    for policy in ("fgd", "best-fit", "gpu-packing", "gpu-clustering", "dot-product", "random"):
        assert policy in POLICIES
        curves = [saturate(machines, pods, policy, seed)["curve"] for seed in range(10)]
        line = [(x, mean(curve[i][1] for curve in curves)) for i, (x, _) in enumerate(curves[0])]
        series[f"{policy} {line[99][1]:.1f}/{line[-1][1]:.1f}"] = [p for p in line if p[0] >= 70]
        print(f"| {policy} | {line[99][1]:.2f} | {line[-1][1]:.2f} |")
    write(
        Path(__file__).parents[1] / "docs/scheduling-allocated.svg", "GPUs allocated as requests arrive (mean of ten seeds)",
        "GPUs asked for, % of the cluster", "GPUs allocated, %", series,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
