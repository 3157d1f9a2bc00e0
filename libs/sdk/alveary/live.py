"""Log lines on a screen: whole ones are printed, one that is still being written is shown as it changes. Standard library alone.

On a terminal the unfinished line is the last one, and is written over. Elsewhere (a file, a pipe, a notebook) it is printed as a line
of its own now and then, less and less often, so that a bar of an hour is a hundred lines and not ten thousand.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Hashable
from typing import Any, TextIO

from alveary.text import printable, shorten

_FIRST_SECONDS, _LONGEST_SECONDS = 2.0, 30.0
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_ERASE = "\r\x1b[K"


class LivePrinter:
    """Prints the lines of several streams. `close` it at the end."""

    def __init__(
        self, out: TextIO | None = None, err: TextIO | None = None, *, follow: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`follow`: show unfinished lines as they change; else each once, at the end, as it is then."""
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._follow, self._clock = follow, clock
        self._terminal = follow and self._out.isatty()
        # The parts so far of lines that come in several, joined when the last is there.
        self._parts: dict[Hashable, list[bytes]] = {}
        # What is unfinished, newest last, with its mark.
        self._unfinished: dict[Hashable, tuple[str, bytes]] = {}
        # Elsewhere than on a terminal: what was printed last of an unfinished line, when it may be printed again, and how long after that.
        self._printed: dict[Hashable, tuple[bytes, float, float]] = {}
        self._drawn = False

    def add(self, line: Any, mark: str = "", *, to_err: bool = False) -> None:
        """Print a LogLine, or a part of one, or show how one is getting on. `mark` goes before it; `to_err`: it is for stderr."""
        key = (line.stream, line.rank, line.attempt)
        if line.provisional:
            self._show(key, mark, line.data)
            return
        if line.partial:
            self._parts.setdefault(key, []).append(line.data)
            return
        data = b"".join([*self._parts.pop(key, ()), line.data])
        self._unfinished.pop(key, None)
        printed, _, _ = self._printed.pop(key, (None, 0.0, 0.0))
        if printed != data:
            self._write(self._err if to_err else self._out, mark.encode() + data)

    def say(self, text: str) -> None:
        """Print a line of our own."""
        self._write(self._out, text.encode(errors="backslashreplace"))

    def close(self) -> None:
        """Nothing more comes."""
        if self._drawn:
            self._out.write(_ERASE)
            self._out.flush()
            self._drawn = False
        if not self._follow:
            for mark, data in self._unfinished.values():
                self._write(self._out, mark.encode() + data)
        self._unfinished.clear()

    def _write(self, where: TextIO, data: bytes) -> None:
        if self._drawn:
            self._out.write(_ERASE)
            self._out.flush()
            self._drawn = False
        buffer = getattr(where, "buffer", None)
        if buffer is not None:
            where.flush()
            buffer.write(data + b"\n")
            buffer.flush()
        else:  # a notebook's
            where.write(data.decode(errors="replace") + "\n")
        where.flush()
        self._draw()

    def _show(self, key: Hashable, mark: str, data: bytes) -> None:
        self._unfinished.pop(key, None)
        self._unfinished[key] = (mark, data)
        if self._terminal:
            self._draw()
        elif self._follow and data.strip():
            printed, due, pause = self._printed.get(key, (None, 0.0, _FIRST_SECONDS))
            now = self._clock()
            if printed != data and now >= due:
                self._printed[key] = (data, now + pause, min(pause * 2, _LONGEST_SECONDS))
                self._write(self._out, mark.encode() + data)

    def _draw(self) -> None:
        """On a terminal: the newest unfinished line, in place."""
        if not self._terminal or not self._unfinished:
            return
        mark, data = next(reversed(self._unfinished.values()))
        text = printable(_ESCAPES.sub("", data.decode(errors="replace")))
        self._out.write(_ERASE + shorten(mark + text, shutil.get_terminal_size().columns - 1))
        self._out.flush()
        self._drawn = True
