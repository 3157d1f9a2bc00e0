"""A stack on a machine with limits, masks and homes that are not a developer's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alveary.config import default_state_dir
from alveary.errors import AlvearyError
from alveary_core.uv import pip_settings

SCRIPT = """
import os, resource
from alveary.local.stack import usable
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 500))
for mask in (0o777, 0o277, 0o022, 0o000, 0o077):
    os.umask(mask)
    usable()
    print(oct(os.umask(0)))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_files_of_a_stack_are_its_owners_and_it_may_open_as_many_as_the_machine_allows() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["0o77", "0o77", "0o22", "0o0", "0o77", "500"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "65530"], "65530 is not in the range"), (["--port", "-1"], "-1 is not in the range"),
        (["--lease-seconds", "0"], "0.0 is not in the range"), (["--lease-seconds", "nan"], "--lease-seconds nan"),
        (["--lease-seconds", "inf"], "inf is not in the range"), (["--metrics-port", "99999"], "99999 is not in the range"),
    ],
)  # fmt: skip
def test_numbers_that_no_stack_can_have_are_refused(tmp_path: Path, words: list[str], told: str) -> None:
    command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(tmp_path / "s"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "s").exists()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("ALVEARY_HOME", raising=False)
    with pytest.raises(AlvearyError, match="set HOME, or ALVEARY_HOME"):
        default_state_dir()
    monkeypatch.setenv("ALVEARY_HOME", "/given")
    assert default_state_dir() == Path("/given")
    pip_settings()


def test_a_directory_that_may_not_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for detached in ([], ["--detach"]):
        command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(tmp_path / "file/state"), "--port", "0", *detached]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
        assert done.returncode == 1 and "Not a directory" in done.stderr and "Traceback" not in done.stderr, done.stderr
