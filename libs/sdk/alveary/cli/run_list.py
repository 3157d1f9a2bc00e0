"""alveary run list, metrics, compare."""

from __future__ import annotations

import math
import sys

import click

from alveary.cli.columns import Cell, moment, number, short_ids, took
from alveary.cli.common import json_option, open_workspace, pairs, say
from alveary.cli.table import show
from alveary.errors import AlvearyError
from alveary.text import quoted

# Points of a metric that its line in a table is made of; at least four.
_THINNED = 16


@click.command("list")
@click.option("--experiment", "-e", default="", help="Only runs of this experiment.")
@click.option("--state", default="", help="Only runs in this state, like Running or Failed.")
@click.option("--tag", multiple=True, help="KEY=VALUE: only runs with this tag; repeatable.")
@click.option("--filter", "filter_text", default="", help="Like: state = Failed AND metrics.loss < 0.5")
@click.option("--metric", "metrics", multiple=True, help="A column with this metric's newest value; repeatable.")
@click.option("--order-by", default="", help='submitted_at or metrics.NAME; "metrics.NAME desc": largest first.')
@click.option("--limit", default=50, show_default=True, help="Runs at most; 0: all.")
@click.option("--wide", "-w", is_flag=True, help="All columns, nothing cut, whole ids.")
@json_option
def list_runs(
    experiment: str,
    state: str,
    tag: tuple[str, ...],
    filter_text: str,
    metrics: tuple[str, ...],
    order_by: str,
    limit: int,
    wide: bool,
    as_json: bool,
) -> None:
    """Runs, newest first; ids are short here, and every command takes them so."""
    from alveary.client.states import run_details, state_name

    conditions = [f"state = {quoted(state)}"] if state else []
    conditions += [f"experiment = {quoted(experiment)}"] if experiment else []
    conditions += [f"tags.{quoted(key)} = {quoted(value)}" for key, value in pairs(tag, "--tag").items()]
    conditions += [filter_text] if filter_text.strip() else []
    workspace = open_workspace()
    asked = limit + 1 if limit else 0  # one more says whether there are more
    runs = workspace._call(workspace._client.runs.list(" AND ".join(conditions), order_by, asked, metrics))
    more = bool(limit) and len(runs) > limit
    runs = runs[:limit] if limit else runs
    ids = {} if wide else short_ids([r.id for r in runs])
    rows = [
        {
            "id": Cell(ids.get(r.id, r.id), r.id),
            "experiment": r.spec.experiment,
            "name": r.display_name,
            "state": state_name(r.state),
            "target": r.spec.compute_target,
            "submitted": moment(r.submitted_at),
            "took": took(r),
            "reason": r.reason.splitlines()[0] if r.reason else "",
            **{m: number(dict(r.metrics).get(m)) for m in metrics},
        }
        for r in runs
    ]
    whole = wide or not sys.stdout.isatty()
    columns = ["id", "experiment", "name", "state", *(["target"] if whole else []), "submitted", "took", *metrics, "reason"]
    if not whole and not any(r.reason for r in runs):
        columns.remove("reason")
    details = [run_details(r) for r in runs] if as_json else None
    elastic, spare = ("reason", "name", "experiment"), ("reason", "experiment", "submitted")
    show(rows, columns, as_json, details, elastic=elastic, spare=spare, wide=wide)
    if not as_json and sys.stdout.isatty():
        if more:
            say(f"and more: these are the first {limit}; --limit 0 shows all")
        if not runs:
            say("no runs" + (" that fit" if conditions else ": submit one with `alveary run submit train.py`"))


@click.command()
@click.argument("run_id")
@click.argument("name", default="")
@json_option
def metrics(run_id: str, name: str, as_json: bool) -> None:
    """What a run logged: a line a metric, or with NAME a line a point."""
    workspace = open_workspace()
    client = workspace._client
    # Thinned, a metric keeps its extremes and its ends: what a line of the table shows.
    series = workspace._call(client.metrics.series(workspace._call(client.runs.full_id(run_id)), name, max_points=0 if name else _THINNED))
    if name and not series:
        raise AlvearyError(f"run {run_id} logged no {name!r}: `alveary run metrics {run_id}` shows what it logged", "NOT_FOUND")
    if name:
        points = [p for one in series for p in one.points]
        show(
            [{"step": p.step if p.HasField("step") else "", "time": moment(p.time), "value": value_of(p)} for p in points],
            ("step", "time", "value"),
            as_json,
            elastic=("value",),
        )
        return
    rows = []
    for one in series:
        scalars = [p.scalar for p in one.points if p.WhichOneof("value") == "scalar" and not math.isnan(p.scalar)]
        last = one.points[-1]
        figures = (min(scalars), max(scalars)) if scalars else (None, None)
        rows.append(
            {
                "metric": one.name,
                "points": one.point_count or len(one.points),
                "step": last.step if last.HasField("step") else "",
                "last": value_of(last),
                "min": number(figures[0]),
                "max": number(figures[1]),
            }
        )
    show(rows, ("metric", "points", "step", "last", "min", "max"), as_json, elastic=("last", "metric"))


def value_of(point: object) -> Cell:
    """A point's value: a number, or what was logged as text, list, row, table or picture."""
    kind = point.WhichOneof("value")  # type: ignore[attr-defined]
    if kind == "scalar":
        return number(point.scalar)  # type: ignore[attr-defined]
    text = ", ".join(f"{v:g}" for v in point.list.values) if kind == "list" else str(getattr(point, kind or "", ""))  # type: ignore[attr-defined]
    return Cell(text, text)
