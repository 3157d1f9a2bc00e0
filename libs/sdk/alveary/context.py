"""Inside a training process: the connection to the trainer. Standard library alone.

Calls that log metrics put a line into a socket and return: about ten microseconds, no network, no credential. What
the trainer has not read yet waits in the socket, at most a few hundred kilobytes; then the call waits for room.

Nothing that is logged ends a training: what cannot be logged is said on stderr, and in the run's system log.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from typing import Any

# Larger messages are answered, so that a refusal is known at once, bytes; and the largest that is sent at all.
_ANSWERED, _LARGEST = 64 << 10, 8 << 20
# What a metric point may have, bytes: the trainer decides by this.
LARGEST_POINT = 1 << 20
# Numbers of a list in one message; longer lists take several.
LIST_PART = 20_000
_LONGEST_NAME = 256
# How long a full socket is waited for, how often a lost line is connected again, and refusals looked for, seconds.
_ROOM_SECONDS, _AGAIN_SECONDS, _LOOK_SECONDS = 60.0, 5.0, 1.0
_MOST_WARNINGS = 50
_MOST_NOTES = 20
_INTEGERS = 2**63


class ContextError(Exception):
    """The trainer refused; the text says why."""


class TrainerConnection:
    """A connection to the trainer of this attempt; safe to share between threads and with signal handlers, and opened again after a fork."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._warned = self._noted = 0
        self._reset()
        atexit.register(self.finish)
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        # A thread that held the lock when this process was forked is not here to release it.
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._unread = b""
        self._number = 0
        # A signal handler may log while its own thread is sending: what it logs waits here.
        self._sending = False
        self._waiting: deque[bytes] = deque()
        # Messages that were lost since the trainer was lost, and when it was tried last.
        self._lost, self._tried = 0, 0.0
        self._looked = time.monotonic()

    def warn(self, text: str) -> None:
        """Say on stderr what was not logged; of very many such sentences only the first."""
        self._warned += 1
        if self._warned <= _MOST_WARNINGS:
            more = " (no more of this is said)" if self._warned == _MOST_WARNINGS else ""
            print(f"alveary: {text}{more}", file=sys.stderr, flush=True)

    def refuse(self, text: str) -> None:
        """Say on stderr, and in the run's system log, what was not logged."""
        self.warn(text)
        self._noted += 1
        if self._noted <= _MOST_NOTES:
            self._send_bytes(_encoded({"op": "refused", "text": text[:1000]}))

    def send(self, message: dict[str, Any]) -> None:
        """Send one line. A tracking outage never ends training: it is said on stderr.

        Raises:
            TypeError, ValueError, RecursionError: it cannot be written as JSON.
        """
        data = _encoded(message)
        if len(data) > _LARGEST:
            raise ValueError(f"it has {len(data):,} bytes as JSON, and one may have {LARGEST_POINT:,}")
        if len(data) <= _ANSWERED:
            self._send_bytes(data)
            return
        try:
            self._exchange(message, 60.0)
        except ContextError as error:
            self.warn(str(error))

    def _send_bytes(self, data: bytes) -> None:
        with self._lock:
            self._waiting.append(data)
            if self._sending:
                return
            self._sending = True
            try:
                while self._waiting:
                    self._put(self._waiting.popleft())
            finally:
                self._sending = False
            if time.monotonic() - self._looked > _LOOK_SECONDS:
                self._look()

    def _put(self, data: bytes) -> None:
        if self._socket is None and self._lost and time.monotonic() - self._tried < _AGAIN_SECONDS:
            self._lost += 1
            return
        try:
            self._connected().sendall(data)
        except OSError as error:
            self._drop()
            self._tried = time.monotonic()
            if not self._lost:
                self.warn(f"the trainer cannot be reached ({error}): metrics are not logged until it can be")
            self._lost += 1
            return
        if self._lost:
            self.warn(f"the trainer can be reached again; {self._lost} metrics were lost")
            self._lost = 0

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = _connect(self._path, _ROOM_SECONDS)
            self._unread = b""
        self._socket.settimeout(_ROOM_SECONDS)
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _look(self) -> None:
        """Say what the trainer refused so far."""
        self._looked = time.monotonic()
        while self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._drop()
                return
            *lines, self._unread = (self._unread + data).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if answer.get("error"):
                    self.warn(answer["error"])

    def _exchange(self, message: dict[str, Any], timeout: float) -> Any:
        """Send one line after all that was sent, and wait for its answer.

        Raises:
            ContextError: the trainer refused, or did not answer within `timeout` seconds.
        """
        with self._lock:
            if self._sending:
                raise ContextError("this was asked by a signal handler that interrupted another call: nothing is waited for")
            self._sending = True
            try:
                self._number += 1
                connection = self._connected()
                connection.sendall(_encoded({**message, "id": self._number}))
                return self._answer(connection, self._number, timeout)
            except OSError as error:
                self._drop()
                raise ContextError(f"the trainer cannot be reached: {error}") from error
            finally:
                self._sending = False
                while self._waiting:
                    self._put(self._waiting.popleft())

    def _answer(self, connection: socket.socket, number: int, timeout: float) -> Any:
        connection.settimeout(timeout)
        while True:
            line, sign, rest = self._unread.partition(b"\n")
            if not sign:
                data = connection.recv(1 << 16)
                if not data:
                    self._drop()
                    raise ContextError("the trainer closed the connection")
                self._unread += data
                continue
            self._unread = rest
            answer = json.loads(line)
            if answer.get("id") == number and "working" not in answer:
                return _ok(answer)
            if answer.get("error"):
                self.warn(answer["error"])

    def request(self, message: dict[str, Any], timeout: float = 600.0) -> Any:
        """Send one line, over a connection of its own, and wait for its answer: others may log meanwhile.

        `timeout`: how long the trainer may say nothing, seconds; while it works it says so.

        Raises:
            ContextError: the trainer refused, or said nothing for so long.
        """
        try:
            with _connect(self._path, timeout) as connection, connection.makefile("rb") as answers:
                connection.sendall(_encoded({**message, "id": 1}))
                for line in answers:
                    answer = json.loads(line)
                    if "working" not in answer:
                        return _ok(answer)
        except OSError as error:
            raise ContextError(f"the trainer cannot be reached: {error or type(error).__name__}") from error
        raise ContextError("the trainer closed the connection")

    def flush(self, timeout: float) -> None:
        """Wait until what was logged is stored.

        Raises:
            ContextError: not within `timeout` seconds.
        """
        self._exchange({"op": "flush", "timeout": timeout}, timeout + 5)

    def finish(self) -> None:
        """At exit: wait until what was logged is stored, up to a minute."""
        if self._socket is not None:
            try:
                self.flush(60.0)
            except ContextError as error:
                self.warn(str(error))


def _connect(path: str, timeout: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout)
        made.connect(path)
    except OSError:
        made.close()
        raise
    return made


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message, default=_plain).encode() + b"\n"


def _ok(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise ContextError(answer["error"])
    return answer["ok"]


def _plain(value: Any) -> Any:
    """numpy and torch scalars and arrays, as JSON."""
    for name in ("tolist", "item"):
        if hasattr(value, name):
            with contextlib.suppress(Exception):  # an object may raise anything: its text is taken then
                return getattr(value, name)()
    return str(value)


def metric(name: str, kind: str, value: Any, description: str = "", step: Any = None) -> dict[str, Any]:
    """The message that logs a metric.

    Raises:
        TypeError, ValueError: the name or the step cannot be one.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME:
        raise ValueError(f"a metric needs a name of 1 to {_LONGEST_NAME} characters")
    message = {"op": "metric", "name": name, "kind": kind, "value": value, "time": time.time()}
    if description:
        message["description"] = str(description)
    if step is not None:
        message["step"] = whole(step)
    return message


def whole(step: Any) -> int:
    """A step as the number that it is.

    Raises:
        TypeError, ValueError: it is no whole number, or too large for one.
    """
    number = step.item() if hasattr(step, "item") else step
    if isinstance(number, str) or int(number) != number:
        raise ValueError(f"step {step!r} is no whole number")
    if not -_INTEGERS <= number < _INTEGERS:
        raise ValueError(f"step {step!r} is too large")
    return int(number)


_connection: TrainerConnection | None = None


def connection() -> TrainerConnection | None:
    """This process's connection to its trainer; None outside a submitted run."""
    global _connection
    path = os.environ.get("ALVEARY_SOCKET")
    if path and (_connection is None or _connection._path != path):
        _connection = TrainerConnection(path)
    return _connection if path else None
