"""alveary events."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from alveary.cli.common import open_workspace

events_app = typer.Typer(no_args_is_help=True, help="Events.")


@events_app.command("tail")
def events_tail(
    pattern: Annotated[str, typer.Argument(help="Like run.completed, model.*")] = "*.*",
    durable: Annotated[str, typer.Option(help="Remember the position under this name.")] = "",
    from_sequence: Annotated[int | None, typer.Option(help="Begin here; 1: with the first.")] = None,
    from_time: Annotated[datetime | None, typer.Option(help="Begin at this time (UTC).")] = None,
    timeout: Annotated[float | None, typer.Option(help="End after this many seconds without an event.")] = None,
) -> None:  # fmt: skip
    """Events as they happen, one JSON object a line."""
    workspace = open_workspace()
    for event in workspace.events.subscribe(pattern, durable=durable, from_sequence=from_sequence, from_time=from_time, timeout=timeout):
        plain = {"sequence": event.sequence, "time": event.time.isoformat(), "type": event.type, "subject": event.subject, "id": event.id}
        print(json.dumps(plain | {"data": event.data}), flush=True)
