"""What to run: estimators and script configurations, with Azure ML's parameter names."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alveary.dataset import Dataset, Input
from alveary.environment import Environment
from alveary.errors import AlvearyError
from alveary.requirements import requirements_of
from alveary.run_options import (
    DockerConfiguration,
    MpiConfiguration,
    PyTorchConfiguration,
    Resources,
    Retry,
    distribution_of,
    refuse_use_docker,
)
from alveary.unsupported import refuse_given
from alveary_contracts.common.v1 import common_pb2 as c

# What a PyTorch run has without asking. The ONNX packages are there so that its models export in this very image.
PYTORCH_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript")


class ScriptRunConfig:
    """A script or command of a source directory, and what it needs."""

    def __init__(
        self,
        source_directory: str,
        script: str | None = None,
        arguments: str | Sequence[Any] | None = None,
        run_config: Any = None,
        compute_target: Any = "local",
        environment: Environment | None = None,
        distributed_job_config: Any = None,
        resume_from: Any = None,
        max_run_duration_seconds: float | None = None,
        command: str | Sequence[str] | None = None,
        docker_runtime_config: Any = None,
        *,
        resources: Resources | None = None,
        retry: Retry | None = None,
        inputs: Sequence[Any] = (),
        use_gpu: bool = False,
        priority: int = 0,
        display_name: str = "",
        properties: Mapping[str, str] | None = None,
        grace_seconds: float = 0,
        parent_run_id: str = "",
    ) -> None:
        """The parameters before the star are Azure's.

        Args:
            arguments: of the script; datasets among them become paths. Text is split as a shell would.
            compute_target: a target or its name.
            distributed_job_config: a Distribution, PyTorchConfiguration or MpiConfiguration.
            resume_from: a run, or its id, whose newest checkpoints the script finds in `run.resume_path`.
            command: a program with its arguments, in place of a script.
            inputs: datasets that the run finds in $ALVEARY_INPUT_<NAME>.
            priority: a run below 0 gives way to runs at 0 and above: it is stopped, and attempted again when there is room.
            grace_seconds: what a run that is told to end has for saving; 0: the platform's default.

        Raises:
            AlvearyError: something given is not offered, or cannot be so.
        """
        refuse_given(run_config=(run_config, "give environment, compute_target and resources to ScriptRunConfig itself"))
        if not Path(source_directory).is_dir():
            raise AlvearyError(f"source_directory {source_directory!r} is not a folder", "INVALID_ARGUMENT")
        self.source_directory = source_directory
        self.script = script
        self.arguments = _words(arguments)
        self.command = _words(command)
        self.compute_target = compute_target
        self.environment = environment or Environment("empty")
        self.distribution = distribution_of(distributed_job_config)
        self.resume_from = str(getattr(resume_from, "id", resume_from or ""))
        self.max_run_duration_seconds = max_run_duration_seconds
        self.resources = _with_container(resources or Resources(), docker_runtime_config)
        self.resources.to_proto()  # what is wrong with it is said here
        self.retry = retry or Retry()
        self.inputs = list(inputs)
        self.use_gpu = use_gpu
        self.priority = priority
        self.display_name = display_name
        self.properties = dict(properties or {})
        self.grace_seconds = grace_seconds
        self.parent_run_id = parent_run_id

    def _spec(self) -> c.RunSpec:
        """The specification that is submitted."""
        spec = c.RunSpec(
            entry_script=self.script or "",
            command=self.command,
            environment=self.environment._proto(),
            compute_target=getattr(self.compute_target, "name", self.compute_target),
            resources=self.resources.to_proto(),
            node_labels=self.resources.node_labels,
            max_run_duration_seconds=self.max_run_duration_seconds or 0,
            use_gpu=self.use_gpu,
            priority=self.priority,
            max_attempts=self.retry.max_attempts,
            retry=self.retry.to_proto(),
            display_name=self.display_name,
            properties=self.properties,
            grace_seconds=self.grace_seconds,
            parent_run_id=self.parent_run_id,
            resume_from=self.resume_from,
        )
        self.distribution.apply(spec)
        self._add_inputs(spec)
        return spec

    def _add_inputs(self, spec: c.RunSpec) -> None:
        inputs = [_as_input(one) for one in self.inputs]
        for argument in self.arguments:
            if isinstance(argument, (Dataset, Input)):
                one = _as_input(argument)
                inputs.append(one)
                spec.arguments.append(f"{{inputs.{one.name}}}")
            else:
                spec.arguments.append(str(argument))
        unique = {one.name: one for one in inputs}
        spec.inputs.extend(c.InputDataset(name=one.name, dataset=one.dataset.name, version=one.dataset.version) for one in unique.values())


class Estimator(ScriptRunConfig):
    """A training script with its parameters and packages."""

    _packages: tuple[str, ...] = ()

    def __init__(
        self,
        source_directory: str,
        *,
        compute_target: Any = "local",
        vm_size: str | None = None,
        vm_priority: str | None = None,
        entry_script: str | None = None,
        script_params: Mapping[str, Any] | None = None,
        node_count: int = 1,
        process_count_per_node: int = 1,
        distributed_backend: str | None = None,
        distributed_training: Any = None,
        use_gpu: bool = False,
        use_docker: bool | None = None,
        custom_docker_base_image: str | None = None,
        custom_docker_image: str | None = None,
        image_registry_details: Any = None,
        user_managed: bool = False,
        conda_packages: Sequence[str] | None = None,
        pip_packages: Sequence[str] | None = None,
        conda_dependencies_file_path: str | None = None,
        pip_requirements_file_path: str | None = None,
        conda_dependencies_file: str | None = None,
        pip_requirements_file: str | None = None,
        environment_variables: Mapping[str, str] | None = None,
        environment_definition: Environment | None = None,
        inputs: Sequence[Any] | None = None,
        source_directory_data_store: Any = None,
        shm_size: str | None = None,
        resume_from: Any = None,
        max_run_duration_seconds: float | None = None,
        framework_version: str | None = None,
        **options: Any,
    ) -> None:
        """The parameters are Azure's; `options` are those that ScriptRunConfig has beside Azure's.

        Args:
            distributed_backend: "mpi", or "gloo" or "nccl" for torchrun; in place of distributed_training.
            pip_requirements_file: in the source directory or here.

        Raises:
            AlvearyError: something given is not offered, contradicts something else, or cannot be so.
        """
        refuse_use_docker(use_docker)
        refuse_given(
            vm_size=(vm_size, "create a compute target and name it in compute_target"),
            vm_priority=(vm_priority, "it is a property of compute targets"),
            image_registry_details=(image_registry_details, "give the platform its credentials once, with `alveary image login`"),
            conda_dependencies_file_path=(conda_dependencies_file_path, "use conda_packages and pip_packages"),
            conda_dependencies_file=(conda_dependencies_file, "use conda_packages and pip_packages"),
            source_directory_data_store=(source_directory_data_store, "sources are uploaded as snapshots; use inputs for data"),
        )
        packages: dict[str, Any] = {
            "user_managed": user_managed,
            "conda_packages": conda_packages,
            "pip_packages": pip_packages,
            "requirements": _one_of(pip_requirements_file=pip_requirements_file, pip_requirements_file_path=pip_requirements_file_path),
            "base_image": _one_of(custom_docker_image=custom_docker_image, custom_docker_base_image=custom_docker_base_image),
            "environment_variables": environment_variables,
            "framework_version": framework_version,
        }
        given = [name for name, value in packages.items() if value]
        if environment_definition is not None and given:
            raise AlvearyError(
                f"environment_definition says which packages and variables there are: give it {', '.join(given)} as well, or leave it out",
                "INVALID_ARGUMENT",
            )
        super().__init__(
            source_directory,
            entry_script,
            _arguments(script_params or {}),
            compute_target=compute_target,
            environment=environment_definition or self._environment(source_directory, **packages),
            distributed_job_config=distribution_of(
                _distributed(distributed_backend, distributed_training), node_count, process_count_per_node
            ),
            resume_from=resume_from,
            max_run_duration_seconds=max_run_duration_seconds,
            docker_runtime_config=DockerConfiguration(shm_size=shm_size) if shm_size else None,
            use_gpu=use_gpu,
            inputs=inputs or (),
            **options,
        )

    def _environment(
        self,
        source_directory: str,
        *,
        user_managed: bool,
        conda_packages: Sequence[str] | None,
        pip_packages: Sequence[str] | None,
        requirements: str | None,
        base_image: str | None,
        environment_variables: Mapping[str, str] | None,
        framework_version: str | None,
    ) -> Environment:
        framework = self._framework(framework_version)
        if user_managed and framework_version:
            raise AlvearyError("user_managed uses what is there: leave framework_version out", "INVALID_ARGUMENT")
        packages = [] if user_managed else [*framework]
        if requirements:
            file = Path(source_directory, requirements)
            packages += requirements_of(file if file.exists() else Path(requirements))
        return Environment(
            type(self).__name__,
            [*packages, *(pip_packages or ())],
            environment_variables=environment_variables,
            user_managed=user_managed,
            conda_packages=conda_packages or (),
            base_image=base_image or "",
        )

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


def _words(given: str | Sequence[Any] | None) -> list[Any]:
    return shlex.split(given) if isinstance(given, str) else list(given or ())


def _arguments(script_params: Mapping[str, Any]) -> list[Any]:
    arguments: list[Any] = []
    for flag, value in script_params.items():
        arguments += [flag] if value in ("", None) else [flag, value]
    return arguments


def _as_input(value: Any) -> Input:
    if isinstance(value, Dataset):
        return value.as_mount()
    if isinstance(value, Input):
        return value
    raise AlvearyError(f"inputs: {value!r} is no dataset: use Dataset.get_by_name(...) or Dataset.upload(...)", "INVALID_ARGUMENT")


def _with_container(resources: Resources, docker: object) -> Resources:
    """Resources with what a DockerConfiguration says.

    Raises:
        AlvearyError: it is no DockerConfiguration, or both say how large /dev/shm is.
    """
    if docker is None:
        return resources
    if not isinstance(docker, DockerConfiguration):
        raise AlvearyError("docker_runtime_config: use a DockerConfiguration", "INVALID_ARGUMENT")
    size = _one_of(**{"resources.shm_size": resources.shm_size, "shm_size": docker.shm_size})
    return dataclasses.replace(resources, shm_size=size)


def _distributed(backend: str | None, training: Any) -> Any:
    """How a run is distributed, of Azure's two parameters for it.

    Raises:
        AlvearyError: both were given, or there is no such backend.
    """
    if backend is None:
        return training
    if training is not None:
        raise AlvearyError("distributed_training says how: leave distributed_backend out", "INVALID_ARGUMENT")
    if backend == "mpi":
        return MpiConfiguration()
    if backend not in ("gloo", "nccl"):
        raise AlvearyError(f"distributed_backend {backend!r}: 'gloo', 'nccl' or 'mpi'", "INVALID_ARGUMENT")
    return PyTorchConfiguration(backend)


def _one_of(**given: str | None) -> str | None:
    """The one of several names for the same that was given.

    Raises:
        AlvearyError: several were.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise AlvearyError(f"{' and '.join(found)} are the same: give one of them", "INVALID_ARGUMENT")
    return next(iter(found.values()), None)
