"""What the commands share: output, options, small parsers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from alveary.config import default_state_dir
from alveary.text import printable

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from alveary.session import Session
    from alveary.transfer import Listing
    from alveary.workspace import Workspace

FAILED, CANCELED, NO_PLATFORM, INTERRUPTED = 3, 4, 5, 130
F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path)


def json_option(command: F) -> F:
    """--json, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def state_dir_option(command: F) -> F:
    """--state-dir, as `state_dir`: a Path or None."""
    return click.option("--state-dir", type=FOLDER, help="Directory of the stack; default $ALVEARY_HOME or ~/.alveary.")(command)


def say(text: str, red: bool = False) -> None:
    """A line to people, on standard error. What terminals would act on is shown as its escape."""
    click.secho(printable(text, keep="\n\t"), err=True, fg="red" if red else None)


def state_folder(given: Path | None) -> Path:
    """The stack's directory."""
    return (given or default_state_dir()).resolve()


def open_workspace() -> Workspace:
    """The workspace of the config that applies here (see `alveary.config.find`)."""
    from alveary.workspace import Workspace

    return Workspace.from_config()


def plain(message: Message) -> dict[str, Any]:
    """A message as `--json` shows it."""
    from google.protobuf.json_format import MessageToDict

    return dict(MessageToDict(message, preserving_proto_field_name=True))


def print_json(value: Any) -> None:
    """As JSON; what is not JSON's (times, paths) as text."""
    click.echo(json.dumps(value, indent=1, default=str))


def pairs(values: Iterable[str] | None, what: str) -> dict[str, str]:
    """A dict of "KEY=VALUE" texts.

    Raises:
        click.BadParameter: one is none; `what` names the option.
    """
    found = {}
    for value in values or ():
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{what} {value!r}: use KEY=VALUE")
        found[key] = text
    return found


def overwrite_option(command: F) -> F:
    """--overwrite, as `overwrite`."""
    return click.option("--overwrite", is_flag=True, help="Replace files of the same names.")(command)


def download(workspace: Session, listing: Listing, to: Path, overwrite: bool) -> None:
    """Store files here, with a bar, and say how many they are."""
    from alveary import progress

    progress.download(workspace, listing, to, overwrite=overwrite)
    click.echo(f"{len(listing.files)} files, {sum(f.size for f in listing.files) / 1e6:.1f} MB in {to}")


def split(reference: str) -> tuple[str, int | None]:
    """Name and version of NAME or NAME:VERSION.

    Raises:
        click.BadParameter: it is neither.
    """
    name, _, version = reference.partition(":")
    if version and not version.isdecimal():
        raise click.BadParameter(f"{reference!r}: use NAME or NAME:VERSION")
    return name, int(version) if version else None


def enum_word(message: Any, field: str) -> str:
    """An enum field as users write it: "ready" where it is NODE_STATE_READY; empty where it is unspecified or unknown."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    number = getattr(message, field)
    if not number or number not in kind.values_by_number:
        return ""
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(kind.values_by_number[number].name.removeprefix(prefix).lower())


def target_row(t: Any) -> dict[str, Any]:
    """A compute target as a row of a table."""
    return {
        "name": t.name,
        "kind": enum_word(t.spec, "kind"),
        "vm_size": t.spec.vm_size,
        "state": t.state,
        "nodes": f"{t.current_nodes}/{t.spec.max_nodes}",
        "cpus": t.spec.node_resources.cpus,
        "gpus": t.spec.node_resources.gpus,
        "running": t.running,
        "waiting": t.waiting,
    }
