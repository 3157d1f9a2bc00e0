"""alveary run files, download."""

from __future__ import annotations

from pathlib import Path

import click

from alveary.cli.columns import size
from alveary.cli.common import FOLDER, json_option, open_workspace, overwrite_option
from alveary.cli.common import download as download_files
from alveary.cli.table import show
from alveary.errors import AlvearyError


@click.command()
@click.argument("run_id")
@json_option
def files(run_id: str, as_json: bool) -> None:
    """Files that it stored."""
    workspace = open_workspace()
    client = workspace._client
    found = workspace._call(client.runs.files(workspace._call(client.runs.full_id(run_id)))).files
    rows = [{"path": f.path, "size": size(f.size), "sha256": f.sha256} for f in found]
    raw = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in found]
    show(rows, ("path", "size", "sha256"), as_json, raw, elastic=("sha256", "path"))


@click.command()
@click.argument("run_id")
@click.argument("prefix", default="")
@click.option("--to", type=FOLDER, default=".", show_default=True, help="Folder that they are stored in.")
@overwrite_option
def download(run_id: str, prefix: str, to: Path, overwrite: bool) -> None:
    """Store its files here: all, or those whose paths begin with PREFIX; all of these, or none."""
    workspace = open_workspace()
    client = workspace._client
    listing = workspace._call(client.runs.files(workspace._call(client.runs.full_id(run_id)), prefix))
    if not listing.files:
        raise AlvearyError(f"run {run_id} stored nothing under {prefix!r}", "NOT_FOUND")
    download_files(workspace, listing, to, overwrite)
