"""Pauses between tries, and the loop that retries. Standard library alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Backoff:
    """Pauses, in seconds: each `factor` times as long as the one before, up to `longest_seconds`."""

    def __init__(self, first_seconds: float, longest_seconds: float, *, factor: float = 2.0, jitter: float = 0.0) -> None:
        """`jitter`: the share of each pause that is random, so that many clients do not return at once."""
        self._first = first_seconds
        self._longest = longest_seconds
        self._factor = factor
        self._jitter = jitter
        self._next = first_seconds

    def reset(self) -> None:
        """Start with the shortest pause again: something succeeded."""
        self._next = self._first

    def next_seconds(self) -> float:
        """The next pause; the one after it is longer."""
        seconds = self._next
        self._next = min(seconds * self._factor, self._longest)
        return seconds * (1.0 - self._jitter * random.random())

    async def pause(self) -> None:
        """Sleep until the next try is due."""
        await asyncio.sleep(self.next_seconds())


async def retry(attempt: Callable[[], Awaitable[T]], is_transient: Callable[[Exception], bool], *, tries: int, backoff: Backoff) -> T:
    """The result of `attempt`, which is called up to `tries` times while it fails with transient errors.

    Raises:
        Exception: what the last attempt raised.
    """
    for left in reversed(range(tries)):
        try:
            return await attempt()
        except Exception as error:
            if not left or not is_transient(error):
                raise
        await backoff.pause()
    raise ValueError(f"tries must be at least 1, not {tries}")
