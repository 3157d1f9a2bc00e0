"""The command line: every command of the click tree, with its arguments and options."""

from __future__ import annotations

from collections.abc import Iterator

import click

from alveary.cli import app
from reference.markdown import page, plain, table


def commands(group: click.Command = app, path: tuple[str, ...] = ("alveary",)) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """(("alveary", "run", "submit"), command) of every command that is not a group, in the order of the help."""
    context = click.Context(group, info_name=path[-1])
    if not isinstance(group, click.Group):
        yield path, group
        return
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if not command.hidden:
            yield from commands(command, (*path, name))


def _section(path: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=" ".join(path))
    options = [record for p in command.get_params(context) if isinstance(p, click.Option) and (record := p.get_help_record(context))]
    rows = [(f"`{names}`".replace("|", r"\|"), plain(text)) for names, text in options]
    usage = f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"
    paragraphs = [plain(p.replace("\b", "")) for p in (command.help or "").split("\n\n")]
    return "\n\n".join(part for part in (f"## {' '.join(path)}", usage, *paragraphs, table(("Option", "Meaning"), rows)) if part)


def render() -> str:
    """The page."""
    introduction = "Conventions, exit codes and output formats: [The command line](../command-line.md)."
    return page("Command line", introduction, *(_section(path, command) for path, command in commands()))
