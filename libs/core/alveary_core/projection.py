"""Read models: a SQLite file that each replica of a service folds from the event log, and can always rebuild."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM, Event, UnknownEvent, decode
from alveary_core.readers import Readers

T = TypeVar("T")
# Of one transaction: events, and bytes of their bodies.
_BATCH, _BATCH_BYTES = 500, 8 << 20
# Of one transaction of a model that is folded on the event loop.
_BATCH_INLINE = 20
_SCHEMA = """
CREATE TABLE IF NOT EXISTS position (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER, log TEXT);
CREATE TABLE IF NOT EXISTS set_aside (sequence INTEGER PRIMARY KEY, subject TEXT, error TEXT, told INTEGER DEFAULT 0);
"""
# Where a batch has so many events, and none of them can be folded, the model is at fault rather than the events.
_ALL_BAD = 50
# Errors that pass, or end when there is space again: the same batch is retried for _PATIENCE seconds in all.
_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN)
_PATIENCE = 600.0
# In place of the log's identity: the file is to be rebuilt.
_AGAIN = "again"
_ERROR_CHARACTERS = 8000
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
    An event for which `apply` raises leaves no rows: it is set aside as a dead letter, and the model goes on behind it.

    `apply` runs in the writer's thread, with `db`, the writer's connection. All others read through `rows`, `row` and
    `read`, which run beside the event loop and see what is committed.
    """

    stream: str = STREAM
    subjects: Sequence[str] = ()
    # DDL; changing it means changing `version`, so that the file is rebuilt.
    schema: str = ""
    version: int = 1
    # True where `apply` changes what belongs to the event loop: then it runs there, a few events at a time.
    inline: bool = False

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
        self._log: EventLog | None = None
        # There may be events that were set aside, and no dead letter says so yet.
        self._untold = False
        self.db = self._open()
        self.readers = Readers(self.path, attached)

    # ---- the file -------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        try:
            db = self._connect()
            known = db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # a full disk is no reason to rebuild
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
        db.executescript(_SCHEMA)
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
        _execute_all(db, _SCHEMA + self.schema)
        self.position = 0

    def close(self) -> None:
        """Close the file."""
        self._writer.shutdown()
        self.readers.close()
        self.db.close()

    # ---- following the log ----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What dead letters call this model."""
        return type(self).__name__

    def decode(self, raw: Raw) -> Event | None:
        """The event of a message; None: it is none that this version knows.

        Raises:
            MalformedEvent: it claims to be one, and cannot be read.
        """
        try:
            return decode(raw.subject, raw.headers, raw.data, raw.sequence)
        except UnknownEvent as error:
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
                why = "a dead letter is tried again" if row and row[0] == _AGAIN else "the event log is another one"
                telemetry.logger().warning("projection.rebuild", path=self.path, why=why)
                self._wipe(db)
                self.forget()
            db.execute("INSERT OR IGNORE INTO position VALUES (1, 0, ?)", (identity,))

        await self.write(begin)
        self._log = log
        if not self.position:
            await log.dead_letters.forget(self.name)  # all events are folded again
        self._untold = True
        async with log.dead_letters.serving(self.name, self._retry, each=True):
            await self._follow(log)

    async def _follow(self, log: EventLog) -> None:
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
                    self._tell(listener, event)
                for watcher in self._watchers.get(event.key.id, ()):
                    watcher.set()
        async with self._changed:
            self._changed.notify_all()
        if self._untold:
            await self._tell_of_set_aside()

    @staticmethod
    def _tell(listener: Callable[[Event], None], event: Event) -> None:
        try:
            listener(event)
        except Exception as error:  # the event is committed: what one listener makes of it must not stop the model
            telemetry.logger().error("listener.failed", type=event.type, id=event.key.id, exc_info=error)

    def _fold_batch(self, batch: list[Raw]) -> list[Event]:
        try:
            return self._transaction(batch, self._fold_all)
        except Exception as error:
            if not _is_of_an_event(error):
                raise
        return self._transaction(batch, self._fold_each)

    def _transaction(self, batch: list[Raw], fold: Callable[[list[Raw]], list[Event]]) -> list[Event]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            events = fold(batch)
            self.db.execute("UPDATE position SET sequence = ?", (batch[-1].sequence,))
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            self.forget()
            raise
        return events

    def _fold_all(self, batch: list[Raw]) -> list[Event]:
        events = [event for raw in batch if (event := self.decode(raw)) is not None]
        for event in events:
            self.apply(event)
        self.flush()
        return events

    def _fold_each(self, batch: list[Raw]) -> list[Event]:
        """Fold one event after another, each in a savepoint of its own, and set aside those that cannot be folded."""
        events: list[Event] = []
        for raw in batch:
            self.db.execute("SAVEPOINT event")
            try:
                if (event := self.decode(raw)) is not None:
                    self.apply(event)
                    self.flush()
                    events.append(event)
            except Exception as error:
                if not _is_of_an_event(error) or (raw is batch[-1] and not events and len(batch) >= _ALL_BAD):
                    raise
                self.db.execute("ROLLBACK TO event")
                self.forget()
                self.set_aside(raw.sequence, raw.subject, error)
            self.db.execute("RELEASE event")
        return events

    def set_aside(self, sequence: int, subject: str, error: Exception) -> None:
        """Note, in the transaction that is open, that an event is no part of the model; a dead letter will say so."""
        text = f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"
        self.db.execute(
            "INSERT OR REPLACE INTO set_aside (sequence, subject, error) VALUES (?,?,?)",
            (sequence, subject, text[:_ERROR_CHARACTERS].encode("utf-8", "backslashreplace").decode()),
        )
        self._untold = True

    async def _tell_of_set_aside(self) -> None:
        """Make a dead letter of each event that was set aside; what cannot be told now is told with a later batch."""
        assert self._log is not None
        rows = await self.write(lambda db: db.execute("SELECT * FROM set_aside WHERE told=0 ORDER BY sequence").fetchall())
        for row in rows:
            try:
                await self._log.dead_letters.put(self.name, row["subject"], row["sequence"], row["error"])
            except Unavailable as error:
                telemetry.logger().error("dead-letter.failed", view=self.name, sequence=row["sequence"], error=str(error))
                return
            await self.write(lambda db, row=row: db.execute("UPDATE set_aside SET told=1 WHERE sequence=?", (row["sequence"],)))  # type: ignore[misc]
        self._untold = False

    async def _retry(self, sequence: int) -> tuple[str, str]:
        """Have the model rebuilt when it is opened next: an event cannot be folded out of its place."""
        await self.write(lambda db: db.execute("UPDATE position SET log=?", (_AGAIN,)))
        return "later", f"{self.name} is rebuilt when its service starts next: restart it"

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
                if error.sqlite_errorcode & 0xFF not in _PASSING or time.monotonic() > deadline:
                    raise
                telemetry.logger().warning("projection.retry", path=self.path, error=str(error), seconds=pause)
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                    telemetry.logger().error("projection.damaged", path=self.path, error=str(error))
                    Path(self.path).unlink(missing_ok=True)  # the next start rebuilds it
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

    def behind(self) -> str:
        """How far a replay is, as words; empty once it is over."""
        return "" if self.caught_up.is_set() else f"{type(self).__name__} at {self.position} of {self.goal}"

    async def settle(self, patience: float = 15.0) -> None:
        """Return when the model has caught up, or after `patience` seconds: then its service answers from what there is."""
        try:
            await asyncio.wait_for(self.caught_up.wait(), patience)
        except TimeoutError:
            telemetry.logger().warning("projection.stale", state=self.behind())

    async def ready(self, patience: float = 10.0) -> None:
        """Return when the model has caught up with what was in the log at the start: for what must not be decided on less.

        Raises:
            Unavailable: not within `patience` seconds.
        """
        try:
            await asyncio.wait_for(self.caught_up.wait(), patience)
        except TimeoutError as error:
            raise Unavailable(f"the platform is still reading its history ({self.behind()}): try again later") from error

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


def _is_of_an_event(error: Exception) -> bool:
    """Whether an error of `apply` may be the fault of its event, rather than of the disk or the file."""
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_TOOBIG
    if isinstance(error, sqlite3.DatabaseError):
        # Errors of the driver itself, such as a parameter that it cannot bind, carry no code.
        return getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, *_PASSING)
    return not isinstance(error, (MemoryError, OSError))


def _execute_all(db: sqlite3.Connection, script: str) -> None:
    """Execute statements inside the transaction that is open; `executescript` would commit it."""
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)
