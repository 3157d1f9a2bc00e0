"""./logs while a run lives: text is followed line by line, everything else is left to be synced as files.

A file is followed as what was opened, not as its name: it may be renamed (rotated), removed, replaced by another one of its name,
truncated or rewritten; nothing of it is shipped twice, and the new file of the name goes on in the same stream.
All reading happens on threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from alveary_trainer.adapters.runtime import open_beneath
from alveary_trainer.file_names import stored_name
from alveary_trainer.lines import Lines
from alveary_trainer.shipper import Shipper

# Files that are followed at once, and bytes of one and of all that are shipped as lines.
_MAX_FILES = 100
_MAX_BYTES, _MAX_BYTES_IN_ALL = 64 << 20, 512 << 20
_LOOK_SECONDS = 0.5
_CHUNK = 1 << 16
_HEAD = 512
# Files of the folder that are looked at.
_MAX_ENTRIES = 20_000


def is_text(head: bytes) -> bool:
    """Whether a file that begins so is text: in whatever encoding, without control characters that no text has."""
    return not any(byte < 7 or 13 < byte < 27 for byte in head)


@dataclass
class _Followed:
    """An open text file."""

    lines: Lines
    descriptor: int
    held: ExitStack
    name: str
    position: int = 0
    shipped: int = 0
    # Its first bytes, to tell what was appended to from what was rewritten.
    head: bytes = b""
    changed: tuple[int, int] = (0, 0)
    rewritten: bool = False


class LogFolder:
    """Follows the files of a folder, each a stream of its own: logs/<path>."""

    def __init__(
        self, folder: Path, shipper: Shipper, attempt: int, below: Path, rank: int = 0, log: Callable[[str], None] = lambda _: None
    ) -> None:
        """`below`: where what is read must lie. `log` is told what is not followed."""
        self._folder, self._shipper, self._attempt, self._below, self._rank = folder, shipper, attempt, below, rank
        self._log = log
        self._followed: dict[tuple[int, int], _Followed] = {}
        # What is no text, or too much of it; by device and inode.
        self._left: set[tuple[int, int]] = set()
        self._total = 0
        self._full = False

    async def run(self) -> None:
        """Look twice a second, or as often as a tenth of the time allows, for ever."""
        while True:
            begun = time.monotonic()
            await self.look()
            await asyncio.sleep(max(_LOOK_SECONDS, 10 * (time.monotonic() - begun)))

    async def look(self) -> None:
        """Ship what is new."""
        present = await asyncio.to_thread(self._scan)
        for key in list(self._followed):
            await self._ship(key, gone=key not in present)
        for key, path in present.items():
            if key not in self._followed and key not in self._left and await self._begin(key, path):
                await self._ship(key, gone=False)
        self._left &= present.keys()

    def follows(self, key: tuple[int, int]) -> bool:
        """Whether a file (device, inode) is followed line by line."""
        return key in self._followed

    async def finish(self) -> None:
        """Ship the rest, and close all files."""
        try:
            await self.look()
        finally:
            for file in self._followed.values():
                file.lines.end()
            self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self._followed.values():
            file.held.close()
        self._followed.clear()

    def _scan(self) -> dict[tuple[int, int], Path]:
        """Regular files of the folder by device and inode, in the order of their names; links are not followed."""
        found: dict[tuple[int, int], Path] = {}
        for root, folders, names in os.walk(self._folder):
            folders.sort()
            for name in sorted(names):
                path = Path(root, name)
                try:
                    info = path.lstat()
                except OSError:
                    continue  # it went meanwhile
                if os.path.isfile(path) and not os.path.islink(path):
                    found.setdefault((info.st_dev, info.st_ino), path)
                if len(found) >= _MAX_ENTRIES:
                    return found
        return found

    async def _begin(self, key: tuple[int, int], path: Path) -> bool:
        """Open a file that is new here; False: it is not followed."""
        name, _ = stored_name(os.fsencode(f"logs/{path.relative_to(self._folder)}"))
        if len(self._followed) >= _MAX_FILES:
            if not self._full:
                self._full = True
                self._log(f"more than {_MAX_FILES} files in ./logs: {name} and others are not followed line by line; all are stored")
            return False
        held = ExitStack()

        def work() -> tuple[int, bytes, int]:
            with open_beneath(path, self._below) as readable:
                descriptor = os.open(readable, os.O_RDONLY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            return descriptor, os.pread(descriptor, 8192, 0), os.fstat(descriptor).st_size

        try:
            descriptor, head, size = await asyncio.to_thread(work)
        except (OSError, ValueError):
            held.close()
            return False  # it went, or cannot be read: it is looked at again
        if not head:
            held.close()
            return False  # what it is will be seen once there is something in it
        if not is_text(head) or size > _MAX_BYTES:
            held.close()
            self._left.add(key)
            if is_text(head):
                self._log(f"{name} is not followed line by line: it has more than {_MAX_BYTES >> 20} MiB; it is stored as a file")
            return False
        lines = Lines(self._shipper, name, self._rank, self._attempt)
        self._followed[key] = _Followed(lines, descriptor, held, name)
        return True

    async def _ship(self, key: tuple[int, int], *, gone: bool) -> None:
        file = self._followed[key]
        while True:
            await self._shipper.room()
            data = await asyncio.to_thread(self._read, file)
            if data is None:  # it was rewritten, as something else
                self._leave(key)
                return
            if file.rewritten:
                file.rewritten = False
                file.lines.end()
            if not data:
                break
            file.lines.feed(data)
            self._total += len(data)
            file.shipped += len(data)
            if file.shipped > _MAX_BYTES or self._total > _MAX_BYTES_IN_ALL:
                self._leave(key)
                self._log(
                    f"{file.name} is no longer followed line by line: that was {file.shipped >> 20} MiB of it; it is stored as a file"
                )
                return
        file.lines.show()
        if gone:
            file.lines.end()
            file.held.close()
            del self._followed[key]

    def _leave(self, key: tuple[int, int]) -> None:
        file = self._followed.pop(key)
        file.lines.end()
        file.held.close()
        self._left.add(key)

    @staticmethod
    def _read(file: _Followed) -> bytes | None:
        """What comes next in a file; None: it is no text any more."""
        info = os.fstat(file.descriptor)
        stamp = (info.st_size, info.st_mtime_ns)
        # Truncated, or truncated and grown again since: it starts again.
        if (
            stamp != file.changed
            and file.position
            and (info.st_size < file.position or os.pread(file.descriptor, len(file.head), 0) != file.head)
        ):
            file.position, file.head, file.rewritten = 0, b"", True
        data = os.pread(file.descriptor, _CHUNK, file.position)
        if not file.position and not is_text(data[:8192]):
            return None
        if len(file.head) < _HEAD and file.position == len(file.head):
            file.head += data[: _HEAD - len(file.head)]
        file.position += len(data)
        if not data:
            file.changed = stamp
        return data
