"""alveary node: machines that become nodes of a compute target."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from alveary.cli.common import err, open_workspace, pairs
from alveary.config import Config
from alveary.errors import AlvearyError

node_app = typer.Typer(no_args_is_help=True, help="Make machines nodes of a compute target of kind `nodes`.")


@node_app.command("token")
def node_token(target: str, hours: Annotated[float, typer.Option(help="How long machines may join with it.")] = 24.0) -> None:
    """Print the command with which a machine joins a target."""
    from alveary.compute import ComputeTarget

    endpoint, token = ComputeTarget(open_workspace(), target).create_join_token(hours * 3600)
    if endpoint.startswith(("127.", "localhost")):
        err.print("this works on the platform's own machine alone: `alveary up --bind ADDRESS` lets others reach it", markup=False)
    print(f"alveary node join {endpoint} {token}")


@node_app.command("join")
def node_join(
    endpoint: Annotated[str, typer.Argument(help="HOST:PORT of the platform.")],
    token: Annotated[str, typer.Argument(help="Join token; `-` reads it from standard input.")],
    name: Annotated[str, typer.Option(help="Of the node; default: <target>-<host name>.")] = "",
    address: Annotated[str, typer.Option(help="By which other nodes reach this machine; default: where connections to the platform leave from.")] = "",
    cpus: Annotated[float, typer.Option(help="Cores for runs; 0: all.")] = 0,
    memory_gb: Annotated[float, typer.Option(help="Memory for runs; 0: all.")] = 0,
    gpus: Annotated[int, typer.Option(help="GPUs for runs; -1: all.")] = -1,
    gpu_ids: Annotated[str, typer.Option(help="Which of the machine's GPUs, by index: 2,5; default: the first.")] = "",
    label: Annotated[list[str] | None, typer.Option("--label", help="KEY=VALUE that runs may ask for; repeatable.")] = None,
    state_dir: Annotated[Path, typer.Option(help="Where runs work, and environments and data are kept.")] = Path("~/.alveary-node"),
    runtime: Annotated[str, typer.Option(help="process or docker; default: as the platform's own.")] = "",
    tls: Annotated[bool, typer.Option("--tls", help="The platform's door speaks TLS.")] = False,
    ca: Annotated[Path | None, typer.Option(help="Certificate that it is known by.")] = None,
) -> None:  # fmt: skip
    """Become a node, until Ctrl-C: then what runs here is attempted again elsewhere."""
    import json

    from alveary._loop import run
    from alveary.aio import Client
    from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

    if importlib.util.find_spec("alveary_trainer") is None:
        raise AlvearyError("this machine lacks the trainer: pip install 'alveary[local]'", "FAILED_PRECONDITION")
    token = sys.stdin.readline().strip() if token == "-" else token

    async def ask() -> pb.JoinNodeResponse:
        client = Client(Config(endpoint, token, tls=tls, ca=ca.read_text() if ca else ""))
        try:
            reply: pb.JoinNodeResponse = await client.call(client.nodes.JoinNode, pb.JoinNodeRequest(hostname=socket.gethostname()))
            return reply
        finally:
            await client.close()

    told = run(ask())
    folder = state_dir.expanduser().resolve()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY_")} | dict(told.environment)
    environment |= {
        "ALVEARY_NODE": name or f"{told.target}-{socket.gethostname()}", "ALVEARY_STATE_DIR": str(folder),
        "ALVEARY_NODE_CPUS": str(cpus), "ALVEARY_NODE_MEMORY_BYTES": str(int(memory_gb * 2**30)), "ALVEARY_GPU_COUNT": str(gpus),
        "ALVEARY_NODE_LABELS": json.dumps(pairs(label, "--label")), "ALVEARY_ADDRESS": address,
    }  # fmt: skip
    if gpu_ids:
        environment["ALVEARY_GPU_IDS"] = f"[{gpu_ids}]"
    if runtime:
        environment["ALVEARY_RUNTIME"] = runtime
    print(f"node {environment['ALVEARY_NODE']} of {told.target} (workspace {told.workspace}); state in {folder}", flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "alveary_trainer"], environment)
