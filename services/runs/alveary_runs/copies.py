"""Copies of read models in the object store: a model that is lost is fetched and folded on from there, not from the first event.

A copy is a cache. It is used where it is of this log and this version of the schema, and whole (its digest says so); else the
model is made from the log alone. It holds what the model holds: code that erases something from the log removes the
copies (`views/`) as well.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import zstandard

from alveary_core import scratch, telemetry
from alveary_core.errors import AlvearyError, NotFound
from alveary_core.eventlog import EventLog
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_core.projection import Projection

BUCKET = "views"
# How often it is looked whether a copy is due, seconds, and which part of the time may go into making copies.
_LOOK_SECONDS, _SHARE = 60.0, 0.02
# Free disk that making a copy must leave, bytes.
_ROOM = 1 << 30


class Copies:
    """Copies of one read model, `name`. A new one is made each `messages` messages."""

    def __init__(self, log: EventLog, store: ObjectStore, name: str, messages: int) -> None:
        self._log, self._store, self._name, self._messages = log, store, name, messages
        self._head = f"runs/{name}.json"

    async def restore(self, path: Path, kind: type[Projection]) -> bool:
        """Fetch the newest copy where there is no file; says whether there is one now. A copy that cannot be used is no error."""
        if await asyncio.to_thread(path.exists):
            return False
        try:
            head = json.loads(await self._store.get(BUCKET, self._head))
            info = await self._log.info(kind.stream)
            if (head["version"], head["log"]) != (kind.version, str(info.created)) or head["sequence"] > info.state.last_seq:
                telemetry.logger().info("copy.other", view=self._name, sequence=head["sequence"])
                return False
            async with scratch.folder(".copy-", path.parent) as folder:
                await self._store.get_file(BUCKET, head["key"], folder / "packed", head["sha256"])
                await asyncio.to_thread(_unpack, folder / "packed", folder / "view")
                await asyncio.to_thread((folder / "view").rename, path)
        except NotFound:
            return False
        except (AlvearyError, DigestMismatch, ValueError, KeyError, TypeError, OSError, zstandard.ZstdError) as error:
            telemetry.logger().warning("copy.unusable", view=self._name, error=f"{type(error).__name__}: {error}")
            return False
        telemetry.logger().info("copy.restored", view=self._name, sequence=head["sequence"])
        return True

    async def keep(self, view: Projection) -> None:
        """For ever: make a copy when enough has come since the last one."""
        await view.caught_up.wait()
        try:
            last = int(json.loads(await self._store.get(BUCKET, self._head))["sequence"])
        except (AlvearyError, ValueError, KeyError, TypeError):
            last = 0
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            # A new log begins again at 1.
            if 0 <= view.position - last < self._messages:
                continue
            started = time.monotonic()
            try:
                last = await self.make(view)
            except (AlvearyError, OSError, sqlite3.Error) as error:
                telemetry.logger().warning("copy.failed", view=self._name, error=f"{type(error).__name__}: {error}")
            await asyncio.sleep((time.monotonic() - started) / _SHARE)

    async def make(self, view: Projection) -> int:
        """Store a copy; returns the sequence that it includes."""
        source = Path(view.path)
        async with scratch.folder(".copy-", source.parent) as folder:
            state = await asyncio.to_thread(_pack, source, folder)
            if state is None:
                raise OSError(f"a copy of {source} needs more room than its disk has")
            key = f"runs/{self._name}/{state['sequence']}.sqlite.zst"
            entry = await self._store.put_file(BUCKET, key, folder / "packed")
        head = {**state, "version": view.version, "key": key, "sha256": entry.sha256}
        await self._store.put(BUCKET, self._head, json.dumps(head).encode())
        older = [k for k in await self._store.keys(BUCKET, f"runs/{self._name}/") if k != key]
        await self._store.delete(BUCKET, older)
        telemetry.logger().info("copy.made", view=self._name, sequence=state["sequence"], bytes=entry.size)
        return int(state["sequence"])


def _pack(source: Path, folder: Path) -> dict[str, Any] | None:
    """One snapshot of the file, compressed, as `packed`; None: there is no room."""
    size = sum(p.stat().st_size for p in (source, source.with_name(source.name + "-wal")) if p.exists())
    if shutil.disk_usage(folder).free < 2 * size + _ROOM:
        return None
    original = sqlite3.connect(f"file:{source}?mode=ro", uri=True)
    copy = sqlite3.connect(folder / "view")
    try:
        original.backup(copy)
        sequence, log = copy.execute("SELECT sequence, log FROM position").fetchone()
        copy.execute("PRAGMA journal_mode=DELETE")
    finally:
        copy.close()
        original.close()
    with (folder / "view").open("rb") as whole, (folder / "packed").open("wb") as packed:
        zstandard.ZstdCompressor(level=3).copy_stream(whole, packed)
    return {"sequence": sequence, "log": log}


def _unpack(packed: Path, view: Path) -> None:
    with packed.open("rb") as source, view.open("wb") as target:
        zstandard.ZstdDecompressor().copy_stream(source, target)
