"""alveary run list."""

from __future__ import annotations

import click

from alveary.cli.common import ago, json_option, open_workspace
from alveary.cli.table import show


@click.command("list")
@click.option("--filter", "filter_text", default="", help="Like: state = Failed AND metrics.loss < 0.5")
@click.option("--order-by", default="", help="Like: metrics.loss ASC")
@click.option("--limit", default=50, show_default=True, help="Runs at most; 0: all.")
@json_option
def list_runs(filter_text: str, order_by: str, limit: int, as_json: bool) -> None:
    """Runs, newest first."""
    from alveary.aio import run_details, state_name

    workspace = open_workspace()
    runs = workspace._call(workspace._client.list_runs(filter_text, order_by, limit))
    rows = [
        {
            "id": r.id, "experiment": r.spec.experiment, "name": r.display_name, "state": state_name(r.state),
            "target": r.spec.compute_target, "submitted": ago(r.submitted_at), "reason": r.reason.splitlines()[0] if r.reason else "",
        }
        for r in runs
    ]  # fmt: skip
    columns = ("id", "experiment", "name", "state", "target", "submitted", "reason")
    show(rows, columns, as_json, [run_details(r) for r in runs] if as_json else None, elastic=("experiment", "name", "target", "reason"))
