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
    memory_gb: float = 0, gpus: int | None = None,
) -> None:  # fmt: skip
    """Create a compute target."""
    from alveary.compute import AmlCompute, ComputeTarget

    spec = AmlCompute.provisioning_configuration(
        vm_size, min_nodes=min_nodes, max_nodes=max_nodes, idle_seconds_before_scaledown=idle_seconds, cpus=cpus,
        memory_gb=memory_gb, gpus=gpus,
    )  # fmt: skip
    print(ComputeTarget.create(open_workspace(), name, spec))


@compute_app.command("delete")
def compute_delete(name: str) -> None:
    """Delete a compute target that nothing uses."""
    from alveary.compute import ComputeTarget

    ComputeTarget(open_workspace(), name).delete()
    print("deleted")
