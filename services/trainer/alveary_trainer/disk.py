"""The node's disks: whether there is space for further runs, and which run's folder it is that fills them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from alveary_core import telemetry
from alveary_core.disk import Disk, look, size

_INTERVAL_SECONDS = 1.0
# Folders are measured every so often: seldom on a disk with space, often on one that is nearly full; and never for more than
# a tenth of the time.
_CALM_SECONDS, _SHARE = 30.0, 0.1
# How long after the disk has space again servers that use it may take to restart.
_LINGERS_SECONDS = 30.0
# A folder counts as growing from this much on.
_GROWTH = 1 << 20


def usage(folder: Path) -> int:
    """Bytes that the files below a folder occupy. What vanishes meanwhile is left out. Blocks for long where there are many."""
    total, todo = 0, [str(folder)]
    seen: set[tuple[int, int]] = set()
    while todo:
        with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    known = entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif known.st_nlink > 1:  # hard links, as to a cache: once
                        if (known.st_dev, known.st_ino) in seen:
                            continue
                        seen.add((known.st_dev, known.st_ino))
                    total += known.st_blocks * 512
    return total


@dataclass
class Occupant:
    """A part of an attempt, as the watch sees it: its name, its folder, and how to end it with a sentence."""

    name: str
    folder: Path
    end: Callable[[str], None]
    # Its processes still run: nobody has ended it, and it did not end.
    live: bool = True


class DiskWatch:
    """Looks at the disks of a node once a second, off the event loop."""

    def __init__(
        self, node: str, folders: Iterable[Path], reserve_bytes: int, reserve_fraction: float, occupants: Callable[[], list[Occupant]]
    ) -> None:
        """`folders`: where runs work, first, and what else the node writes to."""
        self._node, self._folders = node, list(folders)
        self._bytes, self._fraction, self._occupants = reserve_bytes, reserve_fraction, occupants
        # None: not looked at yet.
        self.disk: Disk | None = None
        # Why no further run is to come here; empty: nothing stands against it.
        self.problem = ""
        self._sizes: dict[str, int] = {}
        # What each folder held when the disk was last far from full; folders that came later held nothing.
        self._before: dict[str, int] = {}
        self._measure_at = 0.0
        # When the disk was critical last, time.monotonic().
        self._critical_at = -_LINGERS_SECONDS

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            await self.step()
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def step(self) -> None:
        """Look once; end the run that fills the disk, if one does."""
        try:
            disks = await asyncio.to_thread(lambda: [look(f, self._bytes, self._fraction) for f in self._folders])
        except OSError as error:
            self.problem = f"its disk cannot be looked at: {error}"
            return
        worst = min(disks, key=lambda d: d.free - d.reserve)
        problem = next((d.problem for d in disks if d.low), "")
        if problem != self.problem:
            telemetry.logger().warning("disk.low" if problem else "disk.again", problem=problem, free=worst.free)
        self.disk, self.problem = disks[0], problem
        near = disks[0].low or disks[0].free < 3 * disks[0].reserve
        occupants = self._occupants()
        if occupants and time.monotonic() >= self._measure_at:
            await self._measure(occupants, near)
        if disks[0].critical:
            self._critical_at = time.monotonic()
            self._end_culprit(occupants, disks[0])

    async def _measure(self, occupants: list[Occupant], near: bool) -> None:
        started = time.monotonic()
        folders = {one.name: one.folder for one in occupants}
        self._sizes = await asyncio.to_thread(lambda: {name: usage(folder) for name, folder in folders.items()})
        if not near:
            self._before = dict(self._sizes)
        took = time.monotonic() - started
        self._measure_at = started + max(0.0 if near else _CALM_SECONDS, took / _SHARE)

    def _end_culprit(self, occupants: list[Occupant], disk: Disk) -> None:
        growth = {one.name: self._sizes.get(one.name, 0) - self._before.get(one.name, 0) for one in occupants}
        grown = max(occupants, key=lambda one: growth[one.name], default=None)
        # One after another: when it is gone, there is space again, or another one is next.
        if grown is not None and grown.live and growth[grown.name] >= _GROWTH:
            grown.end(
                f"it filled the disk of node {self._node}: its folder grew by {size(growth[grown.name])} to "
                f"{size(self._sizes[grown.name])}, and {size(disk.free)} of {size(disk.total)} were left"
            )
            self._measure_at = 0.0

    def fault(self) -> str:
        """A sentence for a failure while the disk is full, or was a moment ago; empty: it was not."""
        recent = time.monotonic() - self._critical_at < _LINGERS_SECONDS
        return f"the disk of node {self._node} was full" if recent else ""
