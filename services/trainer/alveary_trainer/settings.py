"""Settings of a trainer, beside the core settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from alveary_core.settings import CoreSettings


class TrainerSettings(CoreSettings):
    """Of a trainer."""

    # Workspace of the target.
    workspace: str = "default"
    # Compute target that the node belongs to.
    target: str = "local"
    # Name of the node; empty: <target>-<host name>.
    node: str = ""
    # gRPC endpoint for what a training script asks of other services (tags, register).
    endpoint: str = ""
    # gRPC endpoint of the registry, if not `endpoint`.
    registry_endpoint: str = ""
    # Whether both endpoints speak TLS.
    endpoint_tls: bool = False
    # Token for these calls.
    node_token: SecretStr = SecretStr("")
    # Index of the first of the machine's GPUs that this node gives to runs.
    gpu_offset: int = 0
    # Number of GPUs from there; -1: all that the driver shows.
    gpu_count: int = 0
    # The GPUs by index, as JSON ([2, 5]); takes precedence over offset and count.
    gpu_ids: list[int] = []
    # Cores that this node gives to runs; 0: all of the machine. Trainers that share a machine divide it with this.
    node_cpus: float = 0.0
    # Bytes of memory that this node gives to runs; 0: all of the machine.
    node_memory_bytes: int = 0
    # Labels that runs may ask for, as JSON: {"zone": "a"}.
    node_labels: dict[str, str] = {}
    # Number of the newest entries of a run's ./outputs/checkpoints that are kept for its next attempt.
    checkpoints_kept: int = 3
    # Address by which other nodes reach this one; empty: the one from which connections to the message bus leave.
    address: str = ""
    # Folder of environments, snapshots and datasets; empty: state_dir/cache.
    cache_dir: Path | None = None
    # Bytes of environments; beyond them, the least recently used are evicted.
    environments_bytes: int = 60 * 2**30
    # Bytes of snapshots, datasets and models, likewise.
    data_bytes: int = 100 * 2**30
    # "process": in virtual environments; "docker": in containers of the daemon that DOCKER_HOST names.
    runtime: Literal["process", "docker"] = "process"
    # User and group of containers; a trainer that is not root gives them its own.
    run_uid: int = 10001
    # host:port of the registry that images are named after, if it asks for a password.
    registry: str = ""
    # host:port at which this node reaches that registry; empty: `registry`.
    registry_at: str = ""
    # User of that registry.
    registry_user: str = ""
    # Password of that user.
    registry_password: SecretStr = SecretStr("")
    # Folder of sockets: a short path, the same on the docker host; empty: a folder below the temporary directory.
    sockets_dir: Path | None = None

    def model_post_init(self, _: object) -> None:
        """Fill in the node's name."""
        self.node = self.node or f"{self.target}-{socket.gethostname()}"

    @property
    def gpus(self) -> list[int]:
        """Indexes of the machine's GPUs that this node gives to runs."""
        return self.gpu_ids or list(range(self.gpu_offset, self.gpu_offset + self.gpu_count))
