"""The read model of runs, filled with events as the log gives them, and what ListRuns answers from it."""

from __future__ import annotations

import math
import operator
import random
from pathlib import Path
from typing import Any

import pytest
from fakes import MemoryLog, MemoryStore

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.errors import InvalidArgument, NotFound
from alveary_core.events import Event, Key
from alveary_runs import domain, listing, query
from alveary_runs.api import ExperimentService, RunService
from alveary_runs.metrics import MetricsProjection
from alveary_runs.projection import RunsProjection, whole

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
        self.view.flush()

    def submit(self, run: str, **spec: object) -> None:
        self.apply(run, ev.RunSubmitted(spec=c.RunSpec(experiment="e", **spec)))  # type: ignore[arg-type]

    def log(self, run: str, *values: tuple[str, float]) -> None:
        self.sequence += 1
        batch = pb.MetricBatch(points=[pb.MetricPoint(name=n, scalar=v) for n, v in values])
        self.metrics.apply(Event("", Key("w", "metrics", run), "logged", batch, self.sequence, 0.0))
        self.metrics.flush()

    async def list(self, filter: str = "", order_by: str = "submitted_at", size: int = 100, include_archived: bool = False) -> list[str]:
        """Ids of all pages."""
        found: list[str] = []
        token = ""
        while True:
            request = pb.ListRunsRequest(
                filter=filter, order_by=order_by, page_size=size, page_token=token, include_archived=include_archived
            )
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


NAMES = ["loss", "train/loss", 'a "b"']
STATES = {"Queued": c.RUN_STATE_QUEUED, "Completed": c.RUN_STATE_COMPLETED, "Failed": c.RUN_STATE_FAILED}


class Model:
    """What ListRuns means, in plain Python."""

    def __init__(self, made: Filled, seed: int) -> None:
        chosen = random.Random(seed)
        self.runs: dict[str, dict[str, Any]] = {}
        for _ in range(40):
            run = f"r{chosen.randrange(10**6):06}"
            tags = {k: chosen.choice("xyz") for k in ("a b", "k") if chosen.random() < 0.6}
            parent = chosen.choice(["", "", "p"])
            made.submit(
                run, tags=tags, parent_run_id=parent, compute_target=chosen.choice(["t", "u"]), display_name=chosen.choice(["", "n"])
            )
            row: dict[str, Any] = {"id": run, "tags": tags, "parent": parent, "at": 1e9 + made.sequence, "metrics": {}, "archived": False}
            spec = made.view._live[run].run.spec
            row |= {"target": spec.compute_target, "name": spec.display_name, "state": "Queued"}
            made.apply(run, ev.RunQueued(reason="r"))
            if end := chosen.choice(["", "Completed", "Failed"]):
                made.apply(run, ev.RunCompleted(attempt=1) if end == "Completed" else ev.RunFailed(attempt=1))
                row["state"] = end
            if chosen.random() < 0.1:
                made.apply(run, ev.RunArchived())
                row["archived"] = True
            for name in NAMES:
                if chosen.random() < 0.6:
                    row["metrics"][name] = chosen.choice([0.0, 1.0, -2.5, math.inf, math.nan])
                    made.log(run, (name, row["metrics"][name]))
            self.runs[run] = row
        made.submit("elsewhere", tags={"k": "x"})
        made.view.db.execute("UPDATE runs SET workspace='other' WHERE id='elsewhere'")
        made.view.db.execute("UPDATE labels SET workspace='other' WHERE run='elsewhere'")

    def list(self, conditions: list[Any], metric: str, direction: str, archived: bool) -> list[str]:
        found = [r for r in self.runs.values() if (archived or not r["archived"]) and all(self.holds(r, x) for x in conditions)]
        if metric:
            found = [r for r in found if metric in r["metrics"]]
        sign = 1 if direction == "ASC" else -1
        value = lambda r: r["metrics"][metric] if metric else r["at"]  # noqa: E731
        numbers = sorted((r for r in found if not math.isnan(value(r))), key=lambda r: (value(r), r["id"]), reverse=sign < 0)
        nans = sorted((r for r in found if math.isnan(value(r))), key=lambda r: r["id"], reverse=sign < 0)
        return [r["id"] for r in numbers + nans]

    @staticmethod
    def holds(row: dict[str, Any], x: Any) -> bool:
        compare = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[
            x.operator
        ]
        if x.kind == "metrics":
            if x.name not in row["metrics"]:
                return False
            value = row["metrics"][x.name]
            if math.isnan(x.value):
                return bool(math.isnan(value) == (x.operator == "="))
            return bool(compare(value, x.value))
        if x.kind:
            there = row[x.kind].get(x.name) if x.kind == "tags" else None
            return there != x.value if x.operator == "!=" else there is not None and bool(compare(there, x.value))
        value = STATES[row["state"]] if x.name == "state" else row["at"] if x.name == "submitted_at" else row[x.name]
        return bool(compare(value, x.value))


@pytest.mark.parametrize("few", [1, 5, 10_000])
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_way_to_a_page_gives_the_same_runs(tmp_path: Path, few: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters and orders at random, against a model in plain Python. `few` makes the query take each of its plans."""
    monkeypatch.setattr(listing, "_FEW", few)
    auth.caller.set(auth.Principal("me", "w", "writer"))
    made = Filled(tmp_path / "runs.sqlite")
    model, chosen = Model(made, seed), random.Random(seed)
    some = sorted(model.runs)[7]
    texts = [
        "state = Completed", "state != Failed", 'tags."a b" = x', "tags.k = y", "tags.k != x", 'tags.k >= ""', "parent = p", "target = t",
        "target != t", "name = n", f"id = {some}", f"id > {some}", "metrics.loss < 0.5", "metrics.loss = nan", "metrics.loss != 1",
        'metrics."train/loss" >= 0', r'metrics."a \"b\"" > -3', "metrics.loss <= inf", 'submitted_at > "2001-09-09T01:47:30Z"', "tags.none = x",
    ]  # fmt: skip
    for _ in range(80):
        text = " AND ".join(chosen.sample(texts, chosen.choice([0, 1, 1, 2, 3])))
        metric, direction = chosen.choice(["", "loss", "train/loss"]), chosen.choice(["ASC", "DESC"])
        order_by = (f'metrics."{metric}"' if metric else "submitted_at") + f" {direction}"
        archived = chosen.random() < 0.3
        found = await made.list(text, order_by, size=chosen.choice([1, 3, 100]), include_archived=archived)
        assert found == model.list(query.conditions(text), metric, direction, archived), (text, order_by, archived)


async def test_experiments_are_counted_as_runs_come(filled: Filled) -> None:
    filled.submit("more")
    filled.apply("more", ev.RunTagged(set={"a": "b"}))
    filled.apply("x", ev.RunSubmitted(spec=c.RunSpec(experiment="other")))
    reply = await ExperimentService(filled.view).ListExperiments(pb.ListExperimentsRequest(), None)
    assert [(e.name, e.run_count) for e in reply.experiments] == [("e", 7), ("other", 1)]
    assert await filled.view.next_number("w", "e") == 8 and await filled.view.next_number("w", "none") == 1


def life(exit_code: int = 0) -> list[Any]:
    end = ev.RunCompleted if not exit_code else ev.RunFailed
    return [
        ev.RunSubmitted(spec=c.RunSpec(experiment="e", tags={"a": "1"}, display_name="n"), number=3, submitted_by="me", idempotency_key="key"),
        ev.RunPrepared(image_digest="d"), ev.RunQueued(reason="waits"), ev.RunStarting(attempt=1, nodes=["n1"]), ev.RunStarted(attempt=1),
        ev.RunTagged(set={"b": "2"}, properties={"p": "q"}), ev.RunCancelRequested(requested_by="me"), ev.RunFinalizing(attempt=1),
        end(attempt=1, exit=c.ExitStatus(exit_code=exit_code, reason=c.EXIT_REASON_EXITED), manifest_digest="m"), ev.RunTagged(removed=["a"]),
    ]  # fmt: skip


@pytest.mark.parametrize("step", range(len(life()) + 1))
async def test_a_view_that_is_opened_again_half_way_goes_on_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    auth.caller.set(auth.Principal("me", "w", "writer"))
    first, second, whole_time = Filled(tmp_path / "a"), None, Filled(tmp_path / "b")
    first.apply("r", *life()[:step])
    first.view.close()
    second = Filled(tmp_path / "a")
    second.sequence = step
    second.apply("r", *life()[step:])
    whole_time.apply("r", *life())
    (one,), (other,) = await second.view.rows("SELECT * FROM runs"), await whole_time.view.rows("SELECT * FROM runs")
    assert tuple(one) == tuple(other)
    assert not await second.view.rows("SELECT * FROM run_events"), "events of a final run are kept"
    assert [tuple(r) for r in await second.view.rows("SELECT kind, key, value FROM labels")] == [
        ("properties", "p", "q"),
        ("tags", "b", "2"),
    ]


def test_a_final_run_says_in_one_event_what_its_events_said(tmp_path: Path) -> None:
    for code in (0, 1):
        made = Filled(tmp_path / f"{code}")
        made.apply("r", *life(code))
        row = made.view.db.execute("SELECT * FROM runs").fetchone()
        event = whole(pb.Run.FromString(row["proto"]), row["idempotency"], bool(row["canceled"]))
        run = domain.Run()
        for message in life(code):
            run = domain.evolve(run, message)
        times = {name: getattr(event, name) for name in ("submitted_at", "started_at", "ended_at")}
        assert [event] == domain.compact(run, life(code)[0], times)
        assert times["ended_at"].seconds == 10**9 + 9
        known = {"submitted", "state", "reason", "attempt", "nodes", "cancel_requested", "exit", "manifest_digest", "tags", "properties",
                 "display_name", "description", "archived", "submitted_at", "started_at", "ended_at"}  # fmt: skip
        assert set(ev.RunCompacted.DESCRIPTOR.fields_by_name) == known, "a field that `whole` does not fill"
        # The same row comes of it where the events before it are gone.
        fresh = Filled(tmp_path / f"{code}-fresh")
        fresh.apply("r", event)
        again = fresh.view.db.execute("SELECT * FROM runs").fetchone()
        kept = ("experiment", "state", "submitted_at", "ended_at", "name", "archived", "image", "idempotency", "canceled")
        assert [again[k] for k in kept] == [row[k] for k in kept]


def test_events_of_a_run_that_is_not_known_make_no_run(filled: Filled) -> None:
    filled.apply("ghost", ev.RunTagged(set={"a": "b"}), ev.RunQueued(reason="r"))
    assert filled.view.db.execute("SELECT count(*) FROM runs WHERE id='ghost'").fetchone()[0] == 0
    filled.apply("ghost", ev.RunSubmitted(spec=c.RunSpec(experiment="e")))
    assert filled.view.db.execute("SELECT state FROM runs WHERE id='ghost'").fetchone()[0] == c.RUN_STATE_NOT_STARTED


async def test_a_deleted_run_is_nowhere_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    filled = Filled(tmp_path / "view.sqlite")
    stamp = ev.RunDeleted().submitted_at
    stamp.FromSeconds(5)
    tombstone = ev.RunDeleted(deleted_by="me", state=c.RUN_STATE_COMPLETED, attempt=1, experiment="e", submitted_at=stamp)
    filled.submit("a", tags={"k": "v"})
    filled.apply("a", ev.RunCompleted(attempt=1))
    filled.submit("b")
    filled.log("a", ("loss", 1.0))
    filled.apply("a", tombstone)
    await filled.metrics.erase("a")
    # What a rebuilt view finds of one that was deleted long ago.
    filled.apply("c", tombstone)
    for table in ("runs", "labels", "run_events"):
        column = "id" if table == "runs" else "run"
        assert [r[0] for r in await filled.view.rows(f"SELECT DISTINCT {column} FROM {table}")] in (["b"], [])
    for table in ("series", "newest", "totals", "chunks"):
        assert (await filled.metrics.rows(f"SELECT count(*) FROM {table}"))[0][0] == 0
    assert await filled.view.next_number("w", "e") == 4
    filled.log("b", ("loss", 2.0))
    assert (await filled.metrics.rows("SELECT run FROM newest"))[0][0] == "b"
