"""A process's own log never ends what it speaks of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from alveary_core import telemetry
telemetry.configure("info", "test")
full = os.open("/dev/full", os.O_WRONLY)
saved = os.dup(2)
os.dup2(full, 2)
for number in range(3):
    telemetry.logger().warning("nobody hears this", number=number)
os.dup2(saved, 2)
telemetry.logger().info("heard", text="caf\\udce9")
print(telemetry.LOG_LOST._value.get())
"""


def test_a_full_disk_under_the_log_raises_nothing_and_what_was_lost_is_said(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3.0"
    lost, heard = done.stderr.splitlines()
    assert '"lines": 3' in lost and '"event": "heard"' in heard
