"""alveary run files, download."""

from __future__ import annotations

from pathlib import Path

import click

from alveary.cli.columns import size
from alveary.cli.common import FOLDER, json_option, open_workspace
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
    links = workspace._call(client.list_run_files(workspace._call(client.full_id(run_id))))
    rows = [{"path": x.file.path, "size": size(x.file.size), "sha256": x.file.sha256} for x in links]
    raw = [{"path": x.file.path, "size": x.file.size, "sha256": x.file.sha256} for x in links]
    show(rows, ("path", "size", "sha256"), as_json, raw, elastic=("sha256", "path"))


@click.command()
@click.argument("run_id")
@click.argument("prefix", default="")
@click.option("--to", type=FOLDER, default=".", show_default=True, help="Folder that they are stored in.")
def download(run_id: str, prefix: str, to: Path) -> None:
    """Store its files here: all, or those whose paths begin with PREFIX."""
    workspace = open_workspace()
    client = workspace._client
    links = workspace._call(client.list_run_files(workspace._call(client.full_id(run_id)), prefix, with_urls=True))
    if not links:
        raise AlvearyError(f"run {run_id} stored nothing under {prefix!r}", "NOT_FOUND")
    download_files(workspace, links, to)
