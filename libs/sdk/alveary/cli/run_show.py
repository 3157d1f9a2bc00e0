"""alveary run show, why, cancel."""

from __future__ import annotations

import shlex

import click

from alveary.cli.common import json_option, open_workspace, print_json
from alveary.text import printable


@click.command()
@click.argument("run_id")
@json_option
def why(run_id: str, as_json: bool) -> None:
    """Why a run is queued, and when it is expected to begin: its position, what it waits for, what would help."""
    found = open_workspace().get_run(run_id).why_queued()
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        click.echo(f"{name.replace('_', ' '):<16} {'not foreseeable' if value is None else printable(str(value))}")


@click.command("show")
@click.argument("run_id")
@json_option
def show_run(run_id: str, as_json: bool) -> None:
    """One run: its state and why, its metrics, how it ended."""
    workspace = open_workspace()
    details = workspace.get_run(run_id).get_details()
    if as_json:
        print_json(details)
        return
    spec = details["spec"]
    lines = {
        "id": run_id, "experiment": f"{spec['experiment']} #{details['number']}", "state": details["status"], "reason": details["reason"],
        "target": spec["compute_target"], "attempt": details["attempt"], "nodes": ", ".join(details["nodes"]),
        "program": spec["entry_script"] or shlex.join(spec["command"]) or spec["module"], "arguments": shlex.join(spec["arguments"]),
        "submitted": details.get("submitted_at", ""), "started": details.get("started_at", ""), "ended": details.get("ended_at", ""),
        "tags": ", ".join(f"{k}={v}" for k, v in details["tags"].items()), "metrics": ", ".join(f"{k}={v}" for k, v in details["metrics"].items()),
    }  # fmt: skip
    for name, value in lines.items():
        if value not in ("", 0):
            click.echo(f"{name:<11} {printable(str(value), keep=chr(10))}")
    if details["exit"].get("last_lines") and details["status"] == "Failed":
        click.echo("\n  ".join(["last lines:", *map(printable, details["exit"]["last_lines"])]))


@click.command()
@click.argument("run_id")
def cancel(run_id: str) -> None:
    """Ask for its end."""
    open_workspace().get_run(run_id).cancel()
    click.echo("cancel requested")
