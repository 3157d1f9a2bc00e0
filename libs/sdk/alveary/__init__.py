"""Alveary: train PyTorch models at scale and register them.

Importing this package needs the standard library alone, so that `from alveary import Run` works inside every
training environment; what talks to the platform is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alveary.compute import AmlCompute as AmlCompute
    from alveary.compute import ComputeTarget as ComputeTarget
    from alveary.compute import Quota as Quota
    from alveary.dataset import Dataset as Dataset
    from alveary.environment import Environment as Environment
    from alveary.errors import AlvearyError as AlvearyError
    from alveary.errors import AlvearyWarning as AlvearyWarning
    from alveary.errors import ComputeTargetException as ComputeTargetException
    from alveary.errors import RunFailedException as RunFailedException
    from alveary.estimator import Estimator as Estimator
    from alveary.estimator import PyTorch as PyTorch
    from alveary.model import Model as Model
    from alveary.run import Experiment as Experiment
    from alveary.run import Run as Run
    from alveary.run_options import Distribution as Distribution
    from alveary.run_options import DockerConfiguration as DockerConfiguration
    from alveary.run_options import MpiConfiguration as MpiConfiguration
    from alveary.run_options import PyTorchConfiguration as PyTorchConfiguration
    from alveary.run_options import Resources as Resources
    from alveary.run_options import Retry as Retry
    from alveary.script_run_config import ScriptRunConfig as ScriptRunConfig
    from alveary.workspace import Workspace as Workspace

__version__ = "0.1.0"

_HOME = {
    "AlvearyError": "errors",
    "AlvearyWarning": "errors",
    "AmlCompute": "compute",
    "ComputeTarget": "compute",
    "Quota": "compute",
    "Distribution": "run_options",
    "Resources": "run_options",
    "Retry": "run_options",
    "ComputeTargetException": "errors",
    "Dataset": "dataset",
    "DockerConfiguration": "run_options",
    "Environment": "environment",
    "Estimator": "estimator",
    "Experiment": "run",
    "Model": "model",
    "MpiConfiguration": "run_options",
    "PyTorch": "estimator",
    "PyTorchConfiguration": "run_options",
    "Run": "run",
    "RunFailedException": "errors",
    "ScriptRunConfig": "script_run_config",
    "Workspace": "workspace",
}
__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alveary' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"alveary.{_HOME[name]}"), name)
    globals()[name] = value
    return value
