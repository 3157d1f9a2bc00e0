"""Queries beside the event loop: read-only SQLite connections, each in a thread of its own."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from alveary_core.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")
# Look-ups by key have threads that no list can occupy, so that they answer at once whatever else is asked.
_QUICK_THREADS, _SLOW_THREADS = 2, 2
# Queries that may wait for a thread, of each kind; beyond, callers are told to come back.
_WAITING = 500
# How often a query looks at the clock, in instructions of SQLite's machine: about a millisecond.
_INSTRUCTIONS = 20_000


class Readers:
    """Runs queries on a SQLite file that another connection writes (WAL: neither waits for the other).

    `attached`: further files by schema name, for queries over several.
    """

    def __init__(self, path: str, attached: dict[str, str] | None = None) -> None:
        self._path, self._attached = path, attached or {}
        self._local = threading.local()
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "view-quick")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, "view-slow")
        self._waiting = {False: 0, True: 0}
        self._open: list[sqlite3.Connection] = []

    def _connection(self) -> sqlite3.Connection:
        if not hasattr(self._local, "connection"):
            made = sqlite3.connect(f"file:{_quoted(self._path)}?mode=ro", uri=True, isolation_level=None, check_same_thread=False)
            made.row_factory = sqlite3.Row
            for name, path in self._attached.items():
                made.execute(f"ATTACH ? AS {name}", (f"file:{_quoted(path)}?mode=ro",))
            # temp_store: a sort that is large must not need a disk that is full.
            made.executescript("PRAGMA query_only=1; PRAGMA temp_store=MEMORY; PRAGMA busy_timeout=5000;")
            self._local.connection = made
            self._open.append(made)
        connection: sqlite3.Connection = self._local.connection
        return connection

    async def run(self, work: Callable[[sqlite3.Connection], T], *, slow: bool = False, patience: float = 30.0) -> T:
        """What `work(connection)` returns; it runs in a thread and sees one snapshot of the file.

        `slow` says that it may take more than a few milliseconds. A query whose caller is gone is interrupted.

        Raises:
            DeadlineExceeded: it took longer than `patience` seconds.
            Unavailable: too many wait already.
        """
        if self._waiting[slow] >= _WAITING:
            raise Unavailable(f"{_WAITING} queries wait already: try again in a moment")
        gone = threading.Event()

        def job() -> T:
            connection = self._connection()
            deadline = time.monotonic() + patience
            connection.set_progress_handler(lambda: gone.is_set() or time.monotonic() > deadline, _INSTRUCTIONS)
            connection.execute("BEGIN")
            try:
                return work(connection)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                    raise DeadlineExceeded(
                        f"the query was given up after {patience:g} s: ask for less, for example with a filter"
                    ) from error
                raise
            finally:
                connection.set_progress_handler(None, 0)
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

        self._waiting[slow] += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._slow if slow else self._quick, job)
        except asyncio.CancelledError:
            gone.set()
            raise
        finally:
            self._waiting[slow] -= 1

    async def rows(self, sql: str, parameters: Sequence[object] = (), *, slow: bool = False) -> list[sqlite3.Row]:
        """All rows of a query."""
        return await self.run(lambda db: db.execute(sql, parameters).fetchall(), slow=slow)

    def close(self) -> None:
        """Wait for queries under way and close the connections."""
        self._quick.shutdown()
        self._slow.shutdown()
        while self._open:
            self._open.pop().close()


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
