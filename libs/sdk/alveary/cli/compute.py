"""alveary compute."""

from __future__ import annotations

from typing import Any

import click

from alveary.cli.common import enum_word, json_option, open_workspace, target_row
from alveary.cli.table import show


@click.group(no_args_is_help=True)
def compute() -> None:
    """Compute targets."""


@compute.command("list")
@json_option
def list_targets(as_json: bool) -> None:
    """All compute targets."""
    found = [t._found for t in open_workspace().compute_targets.values()]
    columns = ("name", "kind", "state", "nodes", "cpus", "gpus", "running", "waiting")
    show([target_row(t) for t in found], columns, as_json, elastic=("name", "state"))


@compute.command()
@click.argument("name")
@click.option("--kind", default="", help="local: this machine; nodes: machines that join; ray: a Ray cluster. Default: local.")
@click.option("--vm-size", default="", help="A size that the platform knows.")
@click.option("--min-nodes", default=0, help="Nodes that are always there.")
@click.option("--max-nodes", default=4, show_default=True, help="Nodes at most.")
@click.option("--idle-seconds", default=1800.0, show_default=True, help="After which a node is let go.")
@click.option("--cooldown-seconds", default=0.0, help="For which no node is let go after nodes came or went.")
@click.option("--cpus", default=0.0, help="CPUs of a node; 0: this machine's.")
@click.option("--memory-gb", default=0.0, help="Memory of a node; 0: this machine's.")
@click.option("--gpus", type=int, help="GPUs of a node; default: this machine's.")
@click.option("--gpu-sharing/--no-gpu-sharing", default=False, help="Runs may ask for a part of a GPU.")
@click.option("--placement-policy", default="", help="How nodes are chosen.")
@click.option("--vm-priority", default="dedicated", show_default=True, help="dedicated or lowpriority.")
@click.option("--address", default="", help="Of the Ray cluster, HOST:PORT.")
def create(
    name: str,
    vm_size: str,
    min_nodes: int,
    max_nodes: int,
    idle_seconds: float,
    cpus: float,
    memory_gb: float,
    gpus: int | None,
    kind: str,
    placement_policy: str,
    gpu_sharing: bool,
    vm_priority: str,
    address: str,
    cooldown_seconds: float,
) -> None:
    """Create a compute target."""
    from alveary.compute import AmlCompute, ComputeTarget

    spec = AmlCompute.provisioning_configuration(
        vm_size,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        idle_seconds_before_scaledown=idle_seconds,
        cpus=cpus,
        memory_gb=memory_gb,
        gpus=gpus,
        kind=kind,
        placement_policy=placement_policy,
        gpu_sharing=gpu_sharing,
        vm_priority=vm_priority,
        address=address,
        cooldown_seconds=cooldown_seconds,
    )
    click.echo(ComputeTarget.create(open_workspace(), name, spec))


@compute.command()
@click.argument("name")
@click.option("--min-nodes", type=int)
@click.option("--max-nodes", type=int)
@click.option("--idle-seconds", type=float, help="After which a node is let go.")
@click.option("--cooldown-seconds", type=float, help="For which no node is let go after nodes came or went.")
@click.option("--description")
def update(name: str, **limits: Any) -> None:
    """Change limits of a compute target; runs go on."""
    from alveary.compute import ComputeTarget

    target = ComputeTarget(open_workspace(), name)
    target.update(
        limits["min_nodes"],
        limits["max_nodes"],
        limits["idle_seconds"],
        cooldown_seconds=limits["cooldown_seconds"],
        description=limits["description"],
    )
    click.echo(target)


@compute.command()
@click.argument("name")
def delete(name: str) -> None:
    """Delete a compute target that nothing uses."""
    from alveary.compute import ComputeTarget

    ComputeTarget(open_workspace(), name).delete()
    click.echo("deleted")


@compute.command()
@click.option("--target", default="", help="Of this target; default: of all.")
@json_option
def nodes(target: str, as_json: bool) -> None:
    """Nodes that have joined, and what is free on them."""
    workspace = open_workspace()
    found = workspace._call(workspace._client.compute.nodes(target))
    rows = [
        {
            "node": n.id,
            "target": n.target,
            "state": enum_word(n, "state"),
            "runs": str(len(n.run_ids)),
            "cpus": f"{n.used.cpus:g}/{n.resources.cpus:g}",
            "gpus": f"{n.used.gpus + n.used.gpu_milli / 1000:g}/{n.resources.gpus}",
            "labels": " ".join(f"{k}={v}" for k, v in sorted(n.labels.items())),
        }
        for n in found
    ]
    show(rows, ("node", "target", "state", "runs", "cpus", "gpus", "labels"), as_json, elastic=("node", "target", "labels"))


@compute.command()
@click.argument("node")
@click.option("--reason", default="", help="What others are told.")
def drain(node: str, reason: str) -> None:
    """Place nothing more on a node; what runs there runs to its end."""
    workspace = open_workspace()
    workspace._call(workspace._client.compute.drain_node(node, reason))
    click.echo("draining")
