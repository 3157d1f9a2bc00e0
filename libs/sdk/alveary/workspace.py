"""A workspace: where runs, targets, datasets and models live."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from alveary import config
from alveary.errors import AlvearyWarning
from alveary.session import Session

# Each is imported when it is first used: a command that lists runs needs none of the others.
if TYPE_CHECKING:
    from alveary.compute import ComputeTarget
    from alveary.dataset import Dataset
    from alveary.events import Events
    from alveary.model import Model
    from alveary.run import Experiment, Run


class Workspace(Session):
    """A connection to a platform, in one workspace. `Workspace.from_config()` is the usual way to one."""

    @classmethod
    def from_config(cls, path: str | os.PathLike[str] | None = None, auth: Any = None) -> Workspace:
        """From config.json: the one given, or found here, above, or where `alveary up` wrote it.

        Raises:
            AlvearyError: there is none.
        """
        if auth is not None:
            warnings.warn(AlvearyWarning("auth has no effect: config.json holds the token"), stacklevel=2)
        return cls(config.load(path))

    @property
    def compute_targets(self) -> dict[str, ComputeTarget]:
        """Compute targets by name."""
        from alveary.compute import ComputeTarget

        return {t.name: t for t in ComputeTarget.list(self)}

    @property
    def experiments(self) -> dict[str, Experiment]:
        """Experiments by name."""
        from alveary.run import Experiment

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
        """A run by its id, or by a unique prefix of it.

        Raises:
            AlvearyError: no run's id begins so, or several do (the text names them).
        """
        from alveary.run import Run

        return Run.get(self, run_id)

    @property
    def events(self) -> Events:
        """What happens, for automations."""
        from alveary.events import Events

        return Events(self)
