"""Read models: a SQLite file that each replica of a service folds from the event log, and can always make anew."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM, Event, decode

_BATCH = 500
_SCHEMA = "CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER, log TEXT)"


class Projection:
    """Base of a service's read model.

    A subclass names `subjects` and `schema`, and `apply` writes one event's rows. An event's rows and its sequence
    are committed in one transaction, so that the file is at every moment exactly the fold up to its position.
    """

    subjects: Sequence[str] = ()
    # DDL; changing it means changing `version`, upon which the file is made anew.
    schema: str = ""
    version: int = 1

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.position = 0
        self.caught_up = asyncio.Event()
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[Event], None]] = []
        self.db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        # The log is the truth: losing the newest commits of this file costs a short replay, so no fsync.
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA temp_store=MEMORY;")
        db.execute(_SCHEMA)
        if db.execute("PRAGMA user_version").fetchone()[0] not in (0, self.version):
            self._wipe(db)
        db.execute(f"PRAGMA user_version={self.version}")
        db.executescript(self.schema)
        row = db.execute("SELECT sequence FROM position").fetchone()
        self.position = row[0] if row else 0
        return db

    def _wipe(self, db: sqlite3.Connection) -> None:
        names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite_%'")]
        for name in names:
            db.execute(f'DROP TABLE "{name}"')
        db.execute(_SCHEMA)
        db.executescript(self.schema)
        self.position = 0

    def apply(self, event: Event) -> None:
        """Write the rows of one event. Runs inside the transaction."""
        raise NotImplementedError(type(self).__name__)

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` after each event is committed."""
        self._listeners.append(listener)

    async def run(self, log: EventLog) -> None:
        """Follow the log for ever."""
        info = await log.js.stream_info(STREAM)
        identity = str(info.created)
        row = self.db.execute("SELECT log FROM position").fetchone()
        if (row and row[0] != identity) or self.position > info.state.last_seq:
            telemetry.logger().warning("projection.rebuild", path=self.path, why="the event log is another one")
            self._wipe(self.db)
        self.db.execute("INSERT OR IGNORE INTO position VALUES (1, 0, ?)", (identity,))
        batch: list[Event] = []
        async with contextlib.aclosing(log.follow(self.subjects, self.position + 1)) as stream:
            async for item in stream:
                if item is None:
                    await self._commit(batch)
                    self.caught_up.set()
                    continue
                message, sequence = item
                with_headers = dict(message.headers or {})
                try:
                    batch.append(decode(message.subject, with_headers, message.data, sequence))
                except ValueError as error:
                    telemetry.logger().warning("event.unknown", error=str(error))
                if len(batch) >= _BATCH:
                    await self._commit(batch)

    async def _commit(self, batch: list[Event]) -> None:
        if batch:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                for event in batch:
                    self.apply(event)
                self.db.execute("UPDATE position SET sequence = ?", (batch[-1].sequence,))
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")
            self.position = batch[-1].sequence
            telemetry.VIEW.labels(type(self).__name__).set(self.position)
            for event in batch:
                for listener in self._listeners:
                    listener(event)
            batch.clear()
        async with self._changed:
            self._changed.notify_all()

    async def wait_for(self, sequence: int, patience: float = 10.0) -> None:
        """Return once the model includes `sequence`, for reads of one's own writes.

        `sequence` must be that of an event this projection follows, or older than one.

        Raises:
            Unavailable: not within `patience` seconds.
        """
        if sequence <= self.position:
            return
        try:
            async with asyncio.timeout(patience), self._changed:
                await self._changed.wait_for(lambda: self.position >= sequence)
        except TimeoutError as error:
            raise Unavailable(f"the view is at {self.position}, not yet at {sequence}: try again") from error

    async def changes(self, timeout: float) -> AsyncIterator[None]:
        """Once now, then after each change, or after `timeout` seconds without one."""
        while True:
            seen = self.position
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout), self._changed:
                    await self._changed.wait_for(lambda seen=seen: self.position > seen)  # type: ignore[misc]

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query."""
        return self.db.execute(sql, parameters).fetchall()

    def row(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row, or None."""
        found: sqlite3.Row | None = self.db.execute(sql, parameters).fetchone()
        return found

    def close(self) -> None:
        """Close the file."""
        self.db.close()
