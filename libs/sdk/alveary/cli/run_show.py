"""alveary run show, why, cancel."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from alveary.cli.columns import ago, duration, number, plural, seconds_of, size, took, when
from alveary.cli.common import json_option, open_workspace, print_json
from alveary.cli.table import sheet
from alveary.errors import AlvearyError
from alveary.text import printable

if TYPE_CHECKING:
    from alveary.workspace import Workspace
    from alveary_contracts.runs.v1 import runs_pb2 as pb

# So many of a run's files and metrics are named.
_NAMED = 10


@click.command()
@click.argument("run_id")
@json_option
def why(run_id: str, as_json: bool) -> None:
    """Why a run is queued, and when it is expected to begin: its position, what it waits for, what would help."""
    found = open_workspace().get_run(run_id).why_queued()
    if as_json:
        print_json(found)
        return
    sheet({name.replace("_", " "): "not foreseeable" if value is None else value for name, value in found.items()})


@click.command("show")
@click.argument("run_id")
@json_option
def show_run(run_id: str, as_json: bool) -> None:
    """One run: what it is, how it went, what it left, and where its log is."""
    from alveary.client.states import run_details, state_name

    workspace = open_workspace()
    run = workspace._call(workspace._client.runs.get(run_id))
    if as_json:
        print_json(run_details(run))
        return
    spec, final = run.spec, bool(run.ended_at.seconds)
    waited = seconds_of(run.started_at) - seconds_of(run.submitted_at) if run.started_at.seconds else 0.0
    since = f", {ago(run.state_since)}" if run.state_since.seconds else ""
    short = run.id[:12]
    sheet(
        {
            "id": run.id,
            "name": run.display_name,
            "experiment": f"{spec.experiment} #{run.number}",
            "state": f"{state_name(run.state)}{since}",
            "reason": run.reason,
            "exit": _exit(run),
            "submitted": f"{when(run.submitted_at)} by {run.submitted_by}",
            "started": when(run.started_at) + (f", after {duration(waited)}" if waited >= 1 else ""),
            "ended": when(run.ended_at),
            "took": str(took(run)) + ("" if final else " so far") if run.started_at.seconds else "",
            "attempt": f"{run.attempt} of {spec.max_attempts}" if run.attempt > 1 else "",
            "program": program_of(run),
            "arguments": shlex.join(spec.arguments),
            "source": spec.snapshot[:12],
            "target": spec.compute_target + (f" on {', '.join(run.nodes)}" if run.nodes else ""),
            "resources": resources_of(run),
            "environment": environment_of(run) + (f" (image {run.image_digest[:12]})" if run.image_digest else ""),
            "inputs": [f"{i.name}: {i.dataset}:{i.version}" for i in spec.inputs],
            "parent": spec.parent_run_id,
            "resumes": spec.resume_from,
            "tags": [f"{k}={v}" for k, v in sorted(run.tags.items())],
            "properties": [f"{k}={v}" for k, v in sorted(run.properties.items())],
            "description": run.description,
            "metrics": _some(
                [f"{k} = {number(v)}" for k, v in sorted(run.metrics.items())], f"alveary run metrics {short}", run.metric_count
            ),
            "outputs": _outputs(workspace, run),
            "models": _models(workspace, run),
            "log": f"alveary run logs {short}" + ("" if final else f"  (alveary run watch {short} follows it)"),
        }
    )
    if run.exit.last_lines and state_name(run.state) == "Failed":
        click.echo("\n  ".join(["last lines", *map(printable, run.exit.last_lines)]))


def program_of(run: pb.Run) -> str:
    """Script, command or module."""
    return run.spec.entry_script or shlex.join(run.spec.command) or run.spec.module


def resources_of(run: pb.Run) -> str:
    """What it asked for, in words; empty where it left that to the target."""
    asked, spec = run.spec.resources, run.spec
    gpus = asked.gpu_milli / 1000 if asked.gpu_milli else asked.gpus
    parts = [plural(asked.cpus, "CPU")] if asked.cpus else []
    parts += [f"{asked.memory_bytes / 2**30:.3g} GiB of memory"] if asked.memory_bytes else []
    parts += [plural(gpus, "GPU") + (f" ({' or '.join(asked.gpu_models)})" if asked.gpu_models else "")] if gpus else []
    parts += [f"{spec.node_count} nodes"] if spec.node_count > 1 else []
    parts += [f"{spec.process_count_per_node} processes a node"] if spec.process_count_per_node > 1 else []
    parts += [f"at most {duration(spec.max_run_duration_seconds)}"] if spec.max_run_duration_seconds else []
    return ", ".join(parts)


def environment_of(run: pb.Run) -> str:
    """Its name and what is in it, in words."""
    it = run.spec.environment
    if it.user_managed:
        return f"{it.name or 'unnamed'}: {it.interpreter or 'the python of the node'}, used as it is"
    packages = [*it.conda_packages, *it.pip_packages]
    parts = [f"python {it.python_version}"] if it.python_version else []
    parts += [", ".join(packages[:_NAMED]) + (f" and {len(packages) - _NAMED} more" if len(packages) > _NAMED else "")] if packages else []
    return f"{it.name or 'unnamed'}: {'; '.join(parts) or 'python alone'}"


def _exit(run: pb.Run) -> str:
    from alveary_contracts import exit_reasons

    if not run.exit.reason:
        return ""
    how = (
        f"signal {run.exit.signal}"
        if run.exit.HasField("signal")
        else f"code {run.exit.exit_code}"
        if run.exit.HasField("exit_code")
        else ""
    )
    where = f"rank {run.exit.rank} on {run.exit.node}" if run.exit.HasField("rank") else ""
    return ", ".join(part for part in (exit_reasons.word(run.exit.reason).replace("_", " "), how, where) if part)


def _some(lines: list[str], more: str, count: int = 0) -> list[str]:
    """The first of them, and how to see the others, of which there are `count` where that is more than are known here."""
    left = max(count, len(lines)) - len(lines[:_NAMED])
    return [*lines[:_NAMED], *([f"and {left} more: {more}"] if left else [])]


def _outputs(workspace: Workspace, run: pb.Run) -> list[str]:
    def find() -> list[str]:
        links = workspace._call(workspace._client.runs.file_links(run.id, "outputs/"))
        if not links:
            return []
        total = size(sum(x.file.size for x in links))
        lines = [x.file.path + (f" ({size(x.file.size)})" if x.file.size else "") for x in links]
        return [f"{plural(len(links), 'file')}, {total}", *_some(lines, f"alveary run files {run.id[:12]}")]

    return _unless_away(find)


def _models(workspace: Workspace, run: pb.Run) -> list[str]:
    from alveary.model import Model

    return _unless_away(lambda: [model.id for model in reversed(Model.list(workspace, run_id=run.id))])


def _unless_away(find: Any) -> list[str]:
    """What `find` finds; a service that is away does not keep a run from being shown, and is named."""
    try:
        return list(find())
    except AlvearyError as error:
        return [f"not known now: {error}"]


@click.command()
@click.argument("run_id")
def cancel(run_id: str) -> None:
    """Ask for its end."""
    run = open_workspace().get_run(run_id)
    run.cancel()
    click.echo(f"cancel requested: {run.id}")


@click.command()
@click.argument("run_ids", metavar="RUN_ID...", nargs=-1, required=True)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def delete(run_ids: tuple[str, ...], yes: bool) -> None:
    """Erase final runs: their files, checkpoints, logs and metrics. Models that were registered from them stay."""
    workspace = open_workspace()
    runs = [workspace.get_run(run_id) for run_id in run_ids]  # all of them are there, or none is touched
    if not yes:
        click.confirm(f"erase {', '.join(run.id for run in runs)}, with all files, logs and metrics, for ever?", abort=True, err=True)
    for run in runs:
        run.delete()
        click.echo(f"deleted: {run.id}")
