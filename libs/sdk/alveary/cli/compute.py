"""alveary compute."""

from __future__ import annotations

import typer

from alveary.cli.common import AsJson, open_workspace, show, target_row

compute_app = typer.Typer(no_args_is_help=True, help="Compute targets.")


@compute_app.command("list")
def compute_list(as_json: AsJson = False) -> None:
    """All compute targets."""
    found = [t._found for t in open_workspace().compute_targets.values()]
    show([target_row(t) for t in found], ("name", "kind", "state", "nodes", "cpus", "gpus", "running", "waiting"), as_json)


@compute_app.command("create")
def compute_create(
    name: str, vm_size: str = "", min_nodes: int = 0, max_nodes: int = 4, idle_seconds: float = 1800, cpus: float = 0,
    memory_gb: float = 0, gpus: int | None = None, kind: str = "", placement_policy: str = "", gpu_sharing: bool = False,
    vm_priority: str = "dedicated", address: str = "", cooldown_seconds: float = 0,
) -> None:  # fmt: skip
    """Create a compute target."""
    from alveary.compute import AmlCompute, ComputeTarget

    spec = AmlCompute.provisioning_configuration(
        vm_size, min_nodes=min_nodes, max_nodes=max_nodes, idle_seconds_before_scaledown=idle_seconds, cpus=cpus,
        memory_gb=memory_gb, gpus=gpus, kind=kind, placement_policy=placement_policy, gpu_sharing=gpu_sharing, vm_priority=vm_priority,
        address=address, cooldown_seconds=cooldown_seconds,
    )  # fmt: skip
    print(ComputeTarget.create(open_workspace(), name, spec))


@compute_app.command("update")
def compute_update(
    name: str, min_nodes: int | None = None, max_nodes: int | None = None, idle_seconds: float | None = None,
    cooldown_seconds: float | None = None, description: str | None = None,
) -> None:  # fmt: skip
    """Change limits of a compute target; runs go on."""
    from alveary.compute import ComputeTarget

    target = ComputeTarget(open_workspace(), name)
    target.update(min_nodes, max_nodes, idle_seconds, cooldown_seconds=cooldown_seconds, description=description)
    print(target)


@compute_app.command("delete")
def compute_delete(name: str) -> None:
    """Delete a compute target that nothing uses."""
    from alveary.compute import ComputeTarget

    ComputeTarget(open_workspace(), name).delete()
    print("deleted")


@compute_app.command("nodes")
def compute_nodes(target: str = "", as_json: AsJson = False) -> None:
    """Nodes that have joined, and what is free on them."""
    from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    nodes = workspace._call(client.call(client.nodes.ListNodes, pb.ListNodesRequest(target=target))).nodes
    rows = [
        {
            "node": n.id, "target": n.target, "state": n.state, "runs": str(len(n.run_ids)),
            "cpus": f"{n.used.cpus:g}/{n.resources.cpus:g}", "gpus": f"{n.used.gpus + n.used.gpu_milli / 1000:g}/{n.resources.gpus}",
            "labels": " ".join(f"{k}={v}" for k, v in sorted(n.labels.items())),
        }
        for n in nodes
    ]  # fmt: skip
    show(rows, ("node", "target", "state", "runs", "cpus", "gpus", "labels"), as_json)


@compute_app.command("drain")
def compute_drain(node: str, reason: str = "") -> None:
    """Place nothing more on a node; what runs there runs to its end."""
    from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    workspace._call(client.call(client.nodes.DrainNode, pb.DrainNodeRequest(node=node, reason=reason)))
    print("draining")
