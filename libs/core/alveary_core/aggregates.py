"""Command handling: load an aggregate, decide, append; on conflict reload and decide again."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from google.protobuf.message import Message

from alveary_core.errors import Aborted
from alveary_core.eventlog import Conflict, EventLog
from alveary_core.events import Event, Key, name_of

S = TypeVar("S")
_TRIES = 10


class Aggregates(Generic[S]):
    """The aggregates of one kind that a service writes.

    Keeps the newest `capacity` of them in memory; what is not there is folded from the log itself, so a decision
    is never made on a view that lags behind.
    """

    def __init__(
        self,
        log: EventLog,
        kind: str,
        initial: Callable[[], S],
        evolve: Callable[[S, Event], S],
        capacity: int = 5000,
    ) -> None:
        self._log, self._kind, self._initial, self._evolve, self._capacity = log, kind, initial, evolve, capacity
        self._cache: OrderedDict[Key, tuple[S, int]] = OrderedDict()
        self._locks: dict[Key, asyncio.Lock] = {}

    def key(self, workspace: str, ident: str) -> Key:
        """Key of one of them."""
        return Key(workspace, self._kind, ident)

    async def load(self, key: Key) -> tuple[S, int]:
        """State and sequence of its newest event (0: there is none)."""
        if key not in self._cache:
            state, sequence = self._initial(), 0
            for event in await self._log.read(key):
                state, sequence = await self._fold(state, event), event.sequence
            self._remember(key, state, sequence)
        self._cache.move_to_end(key)
        return self._cache[key]

    async def _fold(self, state: S, event: Event) -> S:
        """`state` after `event`; as it was, with a dead letter, if the event cannot be folded."""
        try:
            return self._evolve(state, event)
        except Exception as error:
            await self._log.dead_letters.put(f"aggregate-{self._kind}", event.key.subject(event.name), event.sequence, error)
            return state

    def _remember(self, key: Key, state: S, sequence: int) -> None:
        self._cache[key] = (state, sequence)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)

    async def execute(self, key: Key, decide: Callable[[S], Sequence[Message]], *, new: bool = False) -> tuple[S, int]:
        """Append what `decide` says of the present state; returns the state after it and its sequence.

        `new` says that the id was made just now, so that there is nothing to load.

        Raises:
            Aborted: others appended each time in between.
            Unavailable: the log did not answer in time.
            Whatever `decide` raises.
        """
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                if new:
                    self._remember(key, self._initial(), 0)
                for _ in range(_TRIES):
                    state, sequence = await self.load(key)
                    messages = decide(state)
                    if not messages:
                        return state, sequence
                    try:
                        for message in messages:
                            done = await self._log.append(key, [message], sequence)
                            state = await self._fold(state, self._event(key, message, done.sequence))
                            sequence = done.sequence
                            self._remember(key, state, sequence)
                        return state, sequence
                    except Conflict:
                        self._cache.pop(key, None)
                    except BaseException:
                        self._cache.pop(key, None)  # what was appended is unknown: look next time
                        raise
                raise Aborted(f"{key.aggregate} {key.id}: others kept changing it; try again")
        finally:
            if not lock.locked():
                self._locks.pop(key, None)

    @staticmethod
    def _event(key: Key, message: Message, sequence: int) -> Event:
        return Event("", key, name_of(message)[1], message, sequence, time.time())
