"""What the commands share: output, errors, small parsers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.message import Message
from rich.console import Console

from alveary.config import default_state_dir

if TYPE_CHECKING:
    from alveary.workspace import Workspace

out = Console()
err = Console(stderr=True)
FAILED, CANCELED, NO_PLATFORM = 3, 4, 5
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Directory of the stack; default $ALVEARY_HOME or ~/.alveary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def state_folder(given: Path | None) -> Path:
    """The stack's directory."""
    return (given or default_state_dir()).resolve()


def open_workspace() -> Workspace:
    from alveary.workspace import Workspace

    return Workspace.from_config()


def plain(message: Message) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return dict(MessageToDict(message, preserving_proto_field_name=True))


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool, raw: Sequence[Any] | None = None) -> None:
    if as_json:
        print(json.dumps(raw if raw is not None else rows, indent=1, default=str))
    elif out.is_terminal:
        from rich.table import Table

        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(str(row.get(c, "")) for c in columns))
        out.print(table)
    else:
        for row in rows:
            print("\t".join(str(row.get(c, "")) for c in columns))


def ago(stamp: Any) -> str:
    if not stamp.seconds:
        return ""
    seconds = int(time.time() - stamp.seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"


def pairs(values: Iterable[str] | None, what: str) -> dict[str, str]:
    found = {}
    for value in values or ():
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"{what} {value!r}: use KEY=VALUE")
        found[key] = text
    return found


def download(workspace: Workspace, links: Sequence[Any], to: Path) -> None:
    from alveary.progress import upload_progress

    total, done = sum(x.file.size for x in links), 0
    with upload_progress(f"{len(links)} files", "downloading") as progress:

        def update(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        workspace._call(workspace._client.download_all(links, to, update))
    print(f"{len(links)} files, {total / 1e6:.1f} MB in {to}")


def split(reference: str) -> tuple[str, int | None]:
    name, _, version = reference.partition(":")
    if version and not version.isdecimal():
        raise typer.BadParameter(f"{reference!r}: use NAME or NAME:VERSION")
    return name, int(version) if version else None


def target_row(t: Any) -> dict[str, Any]:
    return {
        "name": t.name, "kind": t.spec.kind, "vm_size": t.spec.vm_size, "state": t.state, "nodes": f"{t.current_nodes}/{t.spec.max_nodes}",
        "cpus": t.spec.node_resources.cpus, "gpus": t.spec.node_resources.gpus, "running": t.running, "waiting": t.waiting,
    }  # fmt: skip
