"""What trainers on this machine would use of its control groups, for `alveary doctor`."""

from __future__ import annotations

from alveary_trainer.adapters.cgroups import describe


def sentences() -> list[str]:
    """One for each thing that they are used for: how, or what is done instead and why."""
    return describe().sentences()
