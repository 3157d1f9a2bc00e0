"""Temporary folders for coroutines: what creates, removes and hashes files does so beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path


@contextlib.asynccontextmanager
async def folder(prefix: str, parent: Path | None = None) -> AsyncIterator[Path]:
    """A temporary folder below `parent` (default: the system's), removed at the end however the block ends."""
    made = await asyncio.to_thread(lambda: tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True))
    try:
        yield Path(made.name)
    finally:
        # A cancelled block removes its folder as well: the thread finishes even if no caller waits for it.
        await asyncio.shield(asyncio.to_thread(made.cleanup))


async def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as lower-case hex digits."""

    def work() -> str:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    return await asyncio.to_thread(work)
