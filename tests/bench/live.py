"""Scale of a whole embedded stack: `make bench-live LIVE="points --points 1000000"`.

What `scale.py` measures on one read model alone, here with the message bus, the trainer and the services around it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import nats
from bench.files import longest_stall
from bench.scale import life
from support import Embedded, embedded, finished, submit

from alveary.local.layout import Layout
from alveary_contracts.ids import new_id
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.eventlog import ensure_streams
from alveary_core.events import STREAM, Key, body, envelope, name_of

_SIDE_BY_SIDE = 200


def note(what: str, value: float, unit: str) -> None:
    """Print a figure."""
    print(f"{what:<64} {value:>12,.1f} {unit}", flush=True)


async def while_running(work: Awaitable[object], ask: Callable[[], Awaitable[object]]) -> list[float]:
    """Do `work`, and time `ask` ten times a second meanwhile; milliseconds, sorted."""
    task = asyncio.ensure_future(work)
    times = []
    while not task.done():
        started = time.perf_counter()
        await ask()
        times.append((time.perf_counter() - started) * 1000)
        await asyncio.wait({task}, timeout=0.1)
    await task
    return sorted(times)


def points(folder: Path, count: int) -> None:
    """A run that logs `count` points: through its trainer, the bus and the read model."""
    with embedded(folder / "stack", lease=30) as stack:
        workspace = stack.workspace()
        client = workspace._client
        (folder / "source").mkdir()
        code = f"""
        from alveary import Run
        run = Run.get_context()
        for step in range({count}): run.log("loss", step, step=step)
        run.flush()
        """
        other = submit(workspace, folder / "source", "pass")
        finished(other)
        run = submit(workspace, folder / "source", code)
        started = time.monotonic()

        async def all_there() -> None:
            while (await client.runs.get(run.id)).metric_count < 1 or await stored() < count:
                await asyncio.sleep(0.2)

        async def stored() -> int:
            request = pb.GetMetricsRequest(run_id=run.id, max_points=4, columns=True)
            reply = await client.call(client.stubs.runs.GetMetrics, request)
            return max((series.point_count for series in reply.series), default=0)

        times = workspace._call(while_running(all_there(), lambda: client.runs.get(other.id)))
        note(f"{count:,} points of a run, from its start to the read model", count / (time.monotonic() - started), "points/s")
        note("GetRun of another run meanwhile, median", statistics.median(times), "ms")
        note("GetRun of another run meanwhile, p99", times[int(len(times) * 0.99)], "ms")
        finished(run)
        request = pb.GetMetricsRequest(run_id=run.id, max_points=1000, columns=True)
        draws = []
        for _ in range(5):
            began = time.perf_counter()
            workspace._call(client.call(client.stubs.runs.GetMetrics, request))
            draws.append((time.perf_counter() - began) * 1000)
        note("its series drawn with 1,000 points", statistics.median(draws), "ms")
        note("longest delay of an event loop (0: none above 100 ms)", longest_stall(stack) * 1000, "ms")


async def publish(layout: Layout, count: int) -> None:
    """Put the events of `count` final runs of the workspace "default" into the event log."""
    connection = await nats.connect(f"nats://127.0.0.1:{layout.ports.nats}", user="runs", password=layout.secrets["runs"])
    await ensure_streams(connection)
    js = connection.jetstream(timeout=30)
    chosen = random.Random(1)
    for first in range(0, count, _SIDE_BY_SIDE):
        runs = [(Key("default", "run", new_id()), life(n, chosen)) for n in range(first, min(first + _SIDE_BY_SIDE, count))]
        for step in range(max(len(events) for _, events in runs)):
            await asyncio.gather(
                *(
                    js.publish(key.subject(name_of(e[step])[1]), body(e[step]), headers=envelope(key, e[step], new_id(), "runs", ""))
                    for key, e in runs
                )
            )
    await connection.close()


async def messages(layout: Layout) -> int:
    """Messages of the event log."""
    connection = await nats.connect(f"nats://127.0.0.1:{layout.ports.nats}", user="runs", password=layout.secrets["runs"])
    try:
        return int((await connection.jetstream(timeout=30).stream_info(STREAM)).state.messages)
    finally:
        await connection.close()


def history(folder: Path, count: int) -> None:
    """`count` final runs: their events are folded, compacted, and folded again after the read model was lost."""
    state = folder / "stack"
    os.environ["ALVEARY_COMPACT_AFTER_SECONDS"] = str(10 * 86400)
    with embedded(state, lease=30) as stack:
        started = time.monotonic()
        asyncio.run(publish(Layout.open(state, None), count))
        written = time.monotonic() - started
        wait_for_runs(stack, count)
        note(f"{count:,} final runs: events written", count / written, "runs/s")
        note("and in the read model after", time.monotonic() - started - written, "s more")
        before = asyncio.run(messages(Layout.open(state, None)))
    os.environ["ALVEARY_COMPACT_AFTER_SECONDS"] = "0"
    os.environ["ALVEARY_COMPACT_INTERVAL_SECONDS"] = "1"
    with embedded(state, lease=30) as stack:
        workspace = stack.workspace()
        client = workspace._client
        (folder / "source").mkdir()
        plain = submit(workspace, folder / "source", "pass")
        layout = Layout.open(state, None)  # each start of the stack has other ports
        started = time.monotonic()

        async def compacted() -> None:
            while await messages(layout) > count * 1.5 + 1000:
                await asyncio.sleep(0.5)

        times = workspace._call(while_running(compacted(), lambda: client.runs.get(plain.id)))
        seconds = time.monotonic() - started
        note(f"compaction, {before:,} messages to {asyncio.run(messages(Layout.open(state, None))):,}", count / seconds, "runs/s")
        if times:
            note("GetRun meanwhile, p99", times[int(len(times) * 0.99)], "ms")
    size = sum(f.stat().st_size for f in (state / "nats").rglob("*") if f.is_file())
    note("event log on disk", size / count, "bytes a run")
    for file in (state / "services").glob("runs.sqlite*"):
        file.unlink()
    started = time.monotonic()
    with embedded(state, lease=30) as stack:
        wait_for_runs(stack, count)
        note("the lost read model is whole again, start of the stack included", time.monotonic() - started, "s")
    started = time.monotonic()
    with embedded(state, lease=30) as stack:
        wait_for_runs(stack, count)
        note("start with a warm read model", time.monotonic() - started, "s")


def wait_for_runs(stack: Embedded, count: int) -> None:
    """Until the experiments have that many runs."""
    workspace = stack.workspace()
    client = workspace._client
    deadline = time.monotonic() + 1800
    while True:
        reply = workspace._call(client.call(client.stubs.experiments.ListExperiments, pb.ListExperimentsRequest()))
        if sum(e.run_count for e in reply.experiments) >= count:
            return
        assert time.monotonic() < deadline, f"not within half an hour: {count} runs"
        time.sleep(0.2)


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "points": lambda folder, o: points(folder, o.points),
    "history": lambda folder, o: history(folder, o.runs),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which parts; default: all")
    parser.add_argument("--points", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=100_000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {sys.version.split()[0]}")
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="alveary-bench-") as folder:
            PARTS[name](Path(folder), options)


if __name__ == "__main__":
    main()
