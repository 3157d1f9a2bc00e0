"""Speed of the decision core: 10,000 nodes, 100,000 queued runs. `make bench` prints it; `--plot` writes docs/scheduling-scale.svg."""

from __future__ import annotations

import gc
import random
import resource
import sys
import time
from pathlib import Path

from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import Request
from alveary_scheduler.core.resources import WHOLE, Machine, Shape

NODES, SECONDS = 10_000, 8.0
GPUS = ((0, WHOLE), (1, 250), (1, 500), (1, WHOLE), (2, WHOLE), (4, WHOLE), (8, WHOLE))
SHAPES = [
    Shape(cpus * 1000, memory << 30, gpus, milli, frozenset(models) if gpus else frozenset())
    for cpus in (1, 4, 8, 12)
    for memory in (4, 16)
    for gpus, milli in GPUS
    for models in ((), ("A100",))
]


class Load:
    """A pool that is kept at `queued` waiting runs, of ten workspaces with twenty users each."""

    def __init__(self, policy: str, nodes: int, queued: int) -> None:
        self.draw, self.pool, self.queued, self.sequence, self.now = random.Random(1), Pool(policy), queued, 0, 0.0
        for index in range(nodes):
            self.pool.add(Machine(f"n{index:05}", 96_000, 768 << 30, 8, "A100" if index % 3 else "T4"))
        self.refill()

    def refill(self) -> None:
        draw = self.draw
        while len(self.pool.waiting) < self.queued:
            self.sequence += 1
            self.pool.submit(
                Request(
                    f"r{self.sequence}", f"w{draw.randrange(10)}", f"u{draw.randrange(20)}", draw.choice(SHAPES), self.sequence, self.now,
                    count=draw.choice((1,) * 20 + (2, 4)), tier=draw.choice((0,) * 9 + (1,)), duration=draw.choice((0, 3600, 7200)),
                    preemptible=False,
                )
            )  # fmt: skip

    def round(self) -> tuple[float, int]:
        """Seconds and placements of one round: it is proposed and recorded."""
        began = time.perf_counter()
        proposal = self.pool.propose(self.now)
        self.pool.apply(proposal, self.now)
        return time.perf_counter() - began, len(proposal.placements)

    def turn(self) -> None:
        """Forty runs end, as many arrive."""
        self.now += 1.0
        for _ in range(min(40, len(self.pool.running))):
            self.pool.finish(next(iter(self.pool.running)), self.now)
        self.refill()


def measure(policy: str, queued: int, seconds: float = SECONDS, nodes: int = NODES) -> tuple[float, float, float, float]:
    """Placements a second, median and 99th percentile of a round in seconds, seconds per placement."""
    load = Load(policy, nodes, queued)
    # As the service does once it has caught up: what is long-lived is not looked at again and again.
    gc.collect()
    gc.freeze()
    fill = time.perf_counter()
    while load.round()[1] and time.perf_counter() - fill < 4 * seconds:
        load.refill()
    gc.collect()
    gc.freeze()
    times, placed, began = [], 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        load.turn()
        took, count = load.round()
        times.append(took)
        placed += count
    gc.unfreeze()
    times.sort()
    return placed / sum(times), times[len(times) // 2], times[int(len(times) * 0.99)], sum(times) / max(placed, 1)


def main() -> None:
    """The table."""
    print(f"decision core, {NODES:,} nodes of 8 GPUs, full; 40 runs end and 40 arrive between rounds")
    for policy in ("best-fit", "fgd"):
        rate, median, slowest, _ = measure(policy, 100_000)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{policy:<10} 100,000 queued: {rate:8,.0f} placements/s, a round {median * 1e3:.1f} ms (p99 {slowest * 1e3:.1f} ms), {memory:.0f} MB"
        )
    line = []
    for queued in (100, 1000, 10_000, 100_000):
        *_, each = measure("best-fit", queued, 4.0)
        line.append((queued, each * 1e6))
        print(f"{'best-fit':<10} {queued:7,} queued: {each * 1e6:8.0f} µs per placement")
    if "--plot" in sys.argv:
        sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
        from plot import write

        write(
            Path(__file__).parents[2] / "docs/scheduling-scale.svg", f"Time per placement, {NODES:,} nodes", "runs in the queue",
            "µs per placement", {"best-fit": line}, log_x=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
