"""A workspace: where runs, targets, datasets and models live."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alveary import _loop, config
from alveary.aio import Client

if TYPE_CHECKING:
    from alveary.compute import ComputeTarget
    from alveary.dataset import Dataset
    from alveary.events import Events
    from alveary.experiment import Experiment
    from alveary.model import Model
    from alveary.run import Run

T = TypeVar("T")


class Workspace:
    """A connection to a platform, in one workspace. `Workspace.from_config()` is the usual way to one."""

    def __init__(self, settings: config.Config) -> None:
        self._config = settings

        async def make() -> Client:
            return Client(settings)

        self._client = _loop.run(make())

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] | None = None, auth: Any = None) -> Workspace:
        """From config.json: the one given, or found here, above, or where `alveary up` wrote it.

        Raises:
            AlvearyError: there is none.
        """
        return cls(config.load(path))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return _loop.run(work)

    def _list(self, condition: str, status: str | None = None, include_children: bool = True) -> list[Run]:
        from alveary.experiment import Experiment
        from alveary.run import Run

        parts = [condition] + ([f"state = {status}"] if status else []) + ([] if include_children else ['parent = ""'])
        runs = self._call(self._client.runs.list(" AND ".join(p for p in parts if p)))
        return [Run(Experiment(self, r.spec.experiment), r.id) for r in runs]

    @property
    def name(self) -> str:
        """Its name."""
        return self._config.workspace

    def get_details(self) -> dict[str, str]:
        """Name, version of the platform, and who the caller is."""
        from alveary_contracts.runs.v1 import runs_pb2

        found = self._call(self._client.call(self._client.stubs.workspaces.GetWorkspace, runs_pb2.GetWorkspaceRequest()))
        return {"name": found.name, "version": found.version, "subject": found.subject, "role": found.role}

    def write_config(self, path: str | None = None, file_name: str = "config.json") -> str:
        """Write .alveary/config.json below `path` (mode 0600: it holds a token); returns the file."""
        folder = Path(path or ".") / ".alveary"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / file_name
        text = config.find(self._config.source).read_text()
        file.touch(mode=0o600)
        file.chmod(0o600)
        file.write_text(text)
        return str(file)

    @property
    def compute_targets(self) -> dict[str, ComputeTarget]:
        """Compute targets by name."""
        from alveary.compute import ComputeTarget

        return {t.name: t for t in ComputeTarget.list(self)}

    @property
    def experiments(self) -> dict[str, Experiment]:
        """Experiments by name."""
        from alveary.experiment import Experiment

        return {e.name: e for e in Experiment.list(self)}

    @property
    def models(self) -> dict[str, Model]:
        """The latest version of each model, by name."""
        from alveary.model import Model

        return {m.name: m for m in Model.list(self, latest=True)}

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The latest version of each dataset, by name."""
        from alveary.dataset import Dataset

        return {d.name: d for d in reversed(Dataset.list(self))}

    def get_run(self, run_id: str) -> Run:
        """A run by its id, or by first characters of it that no other run has."""
        from alveary.run import Run

        return Run.get(self, run_id)

    @property
    def events(self) -> Events:
        """What happens, for automations."""
        from alveary.events import Events

        return Events(self)
