"""alveary events."""

from __future__ import annotations

import json
from datetime import datetime

import click

from alveary.cli.common import open_workspace


@click.group(no_args_is_help=True)
def events() -> None:
    """Events."""


@events.command()
@click.argument("pattern", default="*.*")
@click.option("--durable", default="", help="Remember the position under this name.")
@click.option("--from-sequence", type=int, help="Begin here; 1: with the first.")
@click.option("--from-time", type=click.DateTime(), help="Begin at this time (UTC).")
@click.option("--timeout", type=float, help="End after this many seconds without an event.")
def tail(pattern: str, durable: str, from_sequence: int | None, from_time: datetime | None, timeout: float | None) -> None:
    """Events as they happen, one JSON object a line; PATTERN is like run.completed or model.*"""
    workspace = open_workspace()
    for event in workspace.events.subscribe(pattern, durable=durable, from_sequence=from_sequence, from_time=from_time, timeout=timeout):
        plain = {"sequence": event.sequence, "time": event.time.isoformat(), "type": event.type, "subject": event.subject, "id": event.id}
        click.echo(json.dumps(plain | {"data": event.data}))
