"""Many points, long descriptions, strange names: from script and client to what is read."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
from support import Embedded, finished, submit, until

from alveary import Workspace
from alveary.errors import AlvearyError
from alveary_contracts.runs.v1 import runs_pb2 as pb


async def log(workspace: Workspace, run_id: str, points: list[pb.MetricPoint], size: int = 5000) -> None:
    """Log from outside, in requests of `size` points."""
    client = workspace._client

    async def requests():  # type: ignore[no-untyped-def]
        for begin in range(0, len(points), size):
            yield pb.LogMetricsRequest(run_id=run_id, points=points[begin : begin + size])

    reply = await client.stubs.runs.LogMetrics(requests(), metadata=client.metadata, timeout=120)
    assert reply.accepted == len(points)


def test_110_000_points_with_long_descriptions_are_read_while_lists_answer(workspace: Workspace, source: Path) -> None:
    run = submit(workspace, source, "print('nothing')")
    finished(run)
    points = [pb.MetricPoint(name="loss", scalar=float(i), step=i, description="what this is " * 50) for i in range(110_000)]
    workspace._call(log(workspace, run.id, points))
    assert run.get_metrics()["loss"] == [float(i) for i in range(110_000)]
    series = workspace._call(workspace._client.metrics.series(run.id, "loss", max_points=500))
    assert len(series) == 1 and len(series[0].points) <= 500 and series[0].points[-1].scalar == 109_999 and series[0].point_count == 110_000
    found = workspace._call(workspace._client.runs.get(run.id))
    assert dict(found.metrics) == {"loss": 109_999.0} and found.metric_count == 1
    with pytest.raises(AlvearyError, match="256"):
        workspace._call(workspace._client.metrics.log(run.id, "n" * 300, 1.0, None))
    with pytest.raises(AlvearyError, match="max_points"):
        workspace._call(workspace._client.metrics.series(run.id, "loss", max_points=1))


def test_points_of_an_attempt_that_was_lost_do_not_mix_with_those_of_the_next(stack: Embedded, workspace: Workspace, source: Path) -> None:
    run = submit(
        workspace,
        source,
        """
        import os, time
        from alveary import Run
        run = Run.get_context()
        attempt = int(os.environ["ALVEARY_ATTEMPT"])
        for step in range(5 if attempt == 1 else 3, 10 if attempt == 1 else 8):
            run.log("loss", attempt * 100 + step, step=step)
        run.log("note", attempt)
        run.flush()
        if attempt == 1:
            print("logged", flush=True)
            time.sleep(600)
        """,
    )
    until(lambda: len(run.get_metrics().get("loss", [])) == 5 and "note" in run.get_metrics(), "the first attempt logged")
    for pid in stack.trainer_pids():
        os.kill(pid, signal.SIGKILL)
    assert finished(run)["attempt"] == 2
    assert run.get_metrics() == {"loss": [203.0, 204.0, 205.0, 206.0, 207.0], "note": 2.0}
    (first,) = workspace._call(workspace._client.metrics.series(run.id, "loss", attempt=1))
    assert [p.scalar for p in first.points] == [105.0, 106.0, 107.0, 108.0, 109.0] and first.attempt == 1
    assert not math.isnan(workspace._call(workspace._client.runs.get(run.id)).metrics["loss"])
