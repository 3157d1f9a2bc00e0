"""Bytes of a stream in, log lines out: any length, any bytes, each with the time it was read.

A line that is still being written (a progress bar, a prompt) is sent twice a second as a provisional line, which the next one of
the stream replaces. Text that a carriage return overwrites is dropped, so that a bar is one line in the end; where a program moves
the cursor up (bars below each other), the lines that it may still reach are held back.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable

from alveary_contracts.logs.v1 import logs_pb2
from alveary_trainer.shipper import Shipper

# Longest line that travels whole, bytes.
LINE = 256 << 10
# How often an unfinished line is shown, seconds, and how much of it, bytes.
SHOW_SECONDS = 0.5
_SHOWN = 2000
# What is held back of a program that moves the cursor up: lines, and seconds after which they count as left alone.
_MAX_ROWS = 16
_SETTLED_SECONDS = 2.0
# A segment with one of these is data, not text: a carriage return in it overwrites nothing.
_DATA = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f]")
_MOVES = re.compile(rb"(\n|\r|\x1b\[\d*[AB])")
_UP = re.compile(rb"\x1b\[\d*A")
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def readable(data: bytes) -> str:
    """A line as text for a message: without escape sequences and control characters, invalid UTF-8 replaced."""
    return _CONTROLS.sub("", _ESCAPES.sub("", data.decode(errors="replace")))


def overwritten(line: bytes) -> bytes:
    """What is left of a line once its carriage returns have overwritten what was before them; trailing ones stay."""
    at = line.rstrip(b"\r").rfind(b"\r")
    return line if at < 0 or _DATA.search(line, 0, at) else line[at + 1 :]


class Lines:
    """One stream of one rank."""

    def __init__(
        self, shipper: Shipper, stream: str, rank: int, attempt: int, tail: deque[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`tail` receives the newest lines as text. `clock`: monotonic seconds."""
        self._shipper, self._tail, self._clock = shipper, tail, clock
        self._stream, self._rank, self._attempt = stream, rank, attempt
        self._rest = b""
        # Lines that the cursor may come back to, and which of them it is in; None: it only moves forward.
        self._rows: list[bytes] | None = None
        self._row, self._depth, self._fresh = 0, 0, False
        # When the unfinished line began, or was shown last; what was shown.
        self._since: float | None = None
        self._shown = b""
        self._fed = 0.0

    def feed(self, data: bytes) -> None:
        """Take what was read."""
        self._fed = self._clock()
        if self._rows is None and _UP.search(data):
            self._rows, self._row, self._depth, self._fresh = [self._rest], 0, 0, False
            self._rest = b""
        if self._rows is not None:
            self._move(data)
            self._mark(self._unfinished(), whole=False)
            return
        *lines, self._rest = (self._rest + data).split(b"\n") if b"\n" in data else (self._rest + data,)
        for line in lines:
            self._line(line)
        if b"\r" in self._rest:
            self._rest = overwritten(self._rest)
        while len(self._rest) > LINE:
            self._add(self._rest[:LINE], partial=True)
            self._rest = self._rest[LINE:]
        self._mark(self._rest, whole=bool(lines))

    def end(self) -> None:
        """No more comes: a last line without an end counts too."""
        for row in self._rows or ():
            if row.strip():
                self._line(row)
        if self._rest:
            self._line(self._rest)
        self._rest, self._rows, self._since = b"", None, None

    @property
    def due(self) -> float | None:
        """In how many seconds `show` has something to do; None: nothing before more is fed."""
        if self._since is None:
            return None
        return max(self._since + SHOW_SECONDS - self._clock(), 0.0)

    def show(self) -> None:
        """Send the unfinished line as it is now, where it is time to."""
        now = self._clock()
        if self._since is None or now < self._since + SHOW_SECONDS:
            return
        if self._rows is not None and self._row == len(self._rows) - 1 and now - self._fed > _SETTLED_SECONDS:
            *rows, self._rest = self._rows
            self._rows = None
            for row in rows:
                self._line(row)
        text = self._unfinished()
        if text != self._shown:
            self._shown = text
            self._add(text[-_SHOWN:], provisional=True)
        # Rows are looked at until they are settled; a line that stays as it is needs no more looks.
        self._since = now if self._rows is not None else None

    def _mark(self, text: bytes, *, whole: bool) -> None:
        """Note that there is an unfinished line; `whole`: others ended since the last look."""
        if not text:
            self._since = None
        elif self._since is None or whole:
            self._since = self._fed
        else:
            self.show()
            self._since = self._since if self._since is not None else self._fed

    def _unfinished(self) -> bytes:
        if self._rows is None:
            return overwritten(self._rest.rstrip(b"\r"))
        return b" | ".join(row.strip() for row in self._rows if row.strip())

    def _move(self, data: bytes) -> None:
        """Write as a terminal does, on rows that are held back."""
        assert self._rows is not None
        rows = self._rows
        for part in _MOVES.split(data):
            if part == b"\n":
                self._row, self._fresh = self._row + 1, True
                if self._row == len(rows):
                    rows.append(b"")
            elif part == b"\r":
                self._fresh = True
            elif part.startswith(b"\x1b[") and part[-1:] in b"AB" and _MOVES.fullmatch(part):
                steps = int(part[2:-1] or b"1")
                if part.endswith(b"A"):
                    self._depth = max(self._depth, min(steps, _MAX_ROWS))
                    self._row = max(self._row - steps, 0)
                else:
                    self._row = min(self._row + steps, len(rows) - 1)
            elif part:
                rows[self._row] = part if self._fresh else rows[self._row] + part
                self._fresh = False
                if len(rows[self._row]) > LINE:  # no bar is as long: nothing is held back any more
                    for row in rows:
                        self._line(row)
                    rows[:], self._row = [b""], 0
        while len(rows) > self._depth + 1 and self._row > 0:
            row = rows.pop(0)
            self._row -= 1
            self._line(row)

    def _line(self, line: bytes) -> None:
        if b"\r" in line:
            line = overwritten(line)
            line = line if _DATA.search(line) else line.rstrip(b"\r")
        while len(line) > LINE:
            self._add(line[:LINE], partial=True)
            line = line[LINE:]
        self._add(line)

    def _add(self, data: bytes, *, partial: bool = False, provisional: bool = False) -> None:
        line = logs_pb2.LogLine(
            stream=self._stream, rank=self._rank, attempt=self._attempt, data=data, partial=partial, provisional=provisional
        )
        line.time.GetCurrentTime()
        self._shipper.add(line)
        if not provisional:
            self._shown = b""
            if self._tail is not None:
                self._tail.append(readable(data[:4000])[:2000])
