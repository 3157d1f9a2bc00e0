"""alveary model, alveary dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alveary.cli.columns import Cell, moment, plural, short_ids, size, when
from alveary.cli.common import FOLDER, F, download, json_option, open_workspace, overwrite_option, pairs, plain, print_json, split
from alveary.cli.table import sheet, show

if TYPE_CHECKING:
    from alveary.model import Model


def _upload_options(command: F) -> F:
    """--verify and --follow-links."""
    verify = click.option("--verify", is_flag=True, help="Read what the platform has of it, and replace what is damaged.")
    follow = click.option("--follow-links", is_flag=True, help="Also links to folders outside of PATH.")
    return verify(follow(command))


@click.group(no_args_is_help=True)
def model() -> None:
    """Models."""


def _find(reference: str) -> Model:
    from alveary.model import Model

    name, version = split(reference)
    return Model(open_workspace(), name, version=version)


@model.command("list")
@click.argument("name", default="")
@json_option
def list_models(name: str, as_json: bool) -> None:
    """Model versions: of all models, or of the one that is named."""
    from alveary.model import Model

    models = Model.list(open_workspace(), name or None)
    ids = short_ids([m.run_id for m in models])
    rows = [
        {
            "model": m.id,
            "run": Cell(ids[m.run_id], m.run_id),
            "aliases": ",".join(m.aliases),
            "onnx": m.onnx["opset"] if m.onnx else "",
            "registered": moment(m._found.registered_at),
            "tags": ",".join(f"{k}={v}" for k, v in m.tags.items()),
        }
        for m in models
    ]
    columns = ("model", "run", "aliases", "onnx", "registered", "tags")
    show(rows, columns, as_json, [plain(m._found) for m in models] if as_json else None, elastic=("tags", "aliases", "model"))


@model.command("show")
@click.argument("reference", metavar="NAME[:VERSION]")
@json_option
def show_model(reference: str, as_json: bool) -> None:
    """One version: what it is, where it comes from, what it holds."""
    model = _find(reference)
    found = model._found
    if as_json:
        print_json(plain(found))
        return
    line, files, done = found.lineage, found.manifest.files, found.export
    sheet(
        {
            "model": model.id + (" (archived)" if found.archived else ""),
            "description": found.description,
            "registered": f"{when(found.registered_at)} by {found.registered_by}",
            "framework": f"{found.framework} {found.framework_version}".strip(),
            "run": f"{line.run_id} (experiment {line.experiment})" + (f", which had {model.lineage['run_state']}" if line.run_state else "")
            if line.run_id
            else "none: it was uploaded",
            "datasets": list(line.datasets),
            "parent": line.parent,
            "source": line.snapshot[:12],
            "image": line.image_digest[:12],
            "aliases": ", ".join(found.aliases),
            "tags": [f"{k}={v}" for k, v in sorted(found.tags.items())],
            "properties": [f"{k}={v}" for k, v in sorted(found.properties.items())],
            "files": [
                f"{plural(found.file_count, 'file')}, {size(found.total_size)}",
                *(f"{f.path} ({size(f.size)})" for f in files[:10]),
                *([f"and {found.file_count - 10} more"] if len(files) > 10 else []),
            ],
            "onnx": [
                f"{size(done.file.size)}, opset {done.opset}, by {done.exporter}",
                f"differs from PyTorch by {done.max_abs_diff:.3g}, on batches of {', '.join(map(str, done.checked_batch_sizes))}",
            ]
            if found.HasField("export")
            else [],
            "export": f"under way: {found.export_pending}"
            if found.export_pending
            else f"failed: {found.export_error}"
            if found.export_error
            else "",
            "download": f"alveary model download {model.id}",
        }
    )


@model.command()
@click.argument("name")
@click.argument("path", default="outputs")
@click.option("--run", default="", help="Take it from this run.")
@click.option("--tag", multiple=True, help="KEY=VALUE; repeatable.")
@click.option("--description", default="")
@_upload_options
def register(name: str, path: str, run: str, tag: tuple[str, ...], description: str, verify: bool, follow_links: bool) -> None:
    """Register the next version of a model: with --run from PATH among its files, else from PATH here."""
    from alveary.model import Model

    workspace, tags = open_workspace(), pairs(tag, "--tag")
    if run:
        made = workspace.get_run(run).register_model(name, path, tags=tags, description=description)
    else:
        made = Model.register(workspace, path, name, tags=tags, description=description, verify=verify, follow_links=follow_links)
    click.echo(made.id)


@model.command()
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--shape", default="", help="Of one input, a batch of one, like 1,3,224,224.")
@click.option(
    "--input", "inputs", multiple=True, help="NAME=SHAPE[:DTYPE], like ids=1,128:int64, where there are several or of integers; repeatable."
)
@click.option("--file", default="", help="Which of the model's files, if there are several.")
@click.option("--opset", default=0, help="ONNX opset; 0: the exporter's.")
@click.option("--factory", default="", help="module:callable of the run's source that builds the model of a state_dict.")
@click.option("--target", default="", help="Compute target; default: the run's.")
def export(reference: str, shape: str, inputs: tuple[str, ...], file: str, opset: int, factory: str, target: str) -> None:
    """Export a version to ONNX, and wait for it."""
    if bool(shape) == bool(inputs):
        raise click.UsageError("--shape of the only input, or --input for each")
    tensors = []
    for name, text in pairs(inputs, "--input").items():
        sizes, _, dtype = text.partition(":")
        tensors.append({"name": name, "shape": _sizes(sizes, "--input"), "dtype": dtype})
    work = _find(reference).export_onnx(
        _sizes(shape, "--shape"), inputs=tensors, file=file, opset=opset, factory=factory, compute_target=target
    )
    print_json(work.onnx)


def _sizes(text: str, option: str) -> list[int]:
    try:
        return [int(s) for s in text.split(",") if s.strip()]
    except ValueError as error:
        raise click.BadParameter(f"{option} {text}: numbers with commas between them, like 1,3,224,224") from error


@model.command("download")
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--to", type=FOLDER, default=".", show_default=True, help="Folder that they are stored in.")
@overwrite_option
def download_model(reference: str, to: Path, overwrite: bool) -> None:
    """Store a version's files here, its ONNX export among them: all of them, or none."""
    found = _find(reference)
    download(found.workspace, found._files(), to, overwrite)


@click.group(no_args_is_help=True)
def dataset() -> None:
    """Datasets."""


@dataset.command("list")
@json_option
def list_datasets(as_json: bool) -> None:
    """Dataset versions."""
    from alveary.dataset import Dataset

    rows = [
        {"dataset": f"{d.name}:{d.version}", "files": d.file_count, "size": size(d.total_size), "digest": d.id[:12]}
        for d in Dataset.list(open_workspace())
    ]
    show(rows, ("dataset", "files", "size", "digest"), as_json, elastic=("dataset",))


@dataset.command()
@click.argument("name")
@click.argument("path", type=FOLDER)
@_upload_options
def upload(name: str, path: Path, verify: bool, follow_links: bool) -> None:
    """Register a folder as the next version of a dataset."""
    from alveary.dataset import Dataset

    click.echo(Dataset.upload(open_workspace(), str(path), name, verify=verify, follow_links=follow_links))


@dataset.command("download")
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--to", type=FOLDER, default=".", show_default=True, help="Folder that they are stored in.")
@overwrite_option
def download_dataset(reference: str, to: Path, overwrite: bool) -> None:
    """Store a version's files here: all of them, or none."""
    from alveary.dataset import Dataset

    name, version = split(reference)
    click.echo(Dataset.get_by_name(open_workspace(), name, version or "latest").download(str(to), overwrite))
