"""Estimators: training scripts with their parameters and packages, with Azure ML's parameter names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alveary.environment import Environment
from alveary.errors import AlvearyError
from alveary.requirements import requirements_of
from alveary.run_options import MpiConfiguration, PyTorchConfiguration, Resources, distribution_of, warn_of_use_docker
from alveary.script_run_config import ScriptRunConfig
from alveary.unsupported import one_of, refuse_given

# What a PyTorch run has without asking. The ONNX packages are there so that its models export in this very image.
PYTORCH_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript")


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
        warn_of_use_docker(use_docker)
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
            "requirements": one_of(pip_requirements_file=pip_requirements_file, pip_requirements_file_path=pip_requirements_file_path),
            "base_image": one_of(custom_docker_image=custom_docker_image, custom_docker_base_image=custom_docker_base_image),
            "environment_variables": environment_variables,
            "framework_version": framework_version,
        }
        given = [name for name, value in packages.items() if value]
        if environment_definition is not None and given:
            raise AlvearyError(
                f"environment_definition says which packages and variables there are: give it {', '.join(given)} as well, or leave it out",
                "INVALID_ARGUMENT",
            )
        if shm_size:
            options["resources"] = dataclasses.replace(options.get("resources") or Resources(), shm_size=shm_size)
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


def _arguments(script_params: Mapping[str, Any]) -> list[Any]:
    arguments: list[Any] = []
    for flag, value in script_params.items():
        arguments += [flag] if value in ("", None) else [flag, value]
    return arguments


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
