"""What a process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from alveary_core import machine


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_without_limits_it_is_the_whole_machine(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert machine.cpus(tmp_path) == len(os.sched_getaffinity(0))
    group(tmp_path, memory__max="max", cpu__max="max 100000")
    group(tmp_path / "memory").joinpath("memory.limit_in_bytes").write_text("9223372036854771712\n")
    group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert machine.memory_bytes(tmp_path) == psutil.virtual_memory().total
    assert machine.cpus(tmp_path) == len(os.sched_getaffinity(0))


def test_a_containers_limits_count(tmp_path: Path) -> None:
    group(tmp_path / "two", memory__max=str(1 << 30), cpu__max="50000 100000")
    assert (machine.memory_bytes(tmp_path / "two"), machine.cpus(tmp_path / "two")) == (1 << 30, 0.5)
    group(tmp_path / "one/memory").joinpath("memory.limit_in_bytes").write_text(f"{1 << 29}\n")
    group(tmp_path / "one/cpu", cpu__cfs_quota_us="25000", cpu__cfs_period_us="100000")
    assert (machine.memory_bytes(tmp_path / "one"), machine.cpus(tmp_path / "one")) == (1 << 29, 0.25)


def test_the_smallest_limit_of_the_groups_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group(tmp_path / "a", memory__max=str(1 << 29))
    group(tmp_path / "a/b", memory__max=str(1 << 31))
    monkeypatch.setattr(machine, "_groups", lambda root: [root / "a/b", root / "a", root])
    assert machine.memory_bytes(tmp_path) == 1 << 29
