"""Free space: how much is left on a disk, and whether that is too little to begin something new."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

from alveary_core.errors import ResourceExhausted

# Of the inodes of a file system, the part that is kept free, and at most how many.
_INODES_FRACTION, _INODES = 0.02, 10_000


@dataclass(frozen=True)
class Disk:
    """The file system that `path` is on. `free` and `total` are bytes that an unprivileged process may use."""

    path: Path
    total: int
    free: int
    # Less free than this is too little for anything new.
    reserve: int
    # Both 0 where the file system has no fixed number of them (btrfs, for one).
    inodes: int = 0
    inodes_free: int = 0

    @property
    def low(self) -> bool:
        """Nothing new is to begin that writes here."""
        return self.free < self.reserve or self._inodes_low(1.0)

    @property
    def critical(self) -> bool:
        """Half of the reserve is gone too: what fills the disk has to end."""
        return self.free < self.reserve / 2 or self._inodes_low(0.5)

    def _inodes_low(self, part: float) -> bool:
        wanted = min(self.inodes * _INODES_FRACTION, _INODES) if self.reserve else 0
        return bool(self.inodes) and self.inodes_free < wanted * part

    @property
    def problem(self) -> str:
        """A clause that stays the same while the disk is low; empty: it is not."""
        if not self.low:
            return ""
        if self.free < self.reserve:
            return f"less than {size(self.reserve)} of {size(self.total)} are free on the disk of {self.path}"
        return f"the disk of {self.path} has hardly any inodes left for further files"


def size(count: float) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def look(path: Path, reserve_bytes: int, reserve_fraction: float) -> Disk:
    """How full the disk of `path` is. The reserve is the smaller of `reserve_bytes` and that fraction of the disk. Blocks.

    Raises:
        OSError: there is no such path, or the file system does not answer.
    """
    found = os.statvfs(path)
    total = found.f_blocks * found.f_frsize
    reserve = int(min(reserve_bytes, total * reserve_fraction))
    return Disk(path, total, found.f_bavail * found.f_frsize, reserve, found.f_files, found.f_favail)


class DiskGuard:
    """Refuses what would fill the disk of a folder further."""

    def __init__(self, path: Path, reserve_bytes: int, reserve_fraction: float) -> None:
        self._path, self._bytes, self._fraction = path, reserve_bytes, reserve_fraction

    async def look(self) -> Disk:
        """The disk as it is now."""
        return await asyncio.to_thread(look, self._path, self._bytes, self._fraction)

    async def require(self, what: str) -> None:
        """Pass when there is space. `what`: how the sentence begins that says there is none, "this upload is refused".

        Raises:
            ResourceExhausted: there is too little.
        """
        if problem := (await self.look()).problem:
            raise ResourceExhausted(
                f"{what}: {problem}, the platform's own; free some, and it is taken again "
                "(ALVEARY_DISK_RESERVE_BYTES sets how much is kept free)"
            )
