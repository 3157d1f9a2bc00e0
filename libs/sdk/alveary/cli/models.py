"""alveary model, alveary dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from alveary.cli.common import AsJson, ago, download, open_workspace, pairs, plain, show, split

model_app = typer.Typer(no_args_is_help=True, help="Models.")
dataset_app = typer.Typer(no_args_is_help=True, help="Datasets.")


def _model(reference: str) -> Any:
    from alveary.model import Model

    name, version = split(reference)
    return Model(open_workspace(), name, version=version)


@model_app.command("list")
def model_list(name: Annotated[str, typer.Argument()] = "", as_json: AsJson = False) -> None:
    """Model versions."""
    from alveary.model import Model

    models = Model.list(open_workspace(), name or None)
    rows = [
        {
            "model": m.id, "run": m.run_id, "aliases": ",".join(m.aliases), "onnx": m.onnx["opset"] if m.onnx else "",
            "registered": ago(m._found.registered_at), "tags": ",".join(f"{k}={v}" for k, v in m.tags.items()),
        }
        for m in models
    ]  # fmt: skip
    show(rows, ("model", "run", "aliases", "onnx", "registered", "tags"), as_json, [plain(m._found) for m in models])


@model_app.command("show")
def model_show(reference: Annotated[str, typer.Argument(help="NAME or NAME:VERSION")]) -> None:
    """One version, as JSON."""
    print(json.dumps(plain(_model(reference)._found), indent=1))


@model_app.command("register")
def model_register(
    name: str, path: Annotated[str, typer.Argument(help="With --run a path among its files, else a path here.")] = "outputs",
    run: Annotated[str, typer.Option(help="Take it from this run.")] = "", tag: Annotated[list[str] | None, typer.Option("--tag")] = None,
    description: str = "",
) -> None:  # fmt: skip
    """Register the next version of a model."""
    from alveary.model import Model

    workspace, tags = open_workspace(), pairs(tag, "--tag")
    if run:
        print(workspace.get_run(run).register_model(name, path, tags=tags, description=description).id)
    else:
        print(Model.register(workspace, path, name, tags=tags, description=description).id)


@model_app.command("export")
def model_export(
    reference: str, shape: Annotated[str, typer.Option(help="Of one input, a batch of one, like 1,3,224,224.")] = "",
    file: str = "", opset: int = 0, factory: str = "", target: str = "",
) -> None:  # fmt: skip
    """Export a version to ONNX, and wait for it."""
    sizes = [int(s) for s in shape.split(",") if s.strip()]
    model = _model(reference).export_onnx(sizes, file=file, opset=opset, factory=factory, compute_target=target)
    print(json.dumps(model.onnx, indent=1))


@model_app.command("download")
def model_download(reference: str, to: Annotated[Path, typer.Option("--to")] = Path()) -> None:
    """Store a version's files here, its ONNX export among them."""
    model = _model(reference)
    download(model.workspace, model._links(), to)


@dataset_app.command("list")
def dataset_list(as_json: AsJson = False) -> None:
    """Dataset versions."""
    from alveary.dataset import Dataset

    rows = [
        {"dataset": f"{d.name}:{d.version}", "files": d.file_count, "size": d.total_size, "digest": d.id[:12]}
        for d in Dataset.list(open_workspace())
    ]
    show(rows, ("dataset", "files", "size", "digest"), as_json)


@dataset_app.command("upload")
def dataset_upload(name: str, path: Path) -> None:
    """Register a folder."""
    from alveary.dataset import Dataset

    print(Dataset.upload(open_workspace(), str(path), name))


@dataset_app.command("download")
def dataset_download(reference: str, to: Annotated[Path, typer.Option("--to")] = Path()) -> None:
    """Store a version's files here."""
    from alveary.dataset import Dataset

    name, version = split(reference)
    print(Dataset.get_by_name(open_workspace(), name, version or "latest").download(str(to)))
