"""alveary run compare."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from alveary.cli.columns import Cell, number, short_ids, took
from alveary.cli.common import json_option, open_workspace
from alveary.cli.run_show import environment_of, program_of, resources_of
from alveary.cli.table import show

if TYPE_CHECKING:
    from alveary_contracts.runs.v1 import runs_pb2 as pb


@click.command()
@click.argument("run_ids", nargs=-1, required=True, metavar="RUN_ID RUN_ID...")
@click.option("--metric", "chosen", multiple=True, help="Of the metrics only this one; repeatable.")
@click.option("--all", "every", is_flag=True, help="Also what is the same.")
@click.option("--wide", "-w", is_flag=True, help="Nothing cut, whole ids.")
@json_option
def compare(run_ids: tuple[str, ...], chosen: tuple[str, ...], every: bool, wide: bool, as_json: bool) -> None:
    """Where runs differ: a line each for what was asked for and what came of it, a column a run."""
    if len(run_ids) < 2:
        raise click.UsageError("runs to compare: two at least")
    workspace = open_workspace()
    runs = [workspace._call(workspace._client.runs.get(run_id, chosen)) for run_id in run_ids]
    aspects = [_aspects(run, chosen) for run in runs]
    names = list(dict.fromkeys(name for one in aspects for name in one))
    ids = short_ids([run.id for run in runs])
    columns = [run.id if wide else ids[run.id] for run in runs]
    rows: list[dict[str, Any]] = []
    for name in names:
        values = [one.get(name, Cell("", None)) for one in aspects]
        if every or len({v.piped for v in values}) > 1:
            rows.append({"": name, **dict(zip(columns, values, strict=True))})
    raw = [
        {"name": name, "values": {run.id: one[name].piped if name in one else None for run, one in zip(runs, aspects, strict=True)}}
        for name in names
    ]
    show(rows, ["", *columns], as_json, raw, elastic=(*reversed(columns), ""), wide=wide)


def _aspects(run: pb.Run, chosen: tuple[str, ...]) -> dict[str, Cell]:
    from alveary.client.states import state_name

    spec = run.spec
    found: dict[str, str] = {
        "name": run.display_name,
        "experiment": spec.experiment,
        "state": state_name(run.state),
        "target": spec.compute_target,
        "source": spec.snapshot[:12],
        "program": program_of(run),
        "environment": environment_of(run),
        "resources": resources_of(run),
        "inputs": ", ".join(f"{i.dataset}:{i.version}" for i in spec.inputs),
    }
    cells = {name: Cell(value, value) for name, value in found.items() if value}
    cells |= {f"argument {name}": Cell(value, value) for name, value in arguments_of(list(spec.arguments)).items()}
    cells |= {f"variable {name}": Cell(value, value) for name, value in sorted(spec.environment.environment_variables.items())}
    cells |= {f"tag {name}": Cell(value, value) for name, value in sorted(run.tags.items())}
    cells["took"] = took(run)
    cells |= {name: number(value) for name, value in sorted(run.metrics.items()) if not chosen or name in chosen}
    return cells


def arguments_of(words: list[str]) -> dict[str, str]:
    """Arguments by option: `--lr 0.1`, `--lr=0.1`, `--flag`; what belongs to none, under its place."""
    found: dict[str, str] = {}
    place = 0
    while words:
        word, words = words[0], words[1:]
        if not word.startswith("-") or _is_number(word):
            place += 1
            found[str(place)] = word
            continue
        option, sign, value = word.partition("=")
        taken = [] if sign else _values(words)
        words = words[len(taken) :]
        found[option] = value if sign else shlex.join(taken) or "given"
    return found


def _values(words: list[str]) -> list[str]:
    count = 0
    while count < len(words) and (not words[count].startswith("-") or _is_number(words[count])):
        count += 1
    return words[:count]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
