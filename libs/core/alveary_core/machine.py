"""What this process may use of its machine: less than the machine has, where a container or a service manager says so."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

# Where the kernel shows control groups; version 1 says "no limit" with a number near 2**63.
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60


def memory_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or the smallest limit of the control groups that this process is in."""
    return min([psutil.virtual_memory().total, *_limits(root, "memory.max", "memory/memory.limit_in_bytes")])


def cpus(root: Path = _ROOT) -> float:
    """Processors that this process may run on, or what the quota of its control groups comes to."""
    found = [float(len(os.sched_getaffinity(0)))]
    quotas = [_read(folder / "cpu.max") for folder in _groups(root)]
    quotas.append(f"{_read(root / 'cpu/cpu.cfs_quota_us')} {_read(root / 'cpu/cpu.cfs_period_us')}")
    for words in (text.split() for text in quotas):
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # else "max", -1, or no such controller
            found.append(int(words[0]) / int(words[1]))
    return min(found)


def _groups(root: Path) -> list[Path]:
    """Folders of this process's control group of version 2 and of those above it. In a container its own is the root."""
    own = next((line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    here = root / own.lstrip("/")
    return [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]


def _limits(root: Path, modern: str, old: str) -> list[int]:
    texts = [_read(folder / modern) for folder in _groups(root)] + [_read(root / old)]
    return [int(text) for text in texts if text.isdecimal() and 0 < int(text) < _UNLIMITED]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # no such controller here
        return ""
