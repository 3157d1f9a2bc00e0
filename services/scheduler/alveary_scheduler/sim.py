"""`alveary-sim`: the scheduler's own decision core in virtual time. Same input and seed, same output to the byte."""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alveary_scheduler.core.cluster import Cluster
from alveary_scheduler.core.fairness import Quota
from alveary_scheduler.core.mix import typical
from alveary_scheduler.core.packing import POLICIES, Fgd
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import Request
from alveary_scheduler.core.resources import WHOLE, Machine, Shape

# Slowdown is bounded: runs shorter than this, seconds, count as this long (Feitelson et al. 1997).
_SHORT = 10.0
# How long a preempted run takes to store its checkpoint.
_GRACE = 30.0


class BadInput(Exception):
    """The text says which file, where, and what is wrong."""


@dataclass(frozen=True)
class Pod:
    """A line of the trace."""

    shape: Shape
    created: float = 0.0
    duration: float = 0.0
    qos: str = ""


def read_nodes(path: Path) -> list[Machine]:
    """Nodes that have a GPU: columns sn, cpu_milli, memory_mib, gpu, model.

    Raises:
        BadInput
    """
    found = []
    for number, row in _rows(path, ("sn", "cpu_milli", "memory_mib", "gpu", "model")):
        with _Line(path, number):
            if int(row["gpu"]):
                found.append(Machine(row["sn"], int(row["cpu_milli"]), int(row["memory_mib"]) << 20, int(row["gpu"]), row["model"]))
    if not found:
        raise BadInput(f"{path}: no node with a GPU is in it")
    return found


def read_pods(path: Path) -> list[Pod]:
    """Pods: columns cpu_milli, memory_mib, num_gpu, gpu_milli; and where they are there gpu_spec, qos and the times.

    Raises:
        BadInput
    """
    found = []
    for number, row in _rows(path, ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")):
        with _Line(path, number):
            gpus = int(row["num_gpu"])
            milli = int(row["gpu_milli"]) if gpus == 1 else WHOLE
            if gpus and not 0 < milli <= WHOLE:
                raise ValueError(f"gpu_milli {milli}: 1 to {WHOLE}")
            models = frozenset(m for m in (row.get("gpu_spec") or "").split("|") if m)
            shape = Shape(int(row["cpu_milli"]), int(row["memory_mib"]) << 20, gpus, milli, models if gpus else frozenset())
            created = float(row.get("creation_time") or 0)
            begun = float(row.get("scheduled_time") or created)
            ended = float(row.get("deletion_time") or begun)
            found.append(Pod(shape, created, max(ended - begun, 1.0), row.get("qos") or ""))
    if not any(p.shape.gpus for p in found):
        raise BadInput(f"{path}: no pod in it asks for a GPU")
    return found


def _rows(path: Path, needed: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"{path}: columns {', '.join(missing)} are missing; it has {', '.join(reader.fieldnames or ['none'])}")
            yield from enumerate(reader, 2)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error


class _Line:
    """Says which line a fault is in."""

    def __init__(self, path: Path, number: int) -> None:
        self._where = f"{path}, line {number}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, TypeError)):
            raise BadInput(f"{self._where}: {error}") from error


# ---- the experiment of ATC'23 ---------------------------------------------------------------------------------------


def saturate(machines: Sequence[Machine], pods: Sequence[Pod], policy: str, seed: int, limit: float = 1.3) -> dict[str, Any]:
    """Pods arrive in random order and never leave, until they ask for `limit` times the cluster's GPUs.

    As the authors of FGD do it: the trace's pods, thinned out or filled up with repetitions at random to the limit,
    shuffled. Nodes are in random order too, since a policy's ties go to the first of them.
    """
    draw = random.Random(seed)
    order = list(machines)
    draw.shuffle(order)
    shapes = [p.shape for p in pods]
    total = sum(m.gpus for m in order) * WHOLE
    asked = sum(s.gpu_total for s in shapes)
    while asked > limit * total:
        asked -= shapes.pop(draw.randrange(len(shapes))).gpu_total
    every = [p.shape for p in pods]
    while asked < limit * total:
        shapes.append(draw.choice(every))
        asked += shapes[-1].gpu_total
    draw.shuffle(shapes)
    mix = typical(every)
    cluster = Cluster(POLICIES[policy](seed, mix))
    for machine in order:
        cluster.add(machine)
    arrived = allocated = placed = 0
    curve: list[tuple[int, float]] = []
    marks = iter(range(1, round(100 * limit) + 1))
    mark = next(marks, None)
    for shape in shapes:
        arrived += shape.gpu_total
        found = cluster.choose(shape)
        if found is not None:
            cluster.take(found[0], shape, found[1])
            allocated += shape.gpu_total
            placed += 1
        while mark is not None and arrived * 100 >= mark * total:
            curve.append((mark, round(100 * allocated / total, 2)))
            mark = next(marks, None)
    while mark is not None:  # rounding left the sum a hair short
        curve.append((mark, round(100 * allocated / total, 2)))
        mark = next(marks, None)
    at = dict(curve)
    return {
        "experiment": "saturation", "policy": policy, "seed": seed, "nodes": len(order), "gpus": total // WHOLE, "pods": len(shapes),
        "placed": placed, "failed": len(shapes) - placed, "allocated_at_100": at[100], "allocated_at_130": at.get(130, curve[-1][1]),
        "utilisation": _utilisation(cluster), "fragmented": fragmented(cluster, mix), "queueing_seconds": None, "slowdown": None,
        "fairness": None, "preemptions": 0, "curve": curve,
    }  # fmt: skip


def _utilisation(cluster: Cluster) -> dict[str, float]:
    rows = np.array(list(cluster.rows.values()))
    whole = cluster.gpu_count[rows].sum() * WHOLE
    return {
        "cpu": round(100 - 100 * float(cluster.cpu[rows].sum() / cluster.cpu_total[rows].sum()), 2),
        "memory": round(100 - 100 * float(cluster.memory[rows].sum() / cluster.memory_total[rows].sum()), 2),
        "gpu": round(100 - 100 * float(cluster.gpu[rows].sum() / whole), 2),
    }


def fragmented(cluster: Cluster, mix: Iterable[tuple[Shape, float]]) -> float:
    """Percent of all GPUs that are free where the next GPU request, drawn from `mix`, could not use them (ATC'23, section 3)."""
    asked = [(s, w) for s, w in mix if s.gpus]
    if not asked:
        return 0.0
    rows = np.array(list(cluster.rows.values()))
    free = float(cluster.gpu[rows].sum())
    usable = float(Fgd(asked).usable(cluster, rows, cluster.cpu[rows], cluster.gpu[rows]).sum())
    return round(100 * (free - usable) / float(cluster.gpu_count[rows].sum() * WHOLE), 2)


# ---- a queue in virtual time ----------------------------------------------------------------------------------------


@dataclass
class _Job:
    request: Request
    length: float
    left: float
    began: float = -1.0
    waited: float = -1.0
    ended: float = 0.0
    attempt: int = 1


@dataclass
class _Meter:
    """Integrals over time."""

    at: float = 0.0
    gpu: float = 0.0
    cpu: float = 0.0
    fragmented: float = 0.0
    span: float = 0.0
    level: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def advance(self, now: float) -> None:
        """Count the present level up to now."""
        span = now - self.at
        self.gpu, self.cpu = self.gpu + span * self.level[0], self.cpu + span * self.level[1]
        self.fragmented += span * self.level[2]
        self.span, self.at = self.span + span, now


def run(machines: Sequence[Machine], jobs: Sequence[tuple[Request, float]], policy: str, seed: int, **options: Any) -> dict[str, Any]:
    """Requests arrive at their times, take their lengths (seconds), and leave; the pool decides after every change.

    Averages over time are those from the first arrival to the last.
    """
    mix = typical([r.shape for r, _ in jobs])
    pool = Pool(policy, seed=seed, mix=mix if policy == "fgd" else (), **options)
    for machine in machines:
        pool.add(machine)
    known = {r.run: _Job(r, length, length) for r, length in jobs}
    # (time, 0 end | 1 preempted | 2 arrival, number, run, attempt): ends come before arrivals of the same moment.
    agenda: list[tuple[float, int, int, str, int]] = [(r.arrived, 2, i, r.run, 0) for i, (r, _) in enumerate(jobs)]
    heapq.heapify(agenda)
    number, preemptions, never = len(jobs), 0, 0
    first = {r.run: r.arrived for r, _ in jobs}
    last = max(first.values(), default=0.0)
    meter = _Meter(at=min((r.arrived for r, _ in jobs), default=0.0))
    total_gpu, total_cpu = sum(m.gpus for m in machines) * WHOLE, sum(m.cpu_milli for m in machines)
    while agenda:
        now = agenda[0][0]
        if now <= last:
            meter.advance(now)
        while agenda and agenda[0][0] == now:
            _, kind, _, name, attempt = heapq.heappop(agenda)
            job = known[name]
            if kind == 2:
                if pool.possible(job.request):
                    pool.submit(job.request)
                else:
                    never += 1
            elif job.attempt == attempt and name in pool.running:
                pool.finish(name, now)
                if kind == 1:
                    job.left -= now - job.began
                    job.attempt += 1
                    job.request = replace(job.request, arrived=now, attempt=job.attempt)
                    pool.submit(job.request)
                else:
                    job.left, job.ended = 0.0, now
        while True:
            proposal = pool.propose(now)
            for placement in proposal.placements:
                job = known[placement.run]
                job.began = now
                if job.waited < 0:
                    job.waited = now - job.request.arrived
                number += 1
                heapq.heappush(agenda, (now + job.left, 0, number, placement.run, job.attempt))
            for preemption in proposal.preemptions:
                job = known[preemption.run]
                preemptions += 1
                number += 1
                heapq.heappush(agenda, (now + min(_GRACE, job.left), 1, number, preemption.run, job.attempt))
            pool.apply(proposal, now)
            if not proposal.placements:
                break
        cluster = pool.nodes.cluster
        rows = np.array(list(cluster.rows.values()))
        meter.level = (
            100 - 100 * float(cluster.gpu[rows].sum()) / total_gpu if total_gpu else 0.0,
            100 - 100 * float(cluster.cpu[rows].sum()) / total_cpu, fragmented(cluster, mix),
        )  # fmt: skip
    done = [j for j in known.values() if j.left == 0.0]
    waits = [j.waited for j in done]
    slow = [max((j.ended - first[j.request.run]) / max(j.length, _SHORT), 1.0) for j in done]
    by_user: dict[tuple[str, str], list[float]] = {}
    for job, factor in zip(done, slow, strict=True):
        by_user.setdefault((job.request.workspace, job.request.user), []).append(factor)
    means = [sum(v) / len(v) for _, v in sorted(by_user.items())]
    return {
        "experiment": "queue", "policy": policy, "seed": seed, "nodes": len(machines), "gpus": total_gpu // WHOLE, "runs": len(jobs),
        "finished": len(done), "impossible": never, "span_seconds": round(meter.span, 3),
        "utilisation": {"cpu": round(meter.cpu / meter.span, 2), "gpu": round(meter.gpu / meter.span, 2)} if meter.span else None,
        "allocated_gpu_share": round(meter.gpu / meter.span, 2) if meter.span else None,
        "fragmented": round(meter.fragmented / meter.span, 2) if meter.span else None,
        "queueing_seconds": _percentiles(waits), "slowdown": _percentiles(slow), "fairness": round(jain(means), 4),
        "preemptions": preemptions,
    }  # fmt: skip


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 where all are equal, 1/n where one has all (Jain, Chiu, Hawe 1984)."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(np.array(values), [50, 90, 99])
    return {name: round(float(v), 2) for name, v in zip(("p50", "p90", "p99"), found, strict=True)} | {
        "mean": round(sum(values) / len(values), 2)
    }


def replayed(pods: Sequence[Pod]) -> list[tuple[Request, float]]:
    """The trace as it happened: creation times, and how long each pod ran. Users are the classes of service."""
    return [
        (Request(f"pod-{i:05}", "trace", p.qos or "-", p.shape, i + 1, p.created), p.duration) for i, p in enumerate(sorted(pods, key=lambda p: p.created))
    ]  # fmt: skip


def synthetic(machines: Sequence[Machine], runs: int, load: float, seed: int) -> list[tuple[Request, float]]:
    """Poisson arrivals, log-normal lengths, four workspaces of five users, gangs, shares, three tiers.

    `load` is the GPU time asked for over the GPU time there is.
    """
    draw = random.Random(seed)
    gpus = sum(m.gpus for m in machines)
    drawn = []
    for index in range(runs):
        count = draw.choices((1, 2, 4), (90, 7, 3))[0]
        each, milli = draw.choices(
            ((0, WHOLE), (1, 250), (1, 500), (1, WHOLE), (2, WHOLE), (4, WHOLE), (8, WHOLE)), (5, 10, 10, 45, 12, 10, 8)
        )[0]
        shape = Shape(draw.choice((1000, 2000, 4000)) * max(each, 1), draw.choice((4, 8, 16)) << 30, each, milli)
        length = min(draw.lognormvariate(6.5, 1.5), 8 * 3600.0)
        limit = length * draw.uniform(1.0, 3.0) if draw.random() < 0.7 else 0.0
        tier = draw.choices((0, -1, 1), (80, 15, 5))[0]
        drawn.append((f"run-{index:06}", f"team-{draw.randrange(4)}", f"user-{draw.randrange(5)}", shape, count, tier, limit, length))
    work = sum(length * count * shape.gpu_total / WHOLE for *_, shape, count, _, _, length in drawn)
    gap = work / (gpus * load) / runs if gpus else 1.0
    now, found = 0.0, []
    for index, (name, workspace, user, shape, count, tier, limit, length) in enumerate(drawn):
        now += draw.expovariate(1 / gap)
        request = Request(name, workspace, user, shape, index + 1, now, count, tier=tier, duration=limit)
        found.append((request, length))
    return found


# ---- the command ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alveary-sim", description="The scheduler's decision core in virtual time.")
    commands = parser.add_subparsers(dest="command", required=True)
    openb = commands.add_parser("openb", help="the Alibaba 2023 trace: fill the cluster as ATC'23 does, or --replay it")
    openb.add_argument("folder", type=Path, help="folder with nodes.csv and pods.csv")
    openb.add_argument("--pods", type=Path, help="another list of pods of the same form")
    openb.add_argument("--replay", action="store_true", help="arrivals and durations as they were, instead of filling the cluster")
    own = commands.add_parser("synthetic", help="made-up runs that arrive and leave")
    own.add_argument("--nodes", type=int, default=64, help="nodes of 8 GPUs (default 64)")
    own.add_argument("--runs", type=int, default=10_000, help="runs in all (default 10000)")
    own.add_argument("--load", type=float, default=0.9, help="GPU time asked for over GPU time there is (default 0.9)")
    for command in (openb, own):
        command.add_argument("--policy", choices=sorted(POLICIES), default="fgd", help="placement policy (default fgd)")
        command.add_argument("--seed", type=int, default=42, help="of everything that is drawn (default 42)")
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def show(result: dict[str, Any]) -> str:
    """The result as lines."""
    lines = []
    for key, value in result.items():
        if key == "curve" or value is None:
            continue
        text = ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"{key.replace('_', ' '):<22} {text}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """`alveary-sim`; exit code 2 for bad input."""
    asked = _parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        if asked.command == "openb":
            machines = read_nodes(asked.folder / "nodes.csv")
            pods = read_pods(asked.pods or asked.folder / "pods.csv")
            if asked.replay:
                result = run(machines, replayed(pods), asked.policy, asked.seed)
            else:
                result = saturate(machines, pods, asked.policy, asked.seed)
        else:
            if asked.nodes < 1 or asked.runs < 1 or asked.load <= 0:
                raise BadInput("--nodes and --runs must be at least 1, --load above 0")
            machines = [Machine(f"node-{i:05}", 96_000, 768 << 30, 8) for i in range(asked.nodes)]
            quotas = {("team-0", ""): Quota(weight=2.0)}
            result = run(machines, synthetic(machines, asked.runs, asked.load, asked.seed), asked.policy, asked.seed, quotas=quotas)
    except BadInput as error:
        sys.exit(f"alveary-sim: {error}")
    print(json.dumps(result) if asked.json else show(result))
    print(f"took {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
