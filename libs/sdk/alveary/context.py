"""Inside a training process: the line to the trainer. Standard library alone.

Calls that log metrics put a line into a socket and return: about ten microseconds, no network, no credential. What
the trainer has not read yet waits in the socket, at most a few hundred kilobytes; then the call waits for room.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from typing import Any


class ContextError(Exception):
    """The trainer refused; the text says why."""


class Line:
    """A connection to the trainer of this attempt; safe to share between threads, made anew after a fork."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader: Any = None
        self._pid = 0
        self._number = 0
        self._broken = False
        atexit.register(self.finish)

    def _connected(self) -> socket.socket:
        if self._socket is None or self._pid != os.getpid():
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(60)
            self._socket.connect(self._path)
            self._reader = self._socket.makefile("rb")
            self._pid = os.getpid()
        return self._socket

    def tell(self, message: dict[str, Any]) -> None:
        """Send one line. A tracking outage never ends training: it is said once on stderr."""
        data = json.dumps(message, default=_plain).encode() + b"\n"
        with self._lock:
            if self._broken:
                return
            try:
                self._connected().sendall(data)
            except OSError as error:
                self._broken = True
                print(f"alveary: the trainer cannot be reached ({error}): metrics are not logged any more", file=sys.stderr)

    def ask(self, message: dict[str, Any], timeout: float = 600.0) -> Any:
        """Send one line and wait for its answer.

        Raises:
            ContextError: the trainer refused, or did not answer within `timeout` seconds.
        """
        with self._lock:
            self._number += 1
            number = self._number
            try:
                connection = self._connected()
                connection.settimeout(timeout)
                connection.sendall(json.dumps({**message, "id": number}, default=_plain).encode() + b"\n")
                while True:
                    line = self._reader.readline()
                    if not line:
                        raise ContextError("the trainer closed the connection")
                    answer = json.loads(line)
                    if answer.get("id") == number:
                        break
                    if answer.get("error"):
                        print(f"alveary: {answer['error']}", file=sys.stderr)
            except OSError as error:
                raise ContextError(f"the trainer cannot be reached: {error}") from error
        if "error" in answer:
            raise ContextError(answer["error"])
        return answer["ok"]

    def finish(self) -> None:
        """At exit: wait until what was logged is stored, up to a minute."""
        if self._socket is not None and self._pid == os.getpid() and not self._broken:
            try:
                self.ask({"op": "flush", "timeout": 60}, timeout=65)
            except ContextError as error:
                print(f"alveary: {error}", file=sys.stderr)


def _plain(value: Any) -> Any:
    """numpy and torch scalars and arrays, as JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def metric(name: str, kind: str, value: Any, description: str = "", step: int | None = None) -> dict[str, Any]:
    """The message that logs a metric."""
    if not isinstance(name, str) or not name:
        raise ValueError("a metric needs a name")
    message = {"op": "metric", "name": name, "kind": kind, "value": value, "time": time.time()}
    if description:
        message["description"] = description
    if step is not None:
        message["step"] = step
    return message


_line: Line | None = None


def line() -> Line | None:
    """The line of this process; None outside a submitted run."""
    global _line
    path = os.environ.get("ALVEARY_SOCKET")
    if path and (_line is None or _line._path != path):
        _line = Line(path)
    return _line if path else None
