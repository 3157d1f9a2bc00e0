"""Experiments and their runs: from outside, as what a Workspace knows of them; from inside, as `Run.get_context()`.

This module needs the standard library alone until a run is looked at from outside.
"""

from __future__ import annotations

import builtins
import difflib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alveary import context
from alveary.errors import AlvearyError
from alveary.script_run import ContextRun, OfflineRun
from alveary.submitted_run import SubmittedRun
from alveary.text import quoted
from alveary.unsupported import refuse_given, refuse_model_extras, refuse_run_type

if TYPE_CHECKING:
    from alveary.model import Model
    from alveary.script_run_config import ScriptRunConfig
    from alveary.session import Session


class Run(SubmittedRun):
    """A run that was submitted. `experiment.submit(...)` makes one; `Run(experiment, run_id)` finds one."""

    def __init__(self, experiment: Experiment, run_id: str, outputs: Any = None) -> None:
        """`run_id` may be a unique prefix of an id.

        Raises:
            AlvearyError: it is not a whole id, and no run's begins so, or several do.
        """
        refuse_given(outputs=(outputs, "get_file_names() shows what a run stored"))
        session = experiment.workspace
        super().__init__(session, session._call(session._client.runs.full_id(run_id)))
        self.experiment = experiment

    @staticmethod
    def get_context(allow_offline: bool = True, used_for_context_manager: bool = False) -> Any:
        """The run that this process is part of; outside one, an offline run that prints.

        Raises:
            RuntimeError: outside a run, with allow_offline=False.
        """
        if os.environ.get("ALVEARY_EXPORT"):  # the script is read again for its classes: what it reports is reported already
            return OfflineRun()
        trainer = context.connection()
        if trainer is not None:
            return ContextRun(trainer)
        if not allow_offline:
            raise RuntimeError("this process is not part of a submitted run")
        return OfflineRun()

    @classmethod
    def get(cls, workspace: Session, run_id: str) -> Run:
        """A run by its id, or by a unique prefix of it.

        Raises:
            AlvearyError: no run's id begins so, or several do (the text names them).
        """
        found = workspace._call(workspace._client.runs.get(run_id))
        return cls(Experiment(workspace, found.spec.experiment), found.id)

    @classmethod
    def list(
        cls,
        experiment: Experiment,
        type: str | None = None,
        tags: str | Mapping[str, str | None] | None = None,
        properties: str | Mapping[str, str | None] | None = None,
        status: str | None = None,
        include_children: bool = False,
    ) -> builtins.list[Run]:
        """Runs of an experiment, newest first; see `Experiment.get_runs`."""
        return experiment.get_runs(type, tags, properties, include_children, status)

    def __repr__(self) -> str:
        return f"Run(experiment: {self.experiment.name}, id: {self.id}, status: {self.get_status()})"

    @property
    def parent(self) -> Run | None:
        """The run that it is a child of."""
        found = self._get().spec.parent_run_id
        return Run.get(self._workspace, found) if found else None

    def get_children(
        self,
        recursive: bool = False,
        tags: str | Mapping[str, str | None] | None = None,
        properties: str | Mapping[str, str | None] | None = None,
        type: str | None = None,
        status: str | None = None,
    ) -> builtins.list[Run]:
        """Its child runs that have these tags, properties and state, newest first.

        Args:
            recursive: also the children of its children, whatever those have.
            tags, properties: keys with the values wanted; None, or a key alone: any value.
        """
        refuse_run_type(type)
        wanted = _conditions(tags, properties, status)
        children = find_runs(self._workspace, [f"parent = {quoted(self.id)}"])
        found = find_runs(self._workspace, [f"parent = {quoted(self.id)}", *wanted]) if wanted else children
        if recursive:
            for child in children:
                found = found + child.get_children(True, tags, properties, type, status)
        return found

    def register_model(
        self,
        model_name: str,
        model_path: str | None = None,
        tags: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        model_framework: str | None = None,
        model_framework_version: str | None = None,
        description: str | None = None,
        datasets: Sequence[Any] = (),
        sample_input_dataset: Any = None,
        sample_output_dataset: Any = None,
        resource_configuration: Any = None,
    ) -> Model:
        """Register a file or folder that it stored (default: outputs) as the next version of a model.

        Args:
            datasets: that the model was made of beside the run's inputs: Dataset objects, or pairs of a purpose and one.

        Raises:
            AlvearyError: the run stored no such file, or something given is not offered.
        """
        from alveary.client.models import ModelInfo
        from alveary.dataset import references
        from alveary.model import Model
        from alveary.progress import file_progress

        refuse_model_extras(sample_input_dataset, sample_output_dataset, resource_configuration)
        info = ModelInfo(
            model_name,
            tags or {},
            properties or {},
            description or "",
            model_framework or "",
            model_framework_version or "",
            references(datasets),
        )
        with file_progress(f"copying files of run {self.id}") as progress:
            work = self._workspace._client.models.register_from_run(self.id, model_path or "outputs", info, progress)
            registered = self._call(work)
        return Model._of(self._workspace, registered)


class Experiment:
    """Runs under one name; made by the first run."""

    def __init__(self, workspace: Session, name: str) -> None:
        self.workspace, self.name = workspace, name

    def __repr__(self) -> str:
        return f"Experiment(name: {self.name}, workspace: {self.workspace.name})"

    def submit(self, config: ScriptRunConfig, tags: Mapping[str, str] | None = None) -> Run:
        """Submit a run. What is wrong with it is said here, before anything is queued.

        Raises:
            AlvearyError: it is refused; the text names each fault.
        """
        from alveary.progress import upload_progress

        spec = config._spec()
        _find_script(config)
        spec.experiment = self.name
        spec.tags.update(tags or {})
        client = self.workspace._client
        if spec.use_gpu and self.workspace._config.allow_cpu_fallback:
            from alveary.compute import ComputeTarget

            if not ComputeTarget(self.workspace, spec.compute_target).node_resources.gpus:
                warnings.warn(
                    f"compute target {spec.compute_target!r} has no GPU: the run uses CPUs (allow_cpu_fallback in config.json)",
                    stacklevel=2,
                )
                spec.use_gpu = False
        with upload_progress("source") as progress:
            run = self.workspace._call(client.runs.submit(spec, Path(config.source_directory), progress))
        return Run(self, run.id)

    def start_logging(self, *args: Any, **kwargs: Any) -> None:
        """Not offered: outside a submitted run, `Run.get_context()` gives a run that prints."""
        raise AlvearyError(
            "interactive runs are not offered: submit a script, or use Run.get_context(), which prints when it is offline", "UNIMPLEMENTED"
        )

    def get_runs(
        self,
        type: str | None = None,
        tags: str | Mapping[str, str | None] | None = None,
        properties: str | Mapping[str, str | None] | None = None,
        include_children: bool = False,
        status: str | None = None,
    ) -> builtins.list[Run]:
        """Its runs that have these tags, properties and state, newest first.

        Args:
            tags, properties: keys with the values wanted; None, or a key alone: any value.
            include_children: also runs that are children of others.
        """
        refuse_run_type(type)
        top = [] if include_children else ['parent = ""']
        return find_runs(self.workspace, [f"experiment = {quoted(self.name)}", *_conditions(tags, properties, status), *top])

    @staticmethod
    def list(
        workspace: Session, experiment_name: str | None = None, view_type: str | None = None, tags: Any = None
    ) -> builtins.list[Experiment]:
        """All experiments of a workspace, or the one of this name.

        Raises:
            AlvearyError: view_type or tags was given.
        """
        refuse_given(
            view_type=(None if view_type in ("ActiveOnly", "All") else view_type, "experiments are not archived: all of them are listed"),
            tags=(tags, "experiments have no tags; filter their runs by tags with get_runs"),
        )
        from alveary_contracts.runs.v1 import runs_pb2

        client = workspace._client
        reply = workspace._call(client.call(client.stubs.experiments.ListExperiments, runs_pb2.ListExperimentsRequest()))
        return [Experiment(workspace, e.name) for e in reply.experiments if experiment_name in (None, e.name)]


def find_runs(workspace: Session, conditions: Sequence[str]) -> list[Run]:
    """Runs of a workspace that meet all conditions, in the filter language, newest first."""
    found = workspace._call(workspace._client.runs.list(" AND ".join(conditions)))
    return [Run(Experiment(workspace, run.spec.experiment), run.id) for run in found]


def _conditions(
    tags: str | Mapping[str, str | None] | None, properties: str | Mapping[str, str | None] | None, status: str | None
) -> list[str]:
    conditions = [f"state = {quoted(status)}"] if status else []
    for field, wanted in (("tags", tags), ("properties", properties)):
        for key, value in ({wanted: None} if isinstance(wanted, str) else wanted or {}).items():
            conditions.append(f"{field}.{quoted(key)} " + ('>= ""' if value is None else f"= {quoted(value)}"))
    return conditions


def _find_script(config: ScriptRunConfig) -> None:
    """Look for the script before anything is uploaded.

    Raises:
        AlvearyError: it is not in the source directory; names what is like it.
    """
    source = Path(config.source_directory)
    if not config.script or config.command or Path(config.script).is_absolute() or (source / config.script).is_file():
        return  # the platform says what is wrong with the rest
    files = [str(f.relative_to(source)) for f in source.glob("*.py")] + [str(f.relative_to(source)) for f in source.glob("*/*.py")]
    like = difflib.get_close_matches(config.script, files, 3) or sorted(files)[:3]
    known = f": it has {', '.join(like)}" if like else ", nor any other script"
    raise AlvearyError(f"the source directory {source.absolute()} has no {config.script!r}{known}", "INVALID_ARGUMENT")
