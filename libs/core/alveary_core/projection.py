"""Read models: a SQLite file that each replica of a service folds from the event log, and can always make anew."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM, Event, decode
from alveary_core.readers import Readers

T = TypeVar("T")
# Of one transaction: events, and bytes of their bodies.
_BATCH, _BATCH_BYTES = 500, 8 << 20
# Of one transaction of a model that is folded on the event loop.
_BATCH_INLINE = 20
_SCHEMA = "CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER, log TEXT)"
# What passes by itself, or when somebody makes room: the same batch is tried again, for so many seconds in all.
_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN)
_PATIENCE = 600.0
# How often a replay says how far it is, seconds.
_SAY = 5.0


@dataclass(frozen=True)
class Raw:
    """A message of the stream, not decoded yet."""

    subject: str
    headers: dict[str, str]
    data: bytes
    sequence: int


class Projection:
    """Base of a service's read model.

    A subclass names `subjects` and `schema`, and `apply` writes one event's rows to `db`. An event's rows and its
    sequence are committed in one transaction, so that the file is at every moment exactly the fold up to its position.

    `apply` runs in the writer's thread, with `db`, the writer's connection. Everybody else reads through `rows`, `row` and
    `read`, which run beside the event loop and see what is committed.
    """

    stream: str = STREAM
    subjects: Sequence[str] = ()
    # DDL; changing it means changing `version`, upon which the file is made anew.
    schema: str = ""
    version: int = 1
    # True where `apply` changes what belongs to the event loop: then it runs there, a few events at a time.
    inline: bool = False
    # Of an inline model: True where `apply` may be called again for an event whose transaction was rolled back.
    repeatable: bool = False

    def __init__(self, path: Path | str, attached: dict[str, str] | None = None) -> None:
        self.path = str(path)
        # Sequence up to which the file includes the log, and what the log's newest was when it was last looked at.
        self.position = 0
        self.goal = 0
        self.caught_up = asyncio.Event()
        self._changed = asyncio.Condition()
        self._listeners: list[Callable[[Event], None]] = []
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self._writer = ThreadPoolExecutor(1, "view-writer")
        self._said = 0.0
        self.db = self._open()
        self.readers = Readers(self.path, attached)

    # ---- the file -------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        try:
            db = self._connect()
            known = db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # a disk that is full is no reason to begin anew
                raise
            telemetry.logger().warning("projection.rebuild", path=self.path, why=f"the file is damaged: {error}")
            db, known = None, -1
        if known not in (0, self.version):
            if db is not None:
                db.close()
            for suffix in ("", "-wal", "-shm"):
                Path(self.path + suffix).unlink(missing_ok=True)
            db = self._connect()
        assert db is not None
        db.execute(_SCHEMA)
        db.execute(f"PRAGMA user_version={self.version}")
        db.executescript(self.schema)
        row = db.execute("SELECT sequence FROM position").fetchone()
        self.position = row[0] if row else 0
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        # The log is the truth: losing the newest commits of this file costs a short replay, so no fsync.
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF; PRAGMA temp_store=MEMORY; PRAGMA busy_timeout=5000;")
        return db

    def _wipe(self, db: sqlite3.Connection) -> None:
        names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type='table' AND name NOT LIKE 'sqlite_%'")]
        for name in names:
            db.execute(f'DROP TABLE "{name}"')
        db.execute(_SCHEMA)
        db.executescript(self.schema)
        self.position = 0

    def close(self) -> None:
        """Close the file."""
        self._writer.shutdown()
        self.readers.close()
        self.db.close()

    # ---- following the log ----------------------------------------------------------------------------------------

    def decode(self, raw: Raw) -> Event | None:
        """The event of a message; None: it is none that this version knows."""
        try:
            return decode(raw.subject, raw.headers, raw.data, raw.sequence)
        except ValueError as error:
            telemetry.logger().warning("event.unknown", error=str(error))
            return None

    def apply(self, event: Event) -> None:
        """Write the rows of one event. Runs inside the transaction, in the writer's thread unless `inline`."""
        raise NotImplementedError(type(self).__name__)

    def flush(self) -> None:
        """Write what `apply` kept back. Runs once before each commit, where `apply` runs."""

    def forget(self) -> None:
        """The transaction was rolled back: drop what `apply` remembers of it."""

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` on the event loop after each event is committed."""
        self._listeners.append(listener)

    async def run(self, log: EventLog) -> None:
        """Follow the log for ever."""
        info = await log.info(self.stream)
        identity, self.goal = str(info.created), info.state.last_seq

        def begin(db: sqlite3.Connection) -> None:
            row = db.execute("SELECT log FROM position").fetchone()
            if (row and row[0] != identity) or self.position > self.goal:
                telemetry.logger().warning("projection.rebuild", path=self.path, why="the event log is another one")
                self._wipe(db)
            db.execute("INSERT OR IGNORE INTO position VALUES (1, 0, ?)", (identity,))

        await self.write(begin)
        batch: list[Raw] = []
        size = 0
        most = _BATCH_INLINE if self.inline else _BATCH
        async with contextlib.aclosing(log.follow(self.subjects, self.position + 1, self.stream)) as stream:
            async for item in stream:
                if item is not None:
                    message, sequence = item
                    batch.append(Raw(message.subject, dict(message.headers or {}), message.data, sequence))
                    size += len(message.data)
                    if len(batch) < most and size < _BATCH_BYTES:
                        continue
                await self._commit(batch)
                batch, size = [], 0
                if item is None and not self.caught_up.is_set():
                    self._progress(done=True)
                    self.caught_up.set()
                elif not self.caught_up.is_set():
                    self._progress(done=False)

    async def _commit(self, batch: list[Raw]) -> None:
        if batch:
            events = await self._patiently(lambda: self._fold_batch(batch))
            self.position = batch[-1].sequence
            telemetry.VIEW.labels(type(self).__name__).set(self.position)
            for event in events:
                for listener in self._listeners:
                    listener(event)
                for watcher in self._watchers.get(event.key.id, ()):
                    watcher.set()
        async with self._changed:
            self._changed.notify_all()

    def _fold_batch(self, batch: list[Raw]) -> list[Event]:
        events = [event for raw in batch if (event := self.decode(raw)) is not None]
        self.db.execute("BEGIN IMMEDIATE")
        try:
            for event in events:
                self.apply(event)
            self.flush()
            self.db.execute("UPDATE position SET sequence = ?", (batch[-1].sequence,))
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.forget()
            raise
        return events

    async def _patiently(self, work: Callable[[], T]) -> T:
        """Do it where `apply` runs; while the disk is full or the file is locked, again."""
        deadline, pause = time.monotonic() + _PATIENCE, 0.1
        while True:
            try:
                if self.inline:
                    return work()
                future = asyncio.get_running_loop().run_in_executor(self._writer, work)
                try:
                    return await asyncio.shield(future)
                except asyncio.CancelledError:
                    await asyncio.wait({future})  # a transaction under way ends before the file is closed
                    raise
            except sqlite3.OperationalError as error:
                # Extended codes hold the primary one in their low byte.
                # What an inline model remembers was changed already; unless it sees to that, it is read again after a restart.
                if (self.inline and not self.repeatable) or error.sqlite_errorcode & 0xFF not in _PASSING or time.monotonic() > deadline:
                    raise
                telemetry.logger().warning("projection.retry", path=self.path, error=str(error), seconds=pause)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    telemetry.logger().error("projection.damaged", path=self.path, error=str(error))
                    Path(self.path).unlink(missing_ok=True)  # the next start makes it anew
                raise
            await asyncio.sleep(pause)
            pause = min(pause * 2, 10.0)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work(db)` returns, in a transaction of its own: for what is known of the file alone, not of the log."""

        def job() -> T:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                result = work(self.db)
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
            return result

        return await self._patiently(job)

    def _progress(self, *, done: bool) -> None:
        """Say how far a replay is: in the log, and in a file beside the model that is gone when it is over."""
        path, now = Path(self.path + ".progress"), time.monotonic()
        if done:
            path.unlink(missing_ok=True)
        elif now - self._said >= _SAY:
            self._said = now
            state = {"view": type(self).__name__, "position": self.position, "goal": self.goal, "at": time.time()}
            telemetry.logger().info("projection.replay", **state)
            fresh = Path(self.path + ".progress.new")
            fresh.write_text(json.dumps(state))
            fresh.replace(path)

    # ---- waiting --------------------------------------------------------------------------------------------------

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

    async def changes(self, about: str, timeout: float) -> AsyncIterator[None]:
        """Once now, then after each event of the aggregate with the id `about`, or after `timeout` seconds without one."""
        changed = asyncio.Event()
        watchers = self._watchers.setdefault(about, set())
        watchers.add(changed)
        try:
            while True:
                changed.clear()
                yield
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(timeout):
                        await changed.wait()
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(about) is watchers:
                del self._watchers[about]

    # ---- reading --------------------------------------------------------------------------------------------------

    async def read(self, work: Callable[[sqlite3.Connection], T], *, slow: bool = False) -> T:
        """What `work(connection)` returns, on one snapshot and beside the event loop; see `Readers.run`."""
        return await self.readers.run(work, slow=slow)

    async def rows(self, sql: str, parameters: Sequence[Any] = (), *, slow: bool = False) -> list[sqlite3.Row]:
        """All rows of a query."""
        return await self.readers.rows(sql, parameters, slow=slow)

    async def row(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Row | None:
        """The first row, or None."""
        found: sqlite3.Row | None = await self.readers.run(lambda db: db.execute(sql, parameters).fetchone())
        return found
