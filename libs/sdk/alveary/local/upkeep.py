"""What a stack's supervisor looks after beside its processes: servers that refuse to write since the disk was full, and logs."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from alveary_core.disk import Disk

# What nats-server and SeaweedFS say when a write fails for want of space. nats-server repeats it for every message that it
# refuses, also when there is space again: a stream that failed to write once stays so until the server is started anew.
_MARKS = (b"no space left on device", b"Critical write error", b"disk quota exceeded")
# With less than this free, writes may have failed without a word: the log is on the same disk.
_FULL = 4 << 20
_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0
# A log beyond the first is cut, and begins with the newest bytes of it.
_LOG_LIMIT, _LOG_KEPT = 64 << 20, 8 << 20


@dataclass
class ServerWatch:
    """Whether a server has to be started anew to write again."""

    log: Path
    suspect: bool = False
    _offset: int = field(default=-1)
    _pause: float = field(default=_PAUSE_SECONDS)
    # time.monotonic()
    _restarted: float = field(default=-_LONGEST_PAUSE_SECONDS)

    def look(self, disk: Disk) -> bool:
        """True: it refused to write, and there is space now. The caller restarts it and calls `restarted`."""
        if disk.free < _FULL:
            # Full, or full again: what it complains about is that, and one restart will do.
            self.suspect, self._pause = True, _PAUSE_SECONDS
        elif self._complains():
            self.suspect = True
        since = time.monotonic() - self._restarted
        if not self.suspect or disk.free < max(disk.reserve // 2, 2 * _FULL) or since < self._pause:
            return False
        # It refuses again soon after the last time: there is more to it, and hurrying does not help.
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS) if since < 4 * self._pause else _PAUSE_SECONDS
        return True

    def restarted(self) -> None:
        """It was: what it said before counts no more."""
        self.suspect, self._restarted = False, time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            self._offset = self.log.stat().st_size

    def _complains(self) -> bool:
        try:
            size = self.log.stat().st_size
        except FileNotFoundError:
            return False
        if self._offset < 0:  # what an earlier life of the stack left in it says nothing about this one
            self._offset = size
        if size < self._offset:  # it was cut
            self._offset = 0
        if size == self._offset:
            return False
        with self.log.open("rb") as opened:
            opened.seek(self._offset)
            new = opened.read(1 << 20)
        self._offset += len(new)
        return any(mark in new for mark in _MARKS)


def cut(log: Path, limit: int = _LOG_LIMIT, kept: int = _LOG_KEPT) -> bool:
    """Shorten a log that processes append to, in place, when it is longer than `limit` bytes; its newest `kept` stay.

    Lines written in the very moment may be lost; the alternative is a disk full of logs. True: it was cut.
    """
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size <= limit:
            return False
        with log.open("r+b") as opened:
            opened.seek(-kept, os.SEEK_END)
            opened.readline()
            newest = opened.read()
            opened.truncate(0)
        # Through a descriptor that appends, as those of the processes do: whatever they wrote meanwhile is not overwritten.
        with log.open("ab") as opened:
            opened.write(b"... cut by the supervisor ...\n" + newest)
        return True
    return False


def last_lines(log: Path, count: int = 5) -> str:
    """The newest lines of a log, for a message; empty: there are none."""
    try:
        with log.open("rb") as opened:
            opened.seek(max(log.stat().st_size - 8192, 0))
            lines = opened.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(line[:500] for line in lines[-count:])
