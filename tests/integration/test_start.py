"""Starts of a stack that fail, and how far those that take long are."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from alveary.local.replay import positions, slowest


@pytest.mark.slow
@pytest.mark.parametrize("detached", [[], ["--detach"]])
def test_a_process_that_ends_again_and_again_is_named_with_what_it_said_last(tmp_path: Path, detached: list[str]) -> None:
    command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(tmp_path / "s"), "--port", "0", *detached]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"ALVEARY_LOG_LEVEL": "nonsense"})
    assert done.returncode == 1
    assert "control ended 5 times" in done.stderr and "has no attribute 'NONSENSE'" in done.stderr
    assert 'File "' not in done.stderr.split("ends with:")[0], "the reason comes from the process's log, not from a traceback of ours"
    assert not (tmp_path / "s/status.json").exists(), "nothing is left running"


def test_how_far_read_models_are(tmp_path: Path) -> None:
    assert positions(tmp_path) == {} and slowest({}) == "no read model exists yet"
    for name, sequence in (("runs", 70), ("images", 4)):
        with sqlite3.connect(tmp_path / f"{name}.sqlite") as db:
            db.execute("CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER, log TEXT)")
            db.execute("INSERT INTO position VALUES (1, ?, 'x')", (sequence,))
    (tmp_path / "damaged.sqlite").write_text("no database")
    assert positions(tmp_path) == {"runs": 70, "images": 4}
    assert slowest(positions(tmp_path)) == "the read model of images is at event 4, the furthest at 70"
