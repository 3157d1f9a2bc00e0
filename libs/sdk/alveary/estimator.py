"""What to run: estimators and script configurations, with Azure ML's parameter names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alveary.dataset import Dataset, Input
from alveary.environment import Environment
from alveary.errors import AlvearyError
from alveary.requirements import requirements_of
from alveary_contracts.common.v1 import common_pb2 as c

# What a PyTorch run has without asking. The ONNX packages are there so that its models export in this very image.
PYTORCH_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript")


class MpiConfiguration:
    """Distributed training with Open MPI's mpirun, as Horovod wants it: `process_count_per_node` on each of `node_count` nodes.

    `node_count` 0 and `process_count_per_node` 0: what the estimator says.
    """

    def __init__(self, process_count_per_node: int = 0, node_count: int = 0) -> None:
        self.process_count_per_node, self.node_count = process_count_per_node, node_count


class PyTorchConfiguration:
    """Distributed training with torchrun: `process_count` processes in all, spread evenly over `node_count` nodes.

    `min_node_count`: an attempt may begin with as few nodes, each with its share of `process_count` all the same.
    `max_restarts`: how often all workers are started anew after one of them failed.
    """

    def __init__(
        self, communication_backend: str = "Nccl", process_count: int | None = None, node_count: int = 1, *, min_node_count: int = 0,
        max_restarts: int = 0,
    ) -> None:  # fmt: skip
        if process_count is not None and (node_count < 1 or process_count % node_count):
            raise AlvearyError(f"process_count={process_count}: not the same number on each of {node_count} nodes", "INVALID_ARGUMENT")
        self.communication_backend, self.process_count, self.node_count = communication_backend, process_count, node_count
        self.min_node_count, self.max_restarts = min_node_count, max_restarts


class DockerConfiguration:
    """How a run's container is made, where the platform runs containers."""

    def __init__(
        self, use_docker: bool = True, shared_volumes: bool = True, arguments: Sequence[str] | None = None, shm_size: str | None = None
    ) -> None:
        if arguments:
            raise AlvearyError(
                "arguments of docker run are not taken: what a container may do is the platform's to say", "INVALID_ARGUMENT"
            )
        self.use_docker, self.shared_volumes, self.shm_size = use_docker, shared_volumes, shm_size


def _bytes(size: str | None) -> int:
    """Bytes of "2g", "512m", "1048576"; 0 for None.

    Raises:
        AlvearyError: it is no size.
    """
    found = re.fullmatch(r"(\d+)([bkmg]?)b?", size.lower()) if size else None
    if size and not found:
        raise AlvearyError(f"shm_size {size!r}: a number with b, k, m or g", "INVALID_ARGUMENT")
    return int(found[1]) << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30}[found[2]] if found else 0


def _gpu_milli(gpus: float) -> int:
    """Thousandths of a GPU of a fraction below one; 0 for a whole number.

    Raises:
        AlvearyError: neither.
    """
    milli = round(gpus * 1000)
    if gpus < 0 or (milli > 1000 and milli % 1000) or (gpus and not milli):
        raise AlvearyError(f"gpus={gpus:g}: a whole number, or a part of one GPU between 0.001 and 0.999", "INVALID_ARGUMENT")
    return milli % 1000


@dataclass
class RetryPolicy:
    """Which failures are attempted again, up to `max_attempts`; a lost node always is.

    `on`: "exited", "signal", "out_of_memory", "disk_full", "timeout", "staging_failed", "launch_failed", "upload_failed". `exit_codes`:
    of "exited", only these (empty: all but 0). `backoff_seconds` before the second attempt; doubles with each.
    """

    on: Sequence[str] = ("exited",)
    exit_codes: Sequence[int] = ()
    backoff_seconds: float = 10.0


class ScriptRunConfig:
    """A script or command of a source directory, and what it needs."""

    def __init__(
        self, source_directory: str, script: str | None = None, arguments: Sequence[Any] | None = None, run_config: Any = None,
        compute_target: Any = "local", environment: Environment | None = None, distributed_job_config: Any = None,
        resume_from: Any = None, max_run_duration_seconds: float | None = None, command: Sequence[str] | None = None,
        docker_runtime_config: Any = None, *, cpus: float = 0, memory_gb: float = 0, gpus: float = 0, use_gpu: bool = False,
        priority: int = 0, max_attempts: int = 0, inputs: Sequence[Any] = (), display_name: str = "",
        properties: Mapping[str, str] | None = None, grace_seconds: float = 0, parent_run_id: str = "", shm_size: str | None = None,
        gpu_models: Sequence[str] = (), node_labels: Mapping[str, str] | None = None,
        retry: RetryPolicy | None = None, node_count: int = 1, pack_nodes: bool = False,
    ) -> None:  # fmt: skip
        """`gpus` of each node; less than 1 (say 0.5) is a part of one, on targets with gpu_sharing. `gpu_models`: those that will do.

        `node_count` without a `distributed_job_config`: the program is started once on each node, which finds MASTER_ADDR,
        MASTER_PORT, NODE_RANK and NODE_COUNT set. `pack_nodes`: as few nodes as will do, rather than each share on its own.
        `resume_from`: a run, or its id, whose newest checkpoints the script finds in `run.resume_path`.
        `priority` below 0 gives way to runs at 0 and above: the run is stopped and attempted again when there is room.
        """
        if isinstance(docker_runtime_config, DockerConfiguration):
            shm_size = shm_size or docker_runtime_config.shm_size
        elif docker_runtime_config is not None:
            raise AlvearyError("docker_runtime_config: use a DockerConfiguration", "INVALID_ARGUMENT")
        if run_config is not None:
            raise AlvearyError("run_config is not offered by this version", "UNIMPLEMENTED")
        self.resume_from = str(getattr(resume_from, "id", resume_from or ""))
        if not Path(source_directory).is_dir():
            raise AlvearyError(f"source_directory {source_directory!r} is not a folder", "INVALID_ARGUMENT")
        self.source_directory = source_directory
        self.script, self.arguments, self.command = script, list(arguments or []), list(command or [])
        self.compute_target, self.environment = compute_target, environment or Environment("empty")
        self.distributed, self.max_run_duration_seconds = distributed_job_config, max_run_duration_seconds
        milli = _gpu_milli(gpus)
        self.resources = c.Resources(
            cpus=cpus, memory_bytes=int(memory_gb * 2**30), gpus=1 if milli else int(gpus), shm_bytes=_bytes(shm_size), gpu_milli=milli,
            gpu_models=gpu_models,
        )  # fmt: skip
        self.node_labels, self.retry, self.pack_nodes = dict(node_labels or {}), retry, pack_nodes
        self.use_gpu, self.priority, self.max_attempts, self.display_name = use_gpu, priority, max_attempts, display_name
        self.inputs, self.properties, self.grace_seconds, self.parent_run_id = (
            list(inputs),
            dict(properties or {}),
            grace_seconds,
            parent_run_id,
        )
        self.process_count_per_node, self.node_count = 1, node_count

    def _spec(self) -> c.RunSpec:
        target = getattr(self.compute_target, "name", self.compute_target)
        spec = c.RunSpec(
            entry_script=self.script or "", command=self.command, environment=self.environment._proto(), compute_target=target,
            resources=self.resources, max_run_duration_seconds=self.max_run_duration_seconds or 0, use_gpu=self.use_gpu,
            priority=self.priority, max_attempts=self.max_attempts, display_name=self.display_name, properties=self.properties,
            grace_seconds=self.grace_seconds, process_count_per_node=self.process_count_per_node, node_count=self.node_count,
            parent_run_id=self.parent_run_id, node_labels=self.node_labels,
            resume_from=self.resume_from, pack=self.pack_nodes,
        )  # fmt: skip
        if self.retry is not None:
            policy = self.retry
            spec.retry.CopyFrom(c.RetryPolicy(on=policy.on, exit_codes=policy.exit_codes, backoff_seconds=policy.backoff_seconds))
        self._distribute(spec)
        inputs = [_as_input(i) for i in self.inputs]
        for argument in self.arguments:
            if isinstance(argument, (Dataset, Input)):
                one = _as_input(argument)
                inputs.append(one)
                spec.arguments.append(f"{{inputs.{one.name}}}")
            else:
                spec.arguments.append(str(argument))
        unique = {i.name: i for i in inputs}
        spec.inputs.extend(c.InputDataset(name=i.name, dataset=i.dataset.name, version=i.dataset.version) for i in unique.values())
        return spec

    def _distribute(self, spec: c.RunSpec) -> None:
        match self.distributed:
            case MpiConfiguration() as mpi:
                spec.launcher = c.LAUNCHER_MPI
                spec.node_count = max(spec.node_count, mpi.node_count)
                spec.process_count_per_node = mpi.process_count_per_node or spec.process_count_per_node
            case PyTorchConfiguration() as torch:
                spec.launcher = c.LAUNCHER_TORCHRUN
                spec.node_count = max(spec.node_count, torch.node_count)
                if torch.process_count:
                    spec.process_count_per_node = torch.process_count // torch.node_count
                spec.min_node_count, spec.max_restarts = torch.min_node_count, torch.max_restarts
            case None:
                if spec.process_count_per_node > 1:
                    spec.launcher = c.LAUNCHER_TORCHRUN
            case other:
                raise AlvearyError(
                    f"distributed_training: {other!r} is neither PyTorchConfiguration nor MpiConfiguration", "INVALID_ARGUMENT"
                )


def _as_input(value: Any) -> Input:
    if isinstance(value, Dataset):
        return value.as_mount()
    if isinstance(value, Input):
        return value
    raise AlvearyError(f"inputs: {value!r} is no dataset: use Dataset.get_by_name(...) or Dataset.upload(...)", "INVALID_ARGUMENT")


class Estimator(ScriptRunConfig):
    """A training script with its parameters and packages."""

    _packages: tuple[str, ...] = ()

    def __init__(
        self, source_directory: str, *, compute_target: Any = "local", vm_size: str | None = None, vm_priority: str | None = None,
        entry_script: str | None = None, script_params: Mapping[str, Any] | None = None, node_count: int = 1,
        process_count_per_node: int = 1, distributed_backend: str | None = None, distributed_training: Any = None,
        use_gpu: bool = False, use_docker: bool = True, custom_docker_base_image: str | None = None,
        custom_docker_image: str | None = None, image_registry_details: Any = None, user_managed: bool = False,
        conda_packages: Sequence[str] | None = None, pip_packages: Sequence[str] | None = None,
        conda_dependencies_file_path: str | None = None, pip_requirements_file_path: str | None = None,
        conda_dependencies_file: str | None = None, pip_requirements_file: str | None = None,
        environment_variables: Mapping[str, str] | None = None, environment_definition: Environment | None = None,
        inputs: Sequence[Any] | None = None, source_directory_data_store: Any = None, shm_size: str | None = None,
        resume_from: Any = None, max_run_duration_seconds: float | None = None, framework_version: str | None = None,
        **extra: Any,
    ) -> None:  # fmt: skip
        refused = {
            "vm_size": (vm_size, "create a compute target and name it in compute_target"),
            "vm_priority": (vm_priority, "it is a property of compute targets"),
            "image_registry_details": (image_registry_details, "give the platform its credentials once, with `alveary image login`"),
            "conda_dependencies_file_path": (conda_dependencies_file_path, "use conda_packages and pip_packages"),
            "conda_dependencies_file": (conda_dependencies_file, "use conda_packages and pip_packages"),
            "source_directory_data_store": (source_directory_data_store, "sources are uploaded as snapshots; use inputs for data"),
        }  # fmt: skip
        for name, (value, instead) in refused.items():
            if value is not None:
                raise AlvearyError(f"{name} is not offered: {instead}", "UNIMPLEMENTED")
        if distributed_backend not in (None, "mpi", "gloo", "nccl"):
            raise AlvearyError(f"distributed_backend {distributed_backend!r}: 'gloo', 'nccl' or 'mpi'", "INVALID_ARGUMENT")
        if distributed_backend == "mpi":
            distributed_training = distributed_training or MpiConfiguration()
        elif distributed_backend and distributed_training is None:
            distributed_training = PyTorchConfiguration(distributed_backend)
        if environment_definition is None:
            packages = [] if user_managed else list(self._framework(framework_version))
            requirements = pip_requirements_file or pip_requirements_file_path
            if requirements:
                file = Path(source_directory, requirements)
                packages += requirements_of(file if file.exists() else Path(requirements))
            packages += pip_packages or []
            environment_definition = Environment(
                type(self).__name__, packages, environment_variables=environment_variables, user_managed=user_managed,
                conda_packages=conda_packages or (), base_image=custom_docker_base_image or custom_docker_image or "",
            )  # fmt: skip
        elif (
            pip_packages
            or conda_packages
            or custom_docker_base_image
            or custom_docker_image
            or pip_requirements_file
            or environment_variables
        ):
            raise AlvearyError(
                "environment_definition already says which packages and variables there are: give them there", "INVALID_ARGUMENT"
            )
        arguments: list[Any] = []
        for flag, value in (script_params or {}).items():
            arguments += [flag] if value in ("", None) else [flag, value]
        super().__init__(
            source_directory, entry_script, arguments, None, compute_target, environment_definition, distributed_training,
            resume_from, max_run_duration_seconds, use_gpu=use_gpu, inputs=inputs or (), shm_size=shm_size, **extra,
        )  # fmt: skip
        self.node_count = max(node_count, getattr(distributed_training, "node_count", 1))
        self.process_count_per_node = process_count_per_node

    def _framework(self, version: str | None) -> Sequence[str]:
        if version is not None:
            raise AlvearyError("framework_version belongs to PyTorch: name the package in pip_packages", "INVALID_ARGUMENT")
        return self._packages


class PyTorch(Estimator):
    """A PyTorch training script. torch and torchvision are there; `pip_packages` adds to them."""

    _packages = PYTORCH_PACKAGES

    def _framework(self, version: str | None) -> Sequence[str]:
        if version is None:
            return self._packages
        return (f"torch=={version}", *self._packages[1:])
