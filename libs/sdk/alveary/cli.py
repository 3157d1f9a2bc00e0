"""The command line: `alveary --help`.

Exit codes: 0 it worked; 1 the platform refused or failed; 2 the command line is wrong; 3 the run Failed; 4 the run
was Canceled; 5 no platform runs.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from alveary.config import default_state_dir
from alveary.errors import AlvearyError

if TYPE_CHECKING:
    from alveary.workspace import Workspace

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train PyTorch models at scale and register them.")
run_app = typer.Typer(no_args_is_help=True, help="Submit, look at and end runs.")
compute_app = typer.Typer(no_args_is_help=True, help="Compute targets.")
model_app = typer.Typer(no_args_is_help=True, help="Models.")
dataset_app = typer.Typer(no_args_is_help=True, help="Datasets.")
events_app = typer.Typer(no_args_is_help=True, help="Events.")
for name, group in (("run", run_app), ("compute", compute_app), ("model", model_app), ("dataset", dataset_app), ("events", events_app)):
    app.add_typer(group, name=name)

out = Console()
err = Console(stderr=True)
FAILED, CANCELED, NO_PLATFORM = 3, 4, 5
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Directory of the stack; default $ALVEARY_HOME or ~/.alveary.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _workspace() -> Workspace:
    from alveary.workspace import Workspace

    return Workspace.from_config()


def _plain(message: Message) -> dict[str, Any]:
    return dict(MessageToDict(message, preserving_proto_field_name=True))


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool, raw: Sequence[Any] | None = None) -> None:
    if as_json:
        print(json.dumps(raw if raw is not None else rows, indent=1, default=str))
    elif out.is_terminal:
        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(str(row.get(c, "")) for c in columns))
        out.print(table)
    else:
        for row in rows:
            print("\t".join(str(row.get(c, "")) for c in columns))


def _ago(stamp: Any) -> str:
    if not stamp.seconds:
        return ""
    seconds = int(time.time() - stamp.seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"


def _pairs(values: Iterable[str] | None, what: str) -> dict[str, str]:
    found = {}
    for value in values or ():
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise typer.BadParameter(f"{what} {value!r}: use KEY=VALUE")
        found[key] = text
    return found


# ---- the stack ------------------------------------------------------------------------------------------------------


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background.")] = False,
    state_dir: StateDir = None,
    port: Annotated[
        int | None, typer.Option(help="First of 17 consecutive ports; 0: whatever is free. Default 7460, then as before.")
    ] = None,
    separate: Annotated[bool, typer.Option(help="Each service as a process of its own.")] = False,
    lease_seconds: Annotated[float, typer.Option(help="Silence after which a node is lost.")] = 30.0,
) -> None:
    """Start the whole platform on this machine."""
    from alveary.local.layout import Layout
    from alveary.local.stack import Stack, status

    folder = (state_dir or default_state_dir()).resolve()
    if detach:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(folder), "--lease-seconds", str(lease_seconds)]
        command += ["--port", str(port)] if port is not None else []
        command += ["--separate"] if separate else []
        log = folder / "up.log"
        with log.open("wb") as opened:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, start_new_session=True)
        while True:
            if child.poll() is not None:
                err.print(log.read_text().strip(), markup=False, highlight=False)
                raise typer.Exit(child.returncode or 1)
            found = status(folder)
            if found and found["supervisor"] == child.pid and "ready" in log.read_text():
                print(log.read_text().strip())
                return
            time.sleep(0.05)
    started = time.monotonic()
    layout = Layout.open(folder, port, lease_seconds=lease_seconds, beat_seconds=min(1.0, lease_seconds / 5), separate=separate)
    stack = Stack(layout, lambda text: print(text, flush=True))
    stack.acquire()
    try:
        stack.start()
    except BaseException:
        stack.stop()
        raise
    print(f"ready after {time.monotonic() - started:.1f} s at {layout.endpoint}; config: {folder / 'config.json'}", flush=True)
    stack.run()


@app.command()
def down(state_dir: StateDir = None) -> None:
    """Stop the platform on this machine. Runs under way are attempted again after the next `up`."""
    import psutil

    from alveary.local.stack import status

    folder = (state_dir or default_state_dir()).resolve()
    found = status(folder)
    if found is None:
        err.print(f"no stack runs in {folder}", markup=False)
        raise typer.Exit(NO_PLATFORM)
    process = psutil.Process(found["supervisor"])
    process.terminate()
    process.wait(60)
    print("stopped")


@app.command("status")
def status_command(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Say whether the platform runs, and what it has to do."""
    from alveary.local.stack import status

    folder = (state_dir or default_state_dir()).resolve()
    found = status(folder)
    if found is None:
        err.print(f"no stack runs in {folder}: start one with `alveary up`", markup=False)
        raise typer.Exit(NO_PLATFORM)
    from alveary.workspace import Workspace

    targets = list(Workspace.from_config(folder / "config.json").compute_targets.values())
    found["targets"] = [_target_row(t._found) for t in targets]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"running at {found['endpoint']}: " + ", ".join(f"{n} (pid {p})" for n, p in found["pids"].items()))
    _show(found["targets"], ("name", "state", "nodes", "running", "waiting"), False)


# ---- runs -----------------------------------------------------------------------------------------------------------


@run_app.command("submit")
def run_submit(
    command: Annotated[list[str], typer.Argument(help="SCRIPT [ARGUMENTS], or with --command any argv; put -- before it.")],
    source: Annotated[Path, typer.Option("--source", "-s", help="Source directory.")] = Path(),
    target: Annotated[str, typer.Option("--target", "-t", help="Compute target.")] = "local",
    experiment: Annotated[str, typer.Option("--experiment", "-e")] = "default",
    pip: Annotated[list[str] | None, typer.Option("--pip", help="A requirement; repeatable.")] = None,
    requirements: Annotated[Path | None, typer.Option(help="Requirements file.")] = None,
    pytorch: Annotated[bool, typer.Option("--pytorch", help="torch and torchvision are there.")] = False,
    python: Annotated[str, typer.Option(help="Interpreter on the node, used as it is.")] = "",
    env: Annotated[list[str] | None, typer.Option("--env", help="KEY=VALUE; repeatable.")] = None,
    inputs: Annotated[list[str] | None, typer.Option("--input", help="[NAME=]DATASET[:VERSION]; repeatable.")] = None,
    as_command: Annotated[bool, typer.Option("--command", help="Run the argv as it is.")] = False,
    processes: Annotated[int, typer.Option(help="Processes on the node, with torchrun.")] = 1,
    cpus: float = 0, memory_gb: float = 0, gpus: int = 0, priority: int = 0, max_seconds: float = 0,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE; repeatable.")] = None,
    name: Annotated[str, typer.Option(help="Display name.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show states and log until it is final.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Submit a run of a source directory; prints its id."""
    from alveary.dataset import Dataset
    from alveary.environment import Environment, requirements_of
    from alveary.estimator import PYTORCH_PACKAGES, PyTorchConfiguration, ScriptRunConfig
    from alveary.experiment import Experiment

    workspace = _workspace()
    packages = [*(PYTORCH_PACKAGES if pytorch else ()), *(requirements_of(requirements) if requirements else ()), *(pip or ())]
    environment = Environment("cli", packages, environment_variables=_pairs(env, "--env"), user_managed=bool(python), interpreter=python)
    chosen = []
    for text in inputs or ():
        label, sign, rest = text.partition("=")
        reference = rest if sign else text
        dataset, _, version = reference.partition(":")
        chosen.append(Dataset.get_by_name(workspace, dataset, version or "latest").as_mount(label if sign else dataset))
    config = ScriptRunConfig(
        str(source), None if as_command else command[0], command[1:] if not as_command else [], compute_target=target,
        environment=environment, command=command if as_command else None, cpus=cpus, memory_gb=memory_gb, gpus=gpus,
        use_gpu=gpus > 0, priority=priority, max_run_duration_seconds=max_seconds or None, inputs=chosen, display_name=name,
        distributed_job_config=PyTorchConfiguration(process_count=processes) if processes > 1 else None,
    )  # fmt: skip
    run = Experiment(workspace, experiment).submit(config, tags=_pairs(tag, "--tag"))
    if as_json and not follow:
        print(json.dumps(run.get_details(), indent=1))
        return
    print(run.id, flush=True)
    if follow:
        _follow(run)


def _follow(run: Any) -> None:
    details = run.wait_for_completion(show_output=True, raise_on_error=False)
    if details["status"] != "Completed":
        raise typer.Exit(FAILED if details["status"] == "Failed" else CANCELED)


@run_app.command("list")
def run_list(
    filter_text: Annotated[str, typer.Option("--filter", help='Like: state = Failed AND metrics.loss < 0.5')] = "",
    order_by: str = "", limit: int = 50, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Runs, newest first."""
    from alveary.aio import run_details, state_name

    workspace = _workspace()
    runs = workspace._call(workspace._client.list_runs(filter_text, order_by, limit))
    rows = [
        {
            "id": r.id, "experiment": r.spec.experiment, "name": r.display_name, "state": state_name(r.state),
            "target": r.spec.compute_target, "submitted": _ago(r.submitted_at), "reason": r.reason.splitlines()[0] if r.reason else "",
        }
        for r in runs
    ]  # fmt: skip
    _show(rows, ("id", "experiment", "name", "state", "target", "submitted", "reason"), as_json, [run_details(r) for r in runs])


@run_app.command("show")
def run_show(run_id: str, as_json: AsJson = False) -> None:
    """One run: its state and why, its metrics, how it ended."""
    workspace = _workspace()
    details = workspace.get_run(run_id).get_details()
    if as_json:
        print(json.dumps(details, indent=1))
        return
    spec = details["spec"]
    lines = {
        "id": run_id, "experiment": f"{spec['experiment']} #{details['number']}", "state": details["status"], "reason": details["reason"],
        "target": spec["compute_target"], "attempt": details["attempt"], "nodes": ", ".join(details["nodes"]),
        "program": spec["entry_script"] or shlex.join(spec["command"]) or spec["module"], "arguments": shlex.join(spec["arguments"]),
        "submitted": details.get("submitted_at", ""), "started": details.get("started_at", ""), "ended": details.get("ended_at", ""),
        "tags": ", ".join(f"{k}={v}" for k, v in details["tags"].items()), "metrics": ", ".join(f"{k}={v}" for k, v in details["metrics"].items()),
    }  # fmt: skip
    for name, value in lines.items():
        if value not in ("", 0):
            print(f"{name:<11} {value}")
    if details["exit"].get("last_lines") and details["status"] == "Failed":
        print("last lines:", *details["exit"]["last_lines"], sep="\n  ")


@run_app.command("watch")
def run_watch(run_id: str) -> None:
    """States and log lines until it is final."""
    _follow(_workspace().get_run(run_id))


@run_app.command("cancel")
def run_cancel(run_id: str) -> None:
    """Ask for its end."""
    _workspace().get_run(run_id).cancel()
    print("cancel requested")


@run_app.command("logs")
def run_logs(
    run_id: str, follow: Annotated[bool, typer.Option("--follow", "-f")] = False,
    stream: Annotated[list[str] | None, typer.Option(help="stdout, stderr, prepare, system, logs/*; repeatable.")] = None,
    after: Annotated[int, typer.Option(help="Cursor of the last line seen.")] = 0, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Its log lines."""
    workspace = _workspace()

    async def tail() -> None:
        rest: dict[str, bytes] = {}
        async for one in workspace._client.tail(run_id, after, follow, stream or ("stdout", "stderr", "system", "prepare")):
            line = one.line
            if as_json:
                print(json.dumps({"cursor": one.cursor, **_plain(line), "data": line.data.decode(errors="replace")}), flush=True)
                continue
            data = rest.pop(line.stream, b"") + line.data
            if line.partial:
                rest[line.stream] = data
                continue
            mark = "" if line.stream in ("stdout", "stderr") else f"[{line.stream}] "
            sys.stdout.buffer.write(mark.encode() + data + b"\n")
            sys.stdout.buffer.flush()

    workspace._call(tail())


@run_app.command("files")
def run_files(run_id: str, as_json: AsJson = False) -> None:
    """Files that it stored."""
    workspace = _workspace()
    links = workspace._call(workspace._client.list_run_files(run_id))
    _show([{"path": x.file.path, "size": x.file.size, "sha256": x.file.sha256} for x in links], ("path", "size", "sha256"), as_json)


@run_app.command("download")
def run_download(
    run_id: str,
    prefix: Annotated[str, typer.Argument(help="Only paths that begin so.")] = "",
    to: Annotated[Path, typer.Option("--to")] = Path(),
) -> None:
    """Store its files here."""
    workspace = _workspace()
    links = workspace._call(workspace._client.list_run_files(run_id, prefix, with_urls=True))
    if not links:
        raise AlvearyError(f"run {run_id} stored nothing under {prefix!r}", "NOT_FOUND")
    _download(workspace, links, to)


def _download(workspace: Workspace, links: Sequence[Any], to: Path) -> None:
    from alveary.progress import upload_progress

    total, done = sum(x.file.size for x in links), 0
    with upload_progress(f"{len(links)} files", "downloading") as progress:

        def update(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        workspace._call(workspace._client.download_all(links, to, update))
    print(f"{len(links)} files, {total / 1e6:.1f} MB in {to}")


# ---- compute --------------------------------------------------------------------------------------------------------


def _target_row(t: Any) -> dict[str, Any]:
    return {
        "name": t.name, "kind": t.spec.kind, "vm_size": t.spec.vm_size, "state": t.state, "nodes": f"{t.current_nodes}/{t.spec.max_nodes}",
        "cpus": t.spec.node_resources.cpus, "gpus": t.spec.node_resources.gpus, "running": t.running, "waiting": t.waiting,
    }  # fmt: skip


@compute_app.command("list")
def compute_list(as_json: AsJson = False) -> None:
    """All compute targets."""
    found = [t._found for t in _workspace().compute_targets.values()]
    _show([_target_row(t) for t in found], ("name", "kind", "state", "nodes", "cpus", "gpus", "running", "waiting"), as_json)


@compute_app.command("create")
def compute_create(
    name: str, vm_size: str = "", min_nodes: int = 0, max_nodes: int = 4, idle_seconds: float = 1800, cpus: float = 0,
    memory_gb: float = 0, gpus: int | None = None,
) -> None:  # fmt: skip
    """Create a compute target."""
    from alveary.compute import AmlCompute, ComputeTarget

    spec = AmlCompute.provisioning_configuration(
        vm_size, min_nodes=min_nodes, max_nodes=max_nodes, idle_seconds_before_scaledown=idle_seconds, cpus=cpus,
        memory_gb=memory_gb, gpus=gpus,
    )  # fmt: skip
    print(ComputeTarget.create(_workspace(), name, spec))


@compute_app.command("delete")
def compute_delete(name: str) -> None:
    """Delete a compute target that nothing uses."""
    from alveary.compute import ComputeTarget

    ComputeTarget(_workspace(), name).delete()
    print("deleted")


# ---- models ---------------------------------------------------------------------------------------------------------


def _split(reference: str) -> tuple[str, int | None]:
    name, _, version = reference.partition(":")
    if version and not version.isdecimal():
        raise typer.BadParameter(f"{reference!r}: use NAME or NAME:VERSION")
    return name, int(version) if version else None


def _model(reference: str) -> Any:
    from alveary.model import Model

    name, version = _split(reference)
    return Model(_workspace(), name, version=version)


@model_app.command("list")
def model_list(name: Annotated[str, typer.Argument()] = "", as_json: AsJson = False) -> None:
    """Model versions."""
    from alveary.model import Model

    models = Model.list(_workspace(), name or None)
    rows = [
        {
            "model": m.id, "run": m.run_id, "aliases": ",".join(m.aliases), "onnx": m.onnx["opset"] if m.onnx else "",
            "registered": _ago(m._found.registered_at), "tags": ",".join(f"{k}={v}" for k, v in m.tags.items()),
        }
        for m in models
    ]  # fmt: skip
    _show(rows, ("model", "run", "aliases", "onnx", "registered", "tags"), as_json, [_plain(m._found) for m in models])


@model_app.command("show")
def model_show(reference: Annotated[str, typer.Argument(help="NAME or NAME:VERSION")]) -> None:
    """One version, as JSON."""
    print(json.dumps(_plain(_model(reference)._found), indent=1))


@model_app.command("register")
def model_register(
    name: str, path: Annotated[str, typer.Argument(help="With --run a path among its files, else a path here.")] = "outputs",
    run: Annotated[str, typer.Option(help="Take it from this run.")] = "", tag: Annotated[list[str] | None, typer.Option("--tag")] = None,
    description: str = "",
) -> None:  # fmt: skip
    """Register the next version of a model."""
    from alveary.model import Model

    workspace, tags = _workspace(), _pairs(tag, "--tag")
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
    _download(model.workspace, model._links(), to)


# ---- datasets, events -----------------------------------------------------------------------------------------------


@dataset_app.command("list")
def dataset_list(as_json: AsJson = False) -> None:
    """Dataset versions."""
    from alveary.dataset import Dataset

    rows = [
        {"dataset": f"{d.name}:{d.version}", "files": d.file_count, "size": d.total_size, "digest": d.id[:12]}
        for d in Dataset.list(_workspace())
    ]
    _show(rows, ("dataset", "files", "size", "digest"), as_json)


@dataset_app.command("upload")
def dataset_upload(name: str, path: Path) -> None:
    """Register a folder."""
    from alveary.dataset import Dataset

    print(Dataset.upload(_workspace(), str(path), name))


@dataset_app.command("download")
def dataset_download(reference: str, to: Annotated[Path, typer.Option("--to")] = Path()) -> None:
    """Store a version's files here."""
    from alveary.dataset import Dataset

    name, version = _split(reference)
    print(Dataset.get_by_name(_workspace(), name, version or "latest").download(str(to)))


@events_app.command("tail")
def events_tail(
    pattern: Annotated[str, typer.Argument(help="Like run.completed, model.*")] = "*.*",
    durable: Annotated[str, typer.Option(help="Remember the position under this name.")] = "",
    from_sequence: Annotated[int | None, typer.Option(help="Begin here; 1: with the first.")] = None,
    from_time: Annotated[datetime | None, typer.Option(help="Begin at this time (UTC).")] = None,
    timeout: Annotated[float | None, typer.Option(help="End after this many seconds without an event.")] = None,
) -> None:  # fmt: skip
    """Events as they happen, one JSON object a line."""
    workspace = _workspace()
    for event in workspace.events.subscribe(pattern, durable=durable, from_sequence=from_sequence, from_time=from_time, timeout=timeout):
        plain = {"sequence": event.sequence, "time": event.time.isoformat(), "type": event.type, "subject": event.subject, "id": event.id}
        print(json.dumps(plain | {"data": event.data}), flush=True)


def main() -> None:
    """Entry point: errors are sentences, never tracebacks."""
    try:
        app()
    except AlvearyError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(NO_PLATFORM if "start it with `alveary up`" in str(error) or "no config.json" in str(error) else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
