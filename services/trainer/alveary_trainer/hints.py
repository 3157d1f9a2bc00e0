"""The probable cause of a script's failure, where the script does not name it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

# Of PyTorch, of python's multiprocessing and of NumPy: how a full /dev/shm looks to a script.
_SHARED_MEMORY = re.compile(
    r"\bbus error\b|shared memory ?\(shm\)|shared memory limit|shared memory file|unable to .*</(?:torch_|psm_)|"
    r"No space left on device: '(?:/psm_|/torch_|/dev/shm)",
    re.IGNORECASE,
)


def lacked_shared_memory(exit_code: int | None, number: int | None, lines: Iterable[str]) -> bool:
    """Whether a script that ended so, and said `lines` last, seems to have found no room in /dev/shm."""
    if number == signal.SIGBUS or exit_code == 128 + signal.SIGBUS:
        return True
    return bool(exit_code or number) and any(_SHARED_MEMORY.search(line) for line in lines)


def shared_memory_here(folder: Path = Path("/dev/shm")) -> str:
    """How full /dev/shm of this machine is, a sentence."""
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return f"{folder} cannot be used on this node: {error.strerror}"
    size, free = (n * found.f_frsize / 2**30 for n in (found.f_blocks, found.f_bavail))
    return f"{folder} of this node, which all its runs share, has {size:.1f} GiB, {free:.1f} of them free now: use fewer workers, or make it larger"
