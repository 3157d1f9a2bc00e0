"""The read model of runs, filled with events as the log gives them, and what ListRuns answers from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fakes import MemoryLog, MemoryStore

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.errors import InvalidArgument, NotFound
from alveary_core.events import Event, Key
from alveary_runs import domain
from alveary_runs.api import RunService
from alveary_runs.metrics import MetricsProjection
from alveary_runs.projection import RunsProjection

VALUES = {"low": 0.25, "high": 7.0, "nan": math.nan, "inf": math.inf, "minus": -math.inf, "none": None}


class Filled:
    """A projection of runs without servers."""

    def __init__(self, path: Path) -> None:
        self.metrics = MetricsProjection(str(path.with_suffix(".metrics")))
        self.view = RunsProjection(str(path), self.metrics)
        log = MemoryLog("runs")
        aggregates = Aggregates(log, "run", domain.Run, lambda run, event: domain.evolve(run, event.message))  # type: ignore[arg-type]
        self.service = RunService(log, MemoryStore(), aggregates, self.view)  # type: ignore[arg-type]
        self.sequence = 0

    def apply(self, run: str, *messages: object, workspace: str = "w") -> None:
        for message in messages:
            self.sequence += 1
            self.view.apply(Event(str(self.sequence), Key(workspace, "run", run), "x", message, self.sequence, 1e9 + self.sequence))  # type: ignore[arg-type]

    def submit(self, run: str, **spec: object) -> None:
        self.apply(run, ev.RunSubmitted(spec=c.RunSpec(experiment="e", **spec)))  # type: ignore[arg-type]

    def log(self, run: str, *values: tuple[str, float]) -> None:
        self.sequence += 1
        batch = pb.MetricBatch(points=[pb.MetricPoint(name=n, scalar=v) for n, v in values])
        self.metrics.apply(Event("", Key("w", "metrics", run), "logged", batch, self.sequence, 0.0))
        self.metrics.flush()

    async def list(self, filter: str = "", order_by: str = "submitted_at", size: int = 100) -> list[str]:
        """Ids of all pages."""
        found: list[str] = []
        token = ""
        while True:
            request = pb.ListRunsRequest(filter=filter, order_by=order_by, page_size=size, page_token=token)
            reply = await self.service.ListRuns(request, None)
            found += [run.id for run in reply.runs]
            token = reply.next_page_token
            if not token:
                return found
            assert len(reply.runs) == size


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    auth.caller.set(auth.Principal("me", "w", "writer"))
    made = Filled(tmp_path / "runs.sqlite")
    for name, value in VALUES.items():
        made.submit(name)
        if value is not None:
            made.log(name, ("loss", value))
    return made


async def test_nan_and_infinities_are_values_like_others(filled: Filled) -> None:
    reply = await filled.service.ListRuns(pb.ListRunsRequest(), None)
    shown = {run.id: run.metrics.get("loss") for run in reply.runs}
    assert shown.pop("nan") != shown.get("nan") and shown == {k: v for k, v in VALUES.items() if k != "nan"}
    found = (await filled.service.GetRun(pb.GetRunRequest(run_id="nan"), None)).run
    assert math.isnan(found.metrics["loss"])


@pytest.mark.parametrize("size", [1, 2, 100])
async def test_nan_comes_last_in_both_directions_on_every_page(filled: Filled, size: int) -> None:
    assert await filled.list(order_by="metrics.loss", size=size) == ["minus", "low", "high", "inf", "nan"]
    assert await filled.list(order_by="metrics.loss desc", size=size) == ["inf", "high", "low", "minus", "nan"]


@pytest.mark.parametrize(
    ("condition", "runs"),
    [
        ("= nan", {"nan"}),
        ("!= nan", {"low", "high", "inf", "minus"}),
        ("= inf", {"inf"}),
        ("< inf", {"low", "high", "minus"}),
        ("> -inf", {"low", "high", "inf"}),
        ("= -Infinity", {"minus"}),
        ("!= 7", {"low", "nan", "inf", "minus"}),
        ("< 1", {"low", "minus"}),
        (">= 0.25", {"low", "high", "inf"}),
        ("= 0", set()),
    ],
)
async def test_filters_compare_as_numbers_do(filled: Filled, condition: str, runs: set[str]) -> None:
    assert set(await filled.list(f"metrics.loss {condition}")) == runs


async def test_an_order_relative_to_nan_is_refused(filled: Filled) -> None:
    with pytest.raises(InvalidArgument, match="use = or !="):
        await filled.list("metrics.loss < nan")


# ---- ids as people type them ---------------------------------------------------------------------------------------------

ONE, TWO, FAR = "01JDXA6Z1N0000000000000001", "01JDXA6Z1N0000000000000002", "01JDXB0000000000000000000Z"


@pytest.fixture
def three(tmp_path: Path) -> Filled:
    auth.caller.set(auth.Principal("me", "w", "writer"))
    made = Filled(tmp_path / "runs.sqlite")
    for run in (ONE, TWO, FAR):
        made.submit(run, display_name=f"the {run[-1]}")
    made.apply("01JDXA6Z1P0000000000000003", ev.RunSubmitted(spec=c.RunSpec(experiment="e")), workspace="another")
    return made


@pytest.mark.parametrize(
    ("typed", "run"), [(FAR, FAR), (FAR.lower(), FAR), ("01JDXB", FAR), ("01jdxb0", FAR), (" 01JDXB\n", FAR), (TWO[:-1] + "2", TWO)]
)
async def test_a_run_is_found_by_the_beginning_of_its_id(three: Filled, typed: str, run: str) -> None:
    assert (await three.service.GetRun(pb.GetRunRequest(run_id=typed), None)).run.id == run


async def test_a_beginning_that_several_runs_share_is_refused_and_names_them(three: Filled) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await three.service.GetRun(pb.GetRunRequest(run_id="01JDXA6Z"), None)
    assert f"{TWO} (e, the 2), {ONE} (e, the 1): give more" in str(caught.value)
    assert "another" not in str(caught.value) and FAR not in str(caught.value)


@pytest.mark.parametrize("typed", ["", "01J", "nothing", "01JDXA6Z1P", "01JDXC", "%", "01JDXB_", "*", "01JDXB0000000000000000000ZZ"])
async def test_what_begins_no_id_finds_no_run(three: Filled, typed: str) -> None:
    with pytest.raises(NotFound, match="there is no run"):
        await three.service.GetRun(pb.GetRunRequest(run_id=typed), None)
