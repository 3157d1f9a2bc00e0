"""alveary experiment."""

from __future__ import annotations

import click

from alveary.cli.columns import moment
from alveary.cli.common import json_option, open_workspace, plain
from alveary.cli.table import show


@click.group(no_args_is_help=True)
def experiment() -> None:
    """Experiments: runs under one name."""


@experiment.command("list")
@json_option
def list_experiments(as_json: bool) -> None:
    """All experiments, and how many runs each has."""
    from alveary_contracts.runs.v1 import runs_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    found = workspace._call(client.call(client.stubs.experiments.ListExperiments, pb.ListExperimentsRequest())).experiments
    rows = [{"experiment": e.name, "runs": e.run_count, "last run": moment(e.last_submitted_at)} for e in found]
    show(rows, ("experiment", "runs", "last run"), as_json, [plain(e) for e in found] if as_json else None, elastic=("experiment",))
