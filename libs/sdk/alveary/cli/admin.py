"""alveary admin: the second copy of the event log; files that nothing refers to; dead letters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from alveary.cli.common import state_dir_option, state_folder
from alveary.cli.dead_letters import dead_letters
from alveary.errors import AlvearyError


@click.group(no_args_is_help=True)
def admin() -> None:
    """Verify and restore the event log; remove unused files; see to unhandled events."""


admin.add_command(dead_letters)


def _run(what: Sequence[str], environment: dict[str, str]) -> None:
    """The archiver's own program: this command needs nothing of it but its settings."""
    code = subprocess.run([sys.executable, "-m", "alveary_archiver", *what], env=os.environ | environment).returncode
    if code:
        raise click.exceptions.Exit(code)


def _there(folder: Path) -> None:
    if not (folder / "stack.json").exists():
        raise AlvearyError(f"there is no stack in {folder}: --state-dir or ALVEARY_HOME says where it is", "NOT_FOUND")


def _reading(what: Sequence[str], state_dir: Path | None) -> None:
    """Run it beside a platform that may be running: the one of ALVEARY_NATS_URL, or the embedded stack."""
    if state_dir is None and "ALVEARY_NATS_URL" in os.environ:
        _run(what, {})
        return
    from alveary.local.layout import Layout
    from alveary.local.stack import servers, status

    folder = state_folder(state_dir)
    _there(folder)
    layout = Layout.open(folder, None)
    if status(folder) is not None:
        _run(what, layout.environment("archiver"))
        return
    with servers(layout):
        _run(what, layout.environment("archiver"))


@admin.command()
@state_dir_option
def verify(state_dir: Path | None) -> None:
    """Compare the event log and the metrics with their second copy. The platform may be running.

    Without --state-dir, and with ALVEARY_NATS_URL set, that platform; else the embedded stack.
    """
    _reading(["verify"], state_dir)


@admin.command()
@state_dir_option
def restore(state_dir: Path | None) -> None:
    """Rebuild the event log and the metrics from their second copy, on a server that has lost them. Nothing else may run."""
    if state_dir is None and "ALVEARY_NATS_URL" in os.environ:
        _run(["restore"], {})
        return
    from alveary.local.layout import Layout
    from alveary.local.stack import servers, status

    folder = state_folder(state_dir)
    if status(folder) is not None:
        raise AlvearyError("the stack is running: stop it with `alveary down` first", "FAILED_PRECONDITION")
    layout = Layout.open(folder, None)
    with servers(layout):
        _run(["restore"], layout.environment("restore"))


@admin.command()
@click.option("--dry-run", is_flag=True, help="Remove nothing: say what would go.")
@click.option(
    "--grace-days", type=click.FloatRange(min=2), default=7.0, show_default=True, help="What changed less long ago than this stays."
)
@state_dir_option
def gc(dry_run: bool, grace_days: float, state_dir: Path | None) -> None:
    """Remove files that nothing refers to. The platform may be running.

    Nothing that a run, model or dataset refers to goes, nor what is being uploaded: files without any reference, uploads that
    were never completed, files of deleted runs, files and checkpoints of attempts that were lost. Prints a line for each bucket
    and kind: objects and bytes.
    """
    _reading(["gc", *(["--dry-run"] if dry_run else []), "--grace-days", str(grace_days)], state_dir)
