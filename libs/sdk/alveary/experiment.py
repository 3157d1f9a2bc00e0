"""An experiment: runs under one name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alveary.errors import AlvearyError
from alveary.run import Run
from alveary.text import quoted

if TYPE_CHECKING:
    from alveary.estimator import Estimator, ScriptRunConfig
    from alveary.workspace import Workspace


class Experiment:
    """Runs under one name; made by the first run."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace, self.name = workspace, name

    def __repr__(self) -> str:
        return f"Experiment(name: {self.name}, workspace: {self.workspace.name})"

    def submit(self, config: Estimator | ScriptRunConfig, tags: Mapping[str, str] | None = None, **kwargs: Any) -> Run:
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
        self, type: str | None = None, tags: Any = None, properties: Mapping[str, str] | None = None, include_children: bool = False,
        status: str | None = None,
    ) -> list[Run]:  # fmt: skip
        """Its runs, newest first."""
        conditions = [f"experiment = {quoted(self.name)}"]
        wanted = {tags: None} if isinstance(tags, str) else dict(tags or {})
        conditions += [f"tags.{quoted(k)} = {quoted(v)}" if v is not None else f'tags.{quoted(k)} >= ""' for k, v in wanted.items()]
        conditions += [f"properties.{quoted(k)} = {quoted(v)}" for k, v in (properties or {}).items()]
        return self.workspace._list(" AND ".join(conditions), status, include_children)

    @staticmethod
    def list(workspace: Workspace, experiment_name: str | None = None, **_: Any) -> list[Experiment]:
        """All experiments of a workspace."""
        from alveary_contracts.runs.v1 import runs_pb2

        reply = workspace._call(workspace._client.call(workspace._client.stubs.experiments.ListExperiments, runs_pb2.ListExperimentsRequest()))
        return [Experiment(workspace, e.name) for e in reply.experiments if experiment_name in (None, e.name)]


def _find_script(config: Estimator | ScriptRunConfig) -> None:
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
