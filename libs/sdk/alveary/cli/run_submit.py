"""alveary run submit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from alveary.cli.common import FOLDER, json_option, open_workspace, pairs, print_json, say

if TYPE_CHECKING:
    from alveary.dataset import Input
    from alveary.run_options import Distribution
    from alveary.workspace import Workspace


# Options end where the script begins, as python's and docker run's do: what follows it is the script's.
@click.command(context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="SCRIPT [ARGUMENTS]...")
@click.option("--source", "-s", type=FOLDER, default=".", show_default=True, help="Source directory.")
@click.option("--target", "-t", default="local", show_default=True, help="Compute target.")
@click.option("--experiment", "-e", default="default", show_default=True, help="Experiment that it belongs to.")
@click.option("--name", default="", help="Display name.")
@click.option("--tag", multiple=True, help="KEY=VALUE; repeatable.")
@click.option("--follow", "-f", is_flag=True, help="Show states and log until it is final.")
@click.option("--pip", multiple=True, help="A requirement; repeatable.")
@click.option("--requirements", type=FOLDER, help="Requirements file.")
@click.option("--pytorch", is_flag=True, help="torch and torchvision are there.")
@click.option("--python", default="", help="Interpreter on the node, used as it is.")
@click.option("--env", multiple=True, help="KEY=VALUE; repeatable.")
@click.option("--input", "inputs", multiple=True, help="[NAME=]DATASET[:VERSION]; repeatable.")
@click.option("--command", "as_command", is_flag=True, help="Run what follows as it is: a program and its arguments.")
@click.option("--cpus", default=0.0, help="CPUs on each node; 0: what the target gives.")
@click.option("--memory-gb", default=0.0, help="Memory on each node; 0: what the target gives.")
@click.option("--gpus", default=0.0, help="GPUs on each node; less than 1: a part of one.")
@click.option("--gpu-model", multiple=True, help="A GPU model that will do; repeatable.")
@click.option("--node-label", multiple=True, help="KEY=VALUE that a node must have; repeatable.")
@click.option("--processes", default=1, help="Processes on each node.")
@click.option("--nodes", default=1, help="Nodes; all or none.")
@click.option("--min-nodes", default=0, help="Begin with as few as these, with torchrun; 0: all.")
@click.option("--launcher", default="", help="torchrun, mpi or plain; default: torchrun where there is more than one process.")
@click.option("--max-restarts", default=0, help="How often torchrun restarts failed workers.")
@click.option("--priority", default=0, help="Below 0 gives way to others.")
@click.option("--max-seconds", default=0.0, help="End it after this time; 0: never.")
@json_option
def submit(
    command: tuple[str, ...],
    source: Path,
    target: str,
    experiment: str,
    pip: tuple[str, ...],
    requirements: Path | None,
    pytorch: bool,
    python: str,
    env: tuple[str, ...],
    inputs: tuple[str, ...],
    as_command: bool,
    processes: int,
    nodes: int,
    min_nodes: int,
    launcher: str,
    max_restarts: int,
    cpus: float,
    memory_gb: float,
    gpus: float,
    priority: int,
    max_seconds: float,
    gpu_model: tuple[str, ...],
    node_label: tuple[str, ...],
    tag: tuple[str, ...],
    name: str,
    follow: bool,
    as_json: bool,
) -> None:
    """Submit a run of a source directory; prints its id.

    Options come before the script; everything after it is the script's: alveary run submit --follow train.py --epochs 3
    """
    from alveary.environment import Environment
    from alveary.estimator import PYTORCH_PACKAGES
    from alveary.requirements import requirements_of
    from alveary.run import Experiment
    from alveary.run_options import Resources
    from alveary.script_run_config import ScriptRunConfig

    _say_whose(command)
    workspace = open_workspace()
    packages = [*(PYTORCH_PACKAGES if pytorch else ()), *(requirements_of(requirements) if requirements else ()), *pip]
    environment = Environment("cli", packages, environment_variables=pairs(env, "--env"), user_managed=bool(python), interpreter=python)
    config = ScriptRunConfig(
        str(source),
        None if as_command else command[0],
        command[1:] if not as_command else [],
        compute_target=target,
        environment=environment,
        command=command if as_command else None,
        use_gpu=gpus > 0,
        priority=priority,
        resources=Resources(cpus, memory_gb, gpus, gpu_model, pairs(node_label, "--node-label")),
        max_run_duration_seconds=max_seconds or None,
        inputs=_inputs(workspace, inputs),
        display_name=name,
        distributed_job_config=_distribution(launcher, processes, nodes, min_nodes, max_restarts),
    )
    run = Experiment(workspace, experiment).submit(config, tags=pairs(tag, "--tag"))
    if as_json and not follow:
        print_json(run.get_details())
        return
    click.echo(run.id)
    if follow:
        from alveary.cli.run_logs import follow as follow_run

        follow_run(run)


def _say_whose(command: tuple[str, ...]) -> None:
    """Options of ours after the script are the script's; who watches is told, as it may be a slip."""
    if not sys.stderr.isatty():
        return
    ours = {name for option in submit.params for name in option.opts if isinstance(option, click.Option)}
    meant = [word for word in command[1:] if word.partition("=")[0] in ours]
    if meant:
        say(f"note: {', '.join(meant)} after {command[0]}: given to the script; options of `alveary run submit` come before it")


def _inputs(workspace: Workspace, inputs: tuple[str, ...]) -> list[Input]:
    from alveary.dataset import Dataset

    chosen = []
    for text in inputs:
        label, sign, rest = text.partition("=")
        dataset, _, version = (rest if sign else text).partition(":")
        chosen.append(Dataset.get_by_name(workspace, dataset, version or "latest").as_mount(label if sign else dataset))
    return chosen


def _distribution(launcher: str, processes: int, nodes: int, min_nodes: int, max_restarts: int) -> Distribution:
    from alveary.run_options import Distribution, Launcher

    if launcher not in ("", *get_args(Launcher)):
        raise click.BadParameter(f"--launcher {launcher}: torchrun, mpi or plain")
    chosen = launcher or ("torchrun" if processes > 1 or nodes > 1 else "plain")
    if (min_nodes or max_restarts) and chosen != "torchrun":
        raise click.BadParameter(f"--min-nodes and --max-restarts are torchrun's, and this run is launched by {chosen}")
    return Distribution(nodes, processes, cast(Launcher, chosen), min_nodes, max_restarts)
