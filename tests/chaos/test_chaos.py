"""A short chaos trial; `make chaos MINUTES=30 SEED=n` makes a long one."""

from __future__ import annotations

import os

import pytest
from chaos import trial


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [int(os.environ.get("ALVEARY_CHAOS_SEED", "1"))])
def test_every_run_ends_once_and_right_whatever_dies(seed: int) -> None:
    report = trial.run(120, seed, most_faults=25)
    print(report.text())
    assert sum(report.faults.values()) >= 20, report.text()
    assert not report.violations, report.text()
