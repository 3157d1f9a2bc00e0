"""alveary admin dead-letters: events that a service could not handle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from alveary.cli.common import json_option, open_workspace, plain, print_json, say

if TYPE_CHECKING:
    from alveary.workspace import Workspace
    from alveary_contracts.common.v1 import common_pb2 as c

# As many as the platform takes in one call.
_AT_ONCE = 100


@click.group("dead-letters", no_args_is_help=True)
def dead_letters() -> None:
    """Events that a service could not handle, and set aside so that others are not held up."""


@dead_letters.command("list")
@click.option("--traceback", is_flag=True, help="Also print where each error was raised.")
@json_option
def list_letters(traceback: bool, as_json: bool) -> None:
    """Dead letters of the workspace, oldest first. Needs an owner's token."""
    from alveary.cli.columns import ago
    from alveary.cli.table import show

    workspace = open_workspace()
    letters = _all(workspace)
    if traceback and not as_json:
        for letter in letters:
            click.echo(f"{letter.id}  {letter.type}  {letter.error}")
            click.echo(letter.traceback)
        return
    rows = [{"id": x.id, "type": x.type, "tries": x.tries, "since": ago(x.first_at), "error": x.error.partition("\n")[0]} for x in letters]
    show(rows, ["id", "type", "tries", "since", "error"], as_json, [plain(x) for x in letters], elastic=["error"])


@dead_letters.command()
@click.argument("ids", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All there are.")
@json_option
def retry(ids: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Hand dead letters to the services that set them aside, once more; once its cause is gone."""
    workspace = open_workspace()
    wanted = _wanted(workspace, ids, every)
    outcomes: list[Any] = []
    for begin in range(0, len(wanted), _AT_ONCE):
        outcomes += workspace._call(workspace._client.dead_letters.retry(wanted[begin : begin + _AT_ONCE]))
    if as_json:
        print_json([plain(x) for x in outcomes])
    else:
        for one in outcomes:
            say(f"{one.id}: {one.message}", red=not one.handled)
    if any(not one.handled for one in outcomes):
        raise click.exceptions.Exit(1)


@dead_letters.command()
@click.argument("ids", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All there are.")
def drop(ids: tuple[str, ...], every: bool) -> None:
    """Forget dead letters. Their events stay in the event log, and are never handled."""
    workspace = open_workspace()
    wanted = _wanted(workspace, ids, every)
    for begin in range(0, len(wanted), _AT_ONCE):
        workspace._call(workspace._client.dead_letters.drop(wanted[begin : begin + _AT_ONCE]))
    say(f"{len(wanted)} dropped")


def _all(workspace: Workspace) -> list[c.DeadLetter]:
    return workspace._call(workspace._client.dead_letters.list())


def _wanted(workspace: Workspace, ids: tuple[str, ...], every: bool) -> list[str]:
    if bool(ids) == every:
        raise click.UsageError("name the letters by their ids (`alveary admin dead-letters list` shows them), or use --all")
    return [letter.id for letter in _all(workspace)] if every else list(ids)
