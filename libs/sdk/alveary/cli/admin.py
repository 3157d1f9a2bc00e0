"""alveary admin: the second copy of the event log; dead letters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from alveary.cli.common import state_dir_option, state_folder
from alveary.cli.dead_letters import dead_letters
from alveary.errors import AlvearyError


@click.group(no_args_is_help=True)
def admin() -> None:
    """Verify and restore the event log; see to events that could not be handled."""


admin.add_command(dead_letters)


def _run(what: str, environment: dict[str, str]) -> None:
    """The archiver's own program: this command needs nothing of it but its settings."""
    code = subprocess.run([sys.executable, "-m", "alveary_archiver", what], env=os.environ | environment).returncode
    if code:
        raise click.exceptions.Exit(code)


def _there(folder: Path) -> None:
    if not (folder / "stack.json").exists():
        raise AlvearyError(f"there is no stack in {folder}: --state-dir or ALVEARY_HOME says where it is", "NOT_FOUND")


@admin.command()
@state_dir_option
def verify(state_dir: Path | None) -> None:
    """Compare the event log and the metrics with their second copy. The platform may be running.

    Without --state-dir, and with ALVEARY_NATS_URL set, that platform; else the embedded stack.
    """
    if state_dir is None and "ALVEARY_NATS_URL" in os.environ:
        _run("verify", {})
        return
    from alveary.local.layout import Layout
    from alveary.local.stack import servers, status

    folder = state_folder(state_dir)
    _there(folder)
    layout = Layout.open(folder, None)
    if status(folder) is not None:
        _run("verify", layout.environment("archiver"))
        return
    with servers(layout):
        _run("verify", layout.environment("archiver"))


@admin.command()
@state_dir_option
def restore(state_dir: Path | None) -> None:
    """Rebuild the event log and the metrics from their second copy, on a server that has lost them. Nothing else may run."""
    if state_dir is None and "ALVEARY_NATS_URL" in os.environ:
        _run("restore", {})
        return
    from alveary.local.layout import Layout
    from alveary.local.stack import servers, status

    folder = state_folder(state_dir)
    if status(folder) is not None:
        raise AlvearyError("the stack is running: stop it with `alveary down` first", "FAILED_PRECONDITION")
    layout = Layout.open(folder, None)
    with servers(layout):
        _run("restore", layout.environment("restore"))
