"""alveary node: machines that become nodes of a compute target."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import os
import shlex
import socket
import sys
from pathlib import Path

import click

from alveary.cli.common import FOLDER, open_workspace, pairs, say
from alveary.config import Config
from alveary.errors import AlvearyError


@click.group(no_args_is_help=True)
def node() -> None:
    """Make machines nodes of a compute target of kind `nodes`."""


@node.command("token")
@click.argument("target")
@click.option("--hours", default=24.0, show_default=True, help="How long machines may join with it.")
def print_token(target: str, hours: float) -> None:
    """Print the command with which a machine joins a target."""
    from alveary.compute import ComputeTarget

    workspace = open_workspace()
    endpoint, token = ComputeTarget(workspace, target).create_join_token(hours * 3600)
    if _loopback(endpoint):
        say(
            "this works on the platform's own machine alone: `alveary up --bind ADDRESS`, or with docker compose "
            "`--host NAME --bind ADDRESS` of `make compose-init`, let others reach it"
        )
    config = workspace._client.config
    words = ["alveary node join", endpoint, token, *(["--tls"] if config.tls else [])]
    if config.tls and config.ca:
        words += ["--ca-data", base64.urlsafe_b64encode(config.ca.encode()).decode()]
    click.echo(" ".join(words))


def _loopback(endpoint: str) -> bool:
    return endpoint.startswith(("127.", "localhost:", "[::1]"))


@node.command()
@click.argument("endpoint")
@click.argument("token")
@click.option("--name", default="", help="Of the node; default: <target>-<host name>.")
@click.option(
    "--address", default="", help="By which other nodes reach this machine; default: where connections to the platform leave from."
)
@click.option("--cpus", default=0.0, help="Cores for runs; 0: all.")
@click.option("--memory-gb", default=0.0, help="Memory for runs; 0: all.")
@click.option("--gpus", default=-1, help="GPUs for runs; -1: all.")
@click.option("--gpu-ids", default="", help="Which of the machine's GPUs, by index: 2,5; default: the first.")
@click.option("--label", multiple=True, help="KEY=VALUE that runs may ask for; repeatable.")
@click.option(
    "--state-dir", type=FOLDER, default="~/.alveary-node", show_default=True, help="Where runs work, and environments and data are kept."
)
@click.option("--tls", is_flag=True, help="The platform's door speaks TLS.")
@click.option("--ca", type=FOLDER, help="Certificate of the authority that it is known by, a PEM file.")
@click.option("--ca-data", default="", help="The same, as `alveary node token` prints it.")
def join(
    endpoint: str,
    token: str,
    name: str,
    address: str,
    cpus: float,
    memory_gb: float,
    gpus: int,
    gpu_ids: str,
    label: tuple[str, ...],
    state_dir: Path,
    tls: bool,
    ca: Path | None,
    ca_data: str,
) -> None:
    """Become a node, until Ctrl-C: then what runs here is attempted again elsewhere.

    ENDPOINT is HOST:PORT of the platform; TOKEN the join token, which `-` reads from standard input.
    """
    import json

    from alveary._loop import run
    from alveary.aio import Client
    from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

    if importlib.util.find_spec("alveary_trainer") is None:
        raise AlvearyError("this machine lacks the trainer: pip install 'alveary[local]'", "FAILED_PRECONDITION")
    token = sys.stdin.readline().strip() if token == "-" else token
    trusted = _authority(ca, ca_data)

    async def ask() -> pb.JoinNodeResponse:
        client = Client(Config(endpoint, token, tls=tls, ca=trusted))
        try:
            reply: pb.JoinNodeResponse = await client.call(client.stubs.nodes.JoinNode, pb.JoinNodeRequest(hostname=socket.gethostname()))
            return reply
        finally:
            await client.close()

    told = run(ask())
    try:
        folder = state_dir.expanduser().resolve()
    except RuntimeError as error:
        raise AlvearyError(f"{state_dir}: there is no home directory ({error}): give --state-dir a whole path") from error
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ALVEARY_")} | dict(told.environment)
    environment |= {
        "ALVEARY_NODE": name or f"{told.target}-{socket.gethostname()}",
        "ALVEARY_STATE_DIR": str(folder),
        "ALVEARY_NODE_CPUS": str(cpus),
        "ALVEARY_NODE_MEMORY_BYTES": str(int(memory_gb * 2**30)),
        "ALVEARY_GPU_COUNT": str(gpus),
        "ALVEARY_NODE_LABELS": json.dumps(pairs(label, "--label")),
        "ALVEARY_ADDRESS": address,
    }
    if gpu_ids:
        environment["ALVEARY_GPU_IDS"] = f"[{gpu_ids}]"
    if trusted:
        (folder / "ca.crt").write_text(trusted)
        environment["ALVEARY_CA"] = str(folder / "ca.crt")
        if told.environment.get("ALVEARY_RUNTIME") == "docker":
            let_docker_trust(told.environment.get("ALVEARY_REGISTRY_AT", ""), folder / "ca.crt")
    click.echo(f"node {environment['ALVEARY_NODE']} of {told.target} (workspace {told.workspace}); state in {folder}")
    os.execve(sys.executable, [sys.executable, "-m", "alveary_trainer"], environment)


def _authority(ca: Path | None, ca_data: str) -> str:
    """PEM of the authority that the platform is known by; empty: a public one."""
    if ca and ca_data:
        raise AlvearyError("--ca and --ca-data: one of them", "INVALID_ARGUMENT")
    try:
        pem = ca.read_text() if ca else base64.b64decode(ca_data, altchars=b"-_", validate=True).decode()
    except (OSError, binascii.Error, UnicodeDecodeError) as error:
        raise AlvearyError(f"the platform's certificate cannot be read: {error}", "INVALID_ARGUMENT") from error
    if (ca or ca_data) and "BEGIN CERTIFICATE" not in pem:
        raise AlvearyError(f"{'--ca' if ca else '--ca-data'} holds no certificate in PEM", "INVALID_ARGUMENT")
    return pem


def let_docker_trust(registry: str, ca: Path, folder: Path = Path("/etc/docker/certs.d")) -> None:
    """Let this machine's docker daemon pull from a registry whose certificate an authority of its own signed.

    Docker looks below /etc/docker/certs.d/<host:port>, and asks nobody who it is on the loopback.

    Raises:
        AlvearyError: this user may not write there; the message has the command that may.
    """
    if not registry or _loopback(registry):
        return
    wanted = folder / registry / "ca.crt"
    try:
        if not wanted.exists() or wanted.read_text() != ca.read_text():
            wanted.parent.mkdir(parents=True, exist_ok=True)
            wanted.write_text(ca.read_text())
            print(f"docker on this machine trusts {registry} from now on: {wanted}", flush=True)
    except PermissionError as error:
        raise AlvearyError(
            f"docker on this machine does not trust {registry} yet, and only root can say that it shall: "
            f"sudo install -D -m 644 {shlex.quote(str(ca))} {shlex.quote(str(wanted))}",
            "FAILED_PRECONDITION",
        ) from error
