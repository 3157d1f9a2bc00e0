"""What a trainer is told from outside, beside the core settings."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from alveary_core.settings import CoreSettings


class TrainerSettings(CoreSettings):
    """ALVEARY_* variables; see each field."""

    workspace: str = "default"
    target: str = "local"
    # Empty: <target>-<host name>.
    node: str = ""
    # gRPC endpoint and token for what a training script asks of other services (tags, register).
    endpoint: str = ""
    # Where the registry is, if not at `endpoint`.
    registry_endpoint: str = ""
    # Both speak TLS.
    endpoint_tls: bool = False
    node_token: SecretStr = SecretStr("")
    # Which of the machine's GPUs are this node's.
    gpu_offset: int = 0
    # -1: all that the driver shows.
    gpu_count: int = 0
    # Or by index, as JSON: [2, 5]; then the two above do not matter.
    gpu_ids: list[int] = []
    # Cores and bytes that this node gives to runs; 0: all of the machine. Trainers that share a machine share it so.
    node_cpus: float = 0.0
    node_memory_bytes: int = 0
    # What runs may ask of a node, as JSON: {"zone": "a"}.
    node_labels: dict[str, str] = {}
    # How many of the newest entries of a run's ./outputs/checkpoints are kept for its next attempt.
    checkpoints_kept: int = 3
    # By which other nodes reach this one, for runs on several nodes; empty: where connections to the message bus leave from.
    address: str = ""
    # Where environments, snapshots and datasets are kept; empty: state_dir/cache.
    cache_dir: Path | None = None
    # Environments beyond this are evicted, least recently used first.
    environments_bytes: int = 60 * 2**30
    data_bytes: int = 100 * 2**30
    # "process": in virtual environments; "docker": in containers of the daemon that DOCKER_HOST names.
    runtime: Literal["process", "docker"] = "process"
    # User and group of containers; a trainer that is not root gives them its own.
    run_uid: int = 10001
    # The registry that images are named after (host:port), where that asks for a password.
    registry: str = ""
    # host:port at which this node reaches it, where that is another; empty: `registry`.
    registry_at: str = ""
    registry_user: str = ""
    registry_password: SecretStr = SecretStr("")
    # Short and on the same path on the docker host; empty: a folder under the temporary directory.
    sockets_dir: Path | None = None

    def model_post_init(self, _: object) -> None:
        """Fill in the node's name."""
        self.node = self.node or f"{self.target}-{socket.gethostname()}"

    @property
    def gpus(self) -> list[int]:
        """Indexes of the machine's GPUs that this node gives to runs."""
        return self.gpu_ids or list(range(self.gpu_offset, self.gpu_offset + self.gpu_count))
