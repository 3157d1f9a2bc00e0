"""alveary run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import typer

from alveary.cli.common import CANCELED, FAILED, AsJson, ago, download, open_workspace, pairs, plain, show
from alveary.errors import AlvearyError

# Streams that are shown where none is named.
SHOWN = ("stdout", "stderr", "system", "prepare", "launcher-stdout", "launcher-stderr")

run_app = typer.Typer(no_args_is_help=True, help="Submit, look at and end runs.")


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
    processes: Annotated[int, typer.Option(help="Processes on each node.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes; all or none.")] = 1,
    min_nodes: Annotated[int, typer.Option(help="Begin with as few as these, with torchrun; 0: all.")] = 0,
    launcher: Annotated[str, typer.Option(help="torchrun, mpi or plain; default: torchrun where there is more than one process.")] = "",
    max_restarts: Annotated[int, typer.Option(help="How often torchrun starts failed workers anew.")] = 0,
    cpus: float = 0, memory_gb: float = 0, gpus: float = 0, priority: int = 0, max_seconds: float = 0,
    gpu_model: Annotated[list[str] | None, typer.Option("--gpu-model", help="A GPU model that will do; repeatable.")] = None,
    node_label: Annotated[list[str] | None, typer.Option("--node-label", help="KEY=VALUE that a node must have; repeatable.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE; repeatable.")] = None,
    name: Annotated[str, typer.Option(help="Display name.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show states and log until it is final.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Submit a run of a source directory; prints its id."""
    from alveary.dataset import Dataset
    from alveary.environment import Environment, requirements_of
    from alveary.estimator import PYTORCH_PACKAGES, MpiConfiguration, PyTorchConfiguration, ScriptRunConfig
    from alveary.experiment import Experiment

    workspace = open_workspace()
    packages = [*(PYTORCH_PACKAGES if pytorch else ()), *(requirements_of(requirements) if requirements else ()), *(pip or ())]
    environment = Environment("cli", packages, environment_variables=pairs(env, "--env"), user_managed=bool(python), interpreter=python)
    chosen = []
    for text in inputs or ():
        label, sign, rest = text.partition("=")
        reference = rest if sign else text
        dataset, _, version = reference.partition(":")
        chosen.append(Dataset.get_by_name(workspace, dataset, version or "latest").as_mount(label if sign else dataset))
    launcher = launcher or ("torchrun" if processes > 1 or nodes > 1 else "plain")
    if launcher not in ("torchrun", "mpi", "plain"):
        raise typer.BadParameter(f"--launcher {launcher}: torchrun, mpi or plain")
    distributed: Any = None
    if launcher == "torchrun":
        distributed = PyTorchConfiguration(
            process_count=processes * nodes, node_count=nodes, min_node_count=min_nodes, max_restarts=max_restarts
        )
    elif launcher == "mpi":
        distributed = MpiConfiguration(processes, nodes)
    config = ScriptRunConfig(
        str(source), None if as_command else command[0], command[1:] if not as_command else [], compute_target=target,
        environment=environment, command=command if as_command else None, cpus=cpus, memory_gb=memory_gb, gpus=gpus,
        gpu_models=gpu_model or (), node_labels=pairs(node_label, "--node-label"), use_gpu=gpus > 0, priority=priority, max_run_duration_seconds=max_seconds or None, inputs=chosen, display_name=name,
        distributed_job_config=distributed, node_count=nodes,
    )  # fmt: skip
    run = Experiment(workspace, experiment).submit(config, tags=pairs(tag, "--tag"))
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

    workspace = open_workspace()
    runs = workspace._call(workspace._client.list_runs(filter_text, order_by, limit))
    rows = [
        {
            "id": r.id, "experiment": r.spec.experiment, "name": r.display_name, "state": state_name(r.state),
            "target": r.spec.compute_target, "submitted": ago(r.submitted_at), "reason": r.reason.splitlines()[0] if r.reason else "",
        }
        for r in runs
    ]  # fmt: skip
    show(rows, ("id", "experiment", "name", "state", "target", "submitted", "reason"), as_json, [run_details(r) for r in runs])


@run_app.command("why")
def run_why(run_id: str, as_json: AsJson = False) -> None:
    """Why a run is queued: its position, what it waits for, what would help, when it is expected to begin."""
    why = open_workspace().get_run(run_id).why_queued()
    if as_json:
        print(json.dumps(why, indent=1))
        return
    for name, value in why.items():
        print(f"{name.replace('_', ' '):<16} {'not foreseeable' if value is None else value}")


@run_app.command("show")
def run_show(run_id: str, as_json: AsJson = False) -> None:
    """One run: its state and why, its metrics, how it ended."""
    workspace = open_workspace()
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
    _follow(open_workspace().get_run(run_id))


@run_app.command("cancel")
def run_cancel(run_id: str) -> None:
    """Ask for its end."""
    open_workspace().get_run(run_id).cancel()
    print("cancel requested")


@run_app.command("logs")
def run_logs(
    run_id: str, follow: Annotated[bool, typer.Option("--follow", "-f")] = False,
    stream: Annotated[list[str] | None, typer.Option(help="stdout, stderr, prepare, system, launcher-stdout, launcher-stderr, logs/*; repeatable.")] = None,
    rank: Annotated[int, typer.Option(help="Lines of this rank.")] = 0,
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="Lines of all ranks, each marked with its own.")] = False,
    after: Annotated[int, typer.Option(help="Cursor of the last line seen.")] = 0,
    grep: Annotated[str, typer.Option(help="Only lines that hold this text; not with --follow.")] = "",
    ignore_case: Annotated[bool, typer.Option("--ignore-case", "-i", help="With --grep.")] = False,
    newest: Annotated[int, typer.Option(help="Only the newest lines, this many; not with --follow or --grep.")] = 0,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Its log lines."""
    workspace = open_workspace()

    if (follow and (grep or newest)) or (grep and newest):
        raise typer.BadParameter("--follow, --grep and --newest exclude each other")
    streams = stream or SHOWN
    only = None if all_ranks else rank

    async def lines() -> AsyncIterator[Any]:
        if newest:
            for one in (await workspace._client.read_logs(run_id, after, newest, True, streams, only)).lines:
                yield one
            return
        if not grep:
            async for one in workspace._client.tail(run_id, after, follow, streams, only):
                yield one
            return
        start = after
        while True:
            page = await workspace._client.search_logs(run_id, grep, ignore_case=ignore_case, after=start, streams=streams, rank=only)
            for one in page.lines:
                yield one
            if not page.next:
                return
            start = page.next

    async def tail() -> None:
        rest: dict[tuple[str, int], bytes] = {}
        async for one in lines():
            line = one.line
            if as_json:
                print(json.dumps({"cursor": one.cursor, **plain(line), "data": line.data.decode(errors="replace")}), flush=True)
                continue
            data = rest.pop((line.stream, line.rank), b"") + line.data
            if line.partial:
                rest[line.stream, line.rank] = data
                continue
            mark = "" if line.stream in ("stdout", "stderr") else f"[{line.stream}] "
            mark = f"[{line.rank}] {mark}" if all_ranks else mark
            sys.stdout.buffer.write(mark.encode() + data + b"\n")
            sys.stdout.buffer.flush()

    workspace._call(tail())


@run_app.command("files")
def run_files(run_id: str, as_json: AsJson = False) -> None:
    """Files that it stored."""
    workspace = open_workspace()
    links = workspace._call(workspace._client.list_run_files(run_id))
    show([{"path": x.file.path, "size": x.file.size, "sha256": x.file.sha256} for x in links], ("path", "size", "sha256"), as_json)


@run_app.command("download")
def run_download(
    run_id: str,
    prefix: Annotated[str, typer.Argument(help="Only paths that begin so.")] = "",
    to: Annotated[Path, typer.Option("--to")] = Path(),
) -> None:
    """Store its files here."""
    workspace = open_workspace()
    links = workspace._call(workspace._client.list_run_files(run_id, prefix, with_urls=True))
    if not links:
        raise AlvearyError(f"run {run_id} stored nothing under {prefix!r}", "NOT_FOUND")
    download(workspace, links, to)
