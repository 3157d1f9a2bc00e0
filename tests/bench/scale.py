"""How times grow with what there is: `make bench-scale [SCALE="--runs 100000"]`. Figures go to docs/scale.md.

Each part is a function of its own that prints its figures and returns them as rows (what, size, value, unit).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import auth
from alveary_core.events import Key, body, envelope, name_of
from alveary_core.projection import Raw
from alveary_runs import listing, query, series
from alveary_runs.api import RunService
from alveary_runs.metrics import MetricsProjection
from alveary_runs.projection import RunsProjection, whole

Row = tuple[str, int, float, str]
ROWS: list[Row] = []


def note(what: str, size: int, value: float, unit: str) -> None:
    """Remember a figure."""
    ROWS.append((what, size, value, unit))
    print(f"{what:<58} {size:>10,}  {value:>12,.2f} {unit}", flush=True)


def median(work: Callable[[], object], tries: int = 7) -> float:
    """Milliseconds, with connections that are open."""
    times = []
    for _ in range(4):  # each thread of the readers opens one
        work()
    for _ in range(tries):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


# ---- runs ------------------------------------------------------------------------------------------------------------


def life(number: int, chosen: random.Random) -> list[Any]:
    """The events of a run that the runs service's view follows: eight of the thirteen that a plain run has."""
    spec = c.RunSpec(
        experiment=f"experiment-{number % 50}", snapshot="0123456789abcdef" * 4, compute_target="local", entry_script="train.py",
        arguments=["--epochs", "10", "--lr", f"{chosen.random():.4f}"], max_attempts=3, grace_seconds=10.0, node_count=1,
        resources=c.Resources(cpus=1.0), display_name=f"run {number}", tags={"stage": "dev" if number % 200 else "prod", "seed": str(number % 1000)},
    )  # fmt: skip
    end = c.ExitStatus(exit_code=0, reason=c.EXIT_REASON_EXITED)
    return [
        ev.RunSubmitted(spec=spec, submitted_by="someone", image_digest="fedcba9876543210" * 4, number=number, idempotency_key=new_id()),
        ev.RunPrepared(image_digest="fedcba9876543210" * 4, cached=True), ev.RunQueued(reason="waits for 1 CPU on local"),
        ev.RunStarting(attempt=1, nodes=["local-0"]), ev.RunStarted(attempt=1), ev.RunFinalizing(attempt=1),
        ev.RunCompleted(attempt=1, exit=end, manifest_digest="00ff" * 16) if number % 10 else ev.RunFailed(attempt=1, exit=end),
    ]  # fmt: skip


def messages(count: int, begin: int, *, compacted: bool = False) -> Iterator[Raw]:
    """What the stream would bring of `count` runs, 50 of them at a time side by side."""
    chosen = random.Random(begin)
    sequence = begin * 13
    for window in range(begin, begin + count, 50):
        runs = [(new_id(), life(n, chosen)) for n in range(window, min(window + 50, begin + count))]
        steps = max(len(events) for _, events in runs) if not compacted else 1
        for step in range(steps):
            for run_id, events in runs:
                key = Key("w", "run", run_id)
                message = _compacted(events) if compacted else events[step]
                sequence += 1
                yield Raw(
                    key.subject(name_of(message)[1]), envelope(key, message, f"{run_id}-{sequence}", "runs", ""), body(message), sequence
                )


def _compacted(events: list[Any]) -> Any:
    first = events[0]
    shown = pb.Run(
        spec=first.spec, submitted_by="someone", image_digest=first.image_digest, number=first.number, tags=first.spec.tags, attempt=1,
        state=c.RUN_STATE_COMPLETED, nodes=["local-0"], display_name=first.spec.display_name, exit=events[-1].exit, manifest_digest="00ff" * 16,
    )  # fmt: skip
    for name in ("submitted_at", "started_at", "ended_at"):
        getattr(shown, name).FromNanoseconds(time.time_ns())
    return whole(shown, first.idempotency_key, False)


def fold(view: Any, stream: Iterator[Raw], batch: int = 500, clock: Callable[[], float] = time.perf_counter) -> float:
    """Fold messages as the projection does; seconds of the fold alone."""
    view.db.execute("INSERT OR IGNORE INTO position VALUES (1, 0, 'bench')")
    spent, gathered = 0.0, []
    for raw in stream:
        gathered.append(raw)
        if len(gathered) == batch:
            started = clock()
            view._fold_batch(gathered)
            spent += clock() - started
            gathered = []
    if gathered:
        started = clock()
        view._fold_batch(gathered)
        spent += clock() - started
    view.position = view.db.execute("SELECT sequence FROM position").fetchone()[0]
    return spent


QUERIES = [
    ("first page of 100", "", ""),
    ("filter by state, no match", "state = Canceled", ""),
    ("filter by state, most match", "state = Completed", ""),
    ("filter by tag, no match", "tags.stage = none", ""),
    ("filter by tag, 1 of 200", "tags.stage = prod", ""),
    ("filter by tag, 1 of 1000", "tags.seed = 77", ""),
    ("filter by metric, no match", "metrics.loss < -1", ""),
    ("filter by metric, 1 of 100", "metrics.loss < 0.01", ""),
    ("order by metric", "", "metrics.loss"),
    ("order by metric, filter by tag", "tags.stage = prod", "metrics.loss desc"),
    ("tag, metric and state together", "tags.stage = prod AND metrics.loss < 0.1 AND state = Completed", ""),
    ("experiment, oldest first", 'experiment = "experiment-7"', "submitted_at"),
]


def runs(folder: Path, most: int, steps: int) -> None:
    """Lists at N, 2N, ... runs, all final: synthetic events go straight into the read model."""
    metrics = MetricsProjection(str(folder / "metrics.sqlite"))
    view = RunsProjection(str(folder / "runs.sqlite"), metrics)
    service = RunService(None, None, None, view)  # type: ignore[arg-type]
    auth.caller.set(auth.Principal("me", "w", "reader"))
    sizes = sorted({most // 2**n for n in range(steps)})
    have = 0
    for size in sizes:
        fold(view, messages(size - have, have, compacted=True))
        for row in view.db.execute("SELECT id FROM runs WHERE rowid > ?", (have,)).fetchall():
            batch = pb.MetricBatch(points=[pb.MetricPoint(name=n, scalar=random.random()) for n in ("loss", "accuracy")], attempt=1)
            metrics.apply(_logged(row[0], batch))
            if not random.randrange(500):
                metrics.flush()
        metrics.flush()
        have = size
        for what, text, order in QUERIES:
            metric, direction = query.order(order)
            ask = listing.Listing("w", query.conditions(text), metric, direction, False, 100)
            note(what, size, median(lambda ask=ask: asyncio.run(view.read(lambda db: listing.page(db, ask)))), "ms")  # type: ignore[misc]
        request = pb.ListRunsRequest(page_size=100)
        note("ListRuns, whole answer", size, median(lambda request=request: asyncio.run(service.ListRuns(request, None))), "ms")
        number = median(lambda: asyncio.run(view.next_number("w", "experiment-7")))
        note("number of the next run (was count(*))", size, number, "ms")
        note("view on disk", size, sum(f.stat().st_size for f in folder.glob("runs.sqlite*")) / size, "bytes a run")
    view.close()
    started = time.perf_counter()
    again = RunsProjection(str(folder / "runs.sqlite"), metrics)
    ask = listing.Listing("w", [], "", "DESC", False, 100)
    asyncio.run(again.read(lambda db: listing.page(db, ask)))
    note("opening a warm view, to its first page", most, time.perf_counter() - started, "s")
    note("memory of the process", most, psutil.Process().memory_info().rss / 1e6, "MB")
    again.close()
    metrics.close()


def million(folder: Path, size: int) -> None:
    """A workspace of a million runs: `size` are folded, and their rows multiplied in the file."""
    metrics = MetricsProjection(str(folder / "metrics.sqlite"))
    view = RunsProjection(str(folder / "runs.sqlite"), metrics)
    fold(view, messages(size, 0, compacted=True))
    for (run,) in view.db.execute("SELECT id FROM runs").fetchall():
        metrics.apply(_logged(run, pb.MetricBatch(points=[pb.MetricPoint(name="loss", scalar=random.random())], attempt=1)))
    metrics.flush()
    columns = [r[1] for r in view.db.execute("PRAGMA table_info(runs)")]
    for copy in range(1, 1_000_000 // size):
        # Ids begin with their time, so those of today with "01": copies are told by another beginning.
        ident, at = f"'{copy + 10}' || substr({{}}, 3)", f"submitted_at - {copy} * 1000"
        other = {"id": ident.format("id"), "submitted_at": at, "idempotency": "''"}
        view.db.execute(f"INSERT INTO runs SELECT {', '.join(other.get(x, x) for x in columns)} FROM runs WHERE substr(id, 1, 2) = '01'")
        labels = f"workspace, kind, key, value, {at}, {ident.format('run')} FROM labels WHERE substr(run, 1, 2) = '01'"
        view.db.execute(f"INSERT INTO labels SELECT {labels}")
        values = f"{ident.format('run')}, name, workspace, nth, attempt, abs(random() % 100000) / 1e5, nan FROM newest"
        metrics.db.execute(f"INSERT INTO newest SELECT {values} WHERE substr(run, 1, 2) = '01'")
    view.db.execute("DELETE FROM experiments")
    view.db.execute("INSERT INTO experiments SELECT workspace, experiment, count(*), max(submitted_at) FROM runs GROUP BY 1, 2")
    total = view.db.execute("SELECT count(*) FROM runs").fetchone()[0]
    for what, text, order in QUERIES:
        metric, direction = query.order(order)
        ask = listing.Listing("w", query.conditions(text), metric, direction, False, 100)
        note(what, total, median(lambda ask=ask: asyncio.run(view.read(lambda db: listing.page(db, ask)))), "ms")  # type: ignore[misc]
    view.close()
    started = time.perf_counter()
    again = RunsProjection(str(folder / "runs.sqlite"), metrics)
    asyncio.run(again.read(lambda db: listing.page(db, listing.Listing("w", [], "", "DESC", False, 100))))
    note("opening a warm view, to its first page", total, time.perf_counter() - started, "s")
    note("memory of the process", total, psutil.Process().memory_info().rss / 1e6, "MB")
    again.close()
    metrics.close()


def _logged(run: str, batch: pb.MetricBatch) -> Any:
    from alveary_core.events import Event

    return Event("", Key("w", "metrics", run), "logged", batch, 0, 0.0)


# ---- replay ----------------------------------------------------------------------------------------------------------


def replay(folder: Path, size: int) -> None:
    """A lost view: folding N, 2N, 4N and 10N runs, with all their events and as compacted ones."""
    for kind in ("all events", "compacted"):
        for factor in (1, 2, 4, 10):
            count = size * factor
            name = folder / f"{kind[:3]}{factor}"
            metrics = MetricsProjection(f"{name}.metrics")
            view = RunsProjection(f"{name}.runs", metrics)
            stream = list(messages(count, 0, compacted=kind == "compacted"))
            seconds = fold(view, iter(stream), clock=time.process_time)
            note(f"replay, {kind}: fold", count, seconds, "s of CPU")
            note(f"replay, {kind}: one event", count, seconds / len(stream) * 1e6, "us of CPU")
            if factor == 1:
                stored = sum(len(r.data) + len(r.subject) + sum(len(k) + len(v) + 4 for k, v in r.headers.items()) + 42 for r in stream)
                note(f"event log, {kind}: events of run alone", count, stored / count, "bytes a run")
            view.close()
            metrics.close()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def points(folder: Path, most: int) -> None:
    """One run with many points: stored, drawn, read."""
    view = MetricsProjection(str(folder / "points.sqlite"))
    sequence = 0
    per = 4000  # as many as a trainer puts into a message

    def stream(begin: int, end: int) -> Iterator[Raw]:
        nonlocal sequence
        for first in range(begin, end, per):
            batch = pb.MetricBatch(attempt=1)
            for step in range(first, min(first + per, end)):
                point = batch.points.add(name="loss", scalar=random.random(), step=step)
                point.time.seconds = 1_700_000_000 + step
            sequence += 1
            yield Raw("alveary-metrics.w.r", {}, batch.SerializeToString(), sequence)

    have = 0
    for size in sorted({most // 10, most // 4, most // 2, most}):
        seconds = fold(view, stream(have, size), batch=40)
        note("points stored a second (fold)", size, (size - have) / seconds, "points/s")
        have = size
        for max_points in (200, 1000):
            ask = series.Query(max_points=max_points)
            drawn = median(lambda ask=ask: asyncio.run(view.read(lambda db: series.page(db, ["r"], ask, series.Token()))))  # type: ignore[misc]
            note(f"series drawn with {max_points} points", size, drawn, "ms")
        ask = series.Query(columns=True)
        note(
            "first page of 100,000 points",
            size,
            median(lambda ask=ask: asyncio.run(view.read(lambda db: series.page(db, ["r"], ask, series.Token())))),
            "ms",
        )
        run = pb.Run(id="r")
        from alveary_runs.metrics import show

        note("newest value of a run", size, median(lambda run=run: asyncio.run(view.read(lambda db: show(db, run, [])))), "ms")
    note("points on disk", most, sum(f.stat().st_size for f in folder.glob("points.sqlite*")) / most, "bytes a point")
    view.close()


# ---- lookups while queries last --------------------------------------------------------------------------------------


def lookups(folder: Path, size: int) -> None:
    """GetRun while lists, filters that find nothing and thinned series are asked for without pause."""
    metrics = MetricsProjection(str(folder / "m"))
    view = RunsProjection(str(folder / "r"), metrics)
    service = RunService(None, None, None, view)  # type: ignore[arg-type]
    fold(view, messages(size, 0, compacted=True))
    ids = [r[0] for r in view.db.execute("SELECT id FROM runs LIMIT 1000")]
    sys.setswitchinterval(0.0005)

    async def measure() -> None:
        auth.caller.set(auth.Principal("me", "w", "reader"))

        async def ask(request: pb.ListRunsRequest) -> None:
            while True:
                await service.ListRuns(request, None)

        for load in (0, 4, 16):
            requests = [
                pb.ListRunsRequest(page_size=1000),
                pb.ListRunsRequest(filter='name > "zzz"'),
                pb.ListRunsRequest(filter="state = Canceled"),
            ]
            tasks = [asyncio.create_task(ask(requests[n % len(requests)])) for n in range(load)]
            await asyncio.sleep(0.2)
            times = []
            for n in range(500):
                started = time.perf_counter()
                await service.GetRun(pb.GetRunRequest(run_id=ids[n % len(ids)]), None)
                times.append((time.perf_counter() - started) * 1000)
                await asyncio.sleep(0.002)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            times.sort()
            note(f"GetRun beside {load} endless lists, median", size, times[250], "ms")
            note(f"GetRun beside {load} endless lists, p99", size, times[494], "ms")

    asyncio.run(measure())
    view.close()
    metrics.close()


PLOTS = {
    "scale-lists.svg": ("A page of 100 runs", "runs", "ms", [what for what, _, _ in QUERIES]),
    "scale-points.svg": ("A series of one run", "points", "ms", ["series drawn with 200 points", "series drawn with 1000 points", "first page of 100,000 points"]),
    "scale-replay.svg": ("Folding a lost view", "runs", "s of CPU", ["replay, all events: fold", "replay, compacted: fold"]),
}  # fmt: skip


def plot(folder: Path) -> None:
    """Draw what was measured."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from plot import write

    for name, (title, x, y, wanted) in PLOTS.items():
        lines = {what: [(float(size), value) for w, size, value, _ in ROWS if w == what] for what in wanted}
        lines = {what: line for what, line in lines.items() if len(line) > 1}
        if lines:
            write(folder / name, title, x, y, lines, log_x=True)


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "runs": lambda folder, o: runs(folder, o.runs, 4),
    "replay": lambda folder, o: replay(folder, max(o.runs // 100, 100)),
    "points": lambda folder, o: points(folder, o.points),
    "million": lambda folder, o: million(folder, min(o.runs, 20_000)),
    "lookups": lambda folder, o: lookups(folder, min(o.runs, 50_000)),
}


def main() -> None:
    """Measure and print; with --json also write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which parts; default: all")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=2_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="folder of the plots of docs/scale.md")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="alveary-bench-") as folder:
            PARTS[name](Path(folder), options)
    if options.json:
        options.json.write_text(json.dumps(ROWS, indent=0))
    if options.plots:
        plot(options.plots)


if __name__ == "__main__":
    main()
