"""What a run needs and how it is spread: resources, retries, distribution, container; Azure's names for some of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from alveary.errors import AlvearyError, AlvearyWarning
from alveary.unsupported import refuse_given
from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c

Launcher = Literal["plain", "torchrun", "mpi"]
_LAUNCHERS = {"plain": c.LAUNCHER_PLAIN, "torchrun": c.LAUNCHER_TORCHRUN, "mpi": c.LAUNCHER_MPI}
_SIZE_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30}
_BACKENDS = {"nccl": c.COMMUNICATION_BACKEND_NCCL, "gloo": c.COMMUNICATION_BACKEND_GLOO}


@dataclass(frozen=True)
class Resources:
    """What a run needs on each of its nodes; 0: what the target gives.

    Attributes:
        gpus: a whole number, or a part of one GPU (0.001 to 0.999) on targets with gpu_sharing.
        gpu_models: models that will do, as `alveary compute nodes` shows them; empty: any.
        node_labels: labels that a node must have.
        shm_size: of /dev/shm, like "8g"; on platforms that run containers.
    """

    cpus: float = 0
    memory_gb: float = 0
    gpus: float = 0
    gpu_models: Sequence[str] = ()
    node_labels: Mapping[str, str] = field(default_factory=dict)
    shm_size: str | None = None

    def to_proto(self) -> c.Resources:
        """The message, without the labels, which belong to the run.

        Raises:
            AlvearyError: gpus or shm_size cannot be so.
        """
        milli = _gpu_milli(self.gpus)
        return c.Resources(
            cpus=self.cpus,
            memory_bytes=int(self.memory_gb * 2**30),
            gpus=1 if milli else int(self.gpus),
            gpu_milli=milli,
            gpu_models=self.gpu_models,
            shm_bytes=_bytes(self.shm_size),
        )


@dataclass(frozen=True)
class Retry:
    """How often a run is attempted, and which failures are attempted again; a lost node always is.

    Attributes:
        max_attempts: 0: the platform's default.
        on: "exited", "signal", "out_of_memory", "disk_full", "timeout", "staging_failed", "launch_failed", "upload_failed".
        exit_codes: of "exited", only these; empty: all but 0.
        backoff_seconds: before the second attempt; doubles with each.
    """

    max_attempts: int = 0
    on: Sequence[str] = ()
    exit_codes: Sequence[int] = ()
    backoff_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.exit_codes and "exited" not in self.on:
            raise AlvearyError('exit_codes choose among exits: add "exited" to `on`', "INVALID_ARGUMENT")
        self._reasons()

    def _reasons(self) -> list[c.ExitReason.ValueType]:
        try:
            return [exit_reasons.from_word(word) for word in self.on]
        except ValueError as error:
            raise AlvearyError(f"on={list(self.on)}: {error}; see Retry for those that may be retried", "INVALID_ARGUMENT") from error

    def to_proto(self) -> c.RetryPolicy | None:
        """The message; None: only lost nodes are attempted again."""
        if not self.on:
            return None
        return c.RetryPolicy(on=self._reasons(), exit_codes=self.exit_codes, backoff_seconds=self.backoff_seconds)


@dataclass(frozen=True)
class Distribution:
    """How a run is spread over nodes and processes.

    Attributes:
        node_count: nodes, all or none.
        processes_per_node: 0: one.
        launcher: "torchrun"; "mpi"; "plain" starts the program once on each node, where it finds MASTER_ADDR, MASTER_PORT,
            NODE_RANK and NODE_COUNT set; None: torchrun for more than one process on a node, else plain.
        min_node_count: an attempt may begin with as few nodes, with torchrun; 0: all.
        max_restarts: how often torchrun starts all workers again after one of them failed.
        pack_nodes: use as few nodes as will do, rather than each member on its own.
        backend: "nccl" or "gloo"; the script finds it in $ALVEARY_COMMUNICATION_BACKEND.
    """

    node_count: int = 1
    processes_per_node: int = 0
    launcher: Launcher | None = None
    min_node_count: int = 0
    max_restarts: int = 0
    pack_nodes: bool = False
    backend: str | None = None

    def apply(self, spec: c.RunSpec) -> None:
        """Put it into a run's specification.

        Raises:
            AlvearyError: there is no such launcher or backend.
        """
        launcher = self.launcher or ("torchrun" if self.processes_per_node > 1 else None)
        if launcher is not None:
            if launcher not in _LAUNCHERS:
                raise AlvearyError(f"launcher {launcher!r}: 'plain', 'torchrun' or 'mpi'", "INVALID_ARGUMENT")
            spec.launcher = _LAUNCHERS[launcher]
        spec.node_count = self.node_count
        spec.process_count_per_node = self.processes_per_node or 1
        spec.min_node_count = self.min_node_count
        spec.max_restarts = self.max_restarts
        spec.pack_nodes = self.pack_nodes
        if self.backend is not None:
            if self.backend.lower() not in _BACKENDS:
                raise AlvearyError(f"communication backend {self.backend!r}: 'nccl' or 'gloo'", "INVALID_ARGUMENT")
            spec.communication_backend = _BACKENDS[self.backend.lower()]


def distribution_of(config: object, node_count: int = 1, processes_per_node: int = 1) -> Distribution:
    """What `distributed_job_config` or `distributed_training` says, on at least `node_count` nodes.

    Raises:
        AlvearyError: it is none, or it is a Distribution and nodes or processes are given beside it.
    """
    if config is None:
        return Distribution(node_count, processes_per_node)
    if isinstance(config, (MpiConfiguration, PyTorchConfiguration)):
        return config.distribution(node_count, processes_per_node)
    if not isinstance(config, Distribution):
        raise AlvearyError(
            f"{config!r} is not how a run is distributed: use Distribution, PyTorchConfiguration or MpiConfiguration", "INVALID_ARGUMENT"
        )
    if node_count > 1 or processes_per_node > 1:
        raise AlvearyError("a Distribution says how many nodes and processes there are: give them there alone", "INVALID_ARGUMENT")
    return config


class MpiConfiguration:
    """Distributed training with Open MPI's mpirun, as Horovod wants it: `process_count_per_node` on each of `node_count` nodes.

    `node_count` 0 and `process_count_per_node` 0: what the estimator says.
    """

    def __init__(self, process_count_per_node: int = 0, node_count: int = 0) -> None:
        self.process_count_per_node = process_count_per_node
        self.node_count = node_count

    def distribution(self, node_count: int, processes_per_node: int) -> Distribution:
        """As a Distribution, on at least `node_count` nodes."""
        return Distribution(max(node_count, self.node_count), self.process_count_per_node or processes_per_node, "mpi")


class PyTorchConfiguration:
    """Distributed training with torchrun: `process_count` processes in all, spread evenly over `node_count` nodes."""

    def __init__(
        self,
        communication_backend: str | None = None,
        process_count: int | None = None,
        node_count: int = 1,
        *,
        min_node_count: int = 0,
        max_restarts: int = 0,
    ) -> None:
        """
        Args:
            communication_backend: "Nccl" or "Gloo"; the script finds it, in lower case, in $ALVEARY_COMMUNICATION_BACKEND.
            min_node_count: an attempt may begin with as few nodes, each with its share of `process_count` all the same.
            max_restarts: how often all workers are started again after one of them failed.

        Raises:
            AlvearyError: process_count is not a multiple of node_count.
        """
        if process_count is not None and (node_count < 1 or process_count % node_count):
            raise AlvearyError(f"process_count={process_count}: not the same number on each of {node_count} nodes", "INVALID_ARGUMENT")
        self.communication_backend = communication_backend
        self.process_count = process_count
        self.node_count = node_count
        self.min_node_count = min_node_count
        self.max_restarts = max_restarts

    def distribution(self, node_count: int, processes_per_node: int) -> Distribution:
        """As a Distribution, on at least `node_count` nodes."""
        if self.process_count:
            processes_per_node = self.process_count // self.node_count
        return Distribution(
            max(node_count, self.node_count),
            processes_per_node,
            "torchrun",
            self.min_node_count,
            self.max_restarts,
            backend=self.communication_backend,
        )


class DockerConfiguration:
    """How a run's container is made, where the platform runs containers."""

    def __init__(
        self,
        use_docker: bool | None = None,
        shared_volumes: bool = True,
        arguments: Sequence[str] | None = None,
        shm_size: str | None = None,
    ) -> None:
        """
        Args:
            shm_size: of /dev/shm, like "8g".

        Raises:
            AlvearyError: something else was given; the text says what to use.
        """
        warn_of_use_docker(use_docker)
        refuse_given(
            shared_volumes=(None if shared_volumes else False, "containers share no volumes; leave it out"),
            arguments=(arguments or None, "what a container may do is decided by the platform; Resources and shm_size size it"),
        )
        self.shm_size = shm_size


def warn_of_use_docker(use_docker: bool | None) -> None:
    """Say that one run does not choose between containers and processes: notebooks pass it by habit."""
    if use_docker is not None:
        text = "use_docker has no effect: whether runs are in containers is decided where the platform is started"
        warnings.warn(AlvearyWarning(text), stacklevel=3)


def _bytes(size: str | None) -> int:
    """Bytes of "2g", "512m", "1048576"; 0 for None.

    Raises:
        AlvearyError: it is no size.
    """
    if size is None:
        return 0
    found = re.fullmatch(r"(\d+)([bkmg]?)b?", size.lower())
    if not found:
        raise AlvearyError(f"shm_size {size!r}: a number with b, k, m or g", "INVALID_ARGUMENT")
    return int(found[1]) << _SIZE_UNITS[found[2]]


def _gpu_milli(gpus: float) -> int:
    """Thousandths of a GPU of a fraction below one; 0 for a whole number.

    Raises:
        AlvearyError: neither.
    """
    milli = round(gpus * 1000)
    if gpus < 0 or (milli > 1000 and milli % 1000) or (gpus and not milli):
        raise AlvearyError(f"gpus={gpus:g}: a whole number, or a part of one GPU between 0.001 and 0.999", "INVALID_ARGUMENT")
    return milli % 1000
