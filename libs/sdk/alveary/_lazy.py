"""Modules that are imported when something of theirs is used. Standard library alone."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module: its attributes are the module's, which is imported with the first of them.

    Generated contracts and what they import cost milliseconds each; a command that lists runs needs two of a dozen.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
