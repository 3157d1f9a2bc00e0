"""What to run: a script or command of a source directory, and what it needs."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alveary.dataset import Dataset, Input
from alveary.environment import Environment
from alveary.errors import AlvearyError
from alveary.run_options import DockerConfiguration, Resources, Retry, distribution_of
from alveary.unsupported import one_of, refuse_given
from alveary_contracts.common.v1 import common_pb2 as c


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


def _words(given: str | Sequence[Any] | None) -> list[Any]:
    if not isinstance(given, str):
        return list(given or ())
    try:
        return shlex.split(given)
    except ValueError as error:
        raise AlvearyError(f"{given!r} cannot be split into words: {error}; give a list", "INVALID_ARGUMENT") from error


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
    size = one_of(**{"resources.shm_size": resources.shm_size, "shm_size": docker.shm_size})
    return dataclasses.replace(resources, shm_size=size)
