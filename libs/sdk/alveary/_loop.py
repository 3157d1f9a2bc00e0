"""The event loop behind the synchronous classes: one thread for the process."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from alveary.errors import AlvearyError

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
# Of the process that the loop was started in.
_pid = 0
_THREAD = "alveary-loop"


def loop() -> asyncio.AbstractEventLoop:
    """The loop, started when first asked for.

    Raises:
        AlvearyError: this process was forked from one that had started it. A fork has none of its parent's threads: neither the
            loop's nor those of gRPC, which cannot be started again in it.
    """
    global _loop, _pid
    if _pid not in (0, os.getpid()):  # before the lock, which may have been held at the fork
        raise AlvearyError(
            "this process was forked from one that talks to the platform, and gRPC does not survive a fork: start the process with the "
            "method 'spawn' or 'forkserver' (multiprocessing.get_context('spawn'), DataLoader(multiprocessing_context='spawn')), or "
            "use the workspace in the parent alone",
            "FAILED_PRECONDITION",
        )
    with _lock:
        if _loop is None:
            _loop, _pid = asyncio.new_event_loop(), os.getpid()
            threading.Thread(target=_loop.run_forever, name=_THREAD, daemon=True).start()
        return _loop


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on the loop and wait for it; Ctrl-C cancels it.

    Raises:
        AlvearyError: see `loop`.
        RuntimeError: called on the loop itself, where waiting would never end.
    """
    if threading.current_thread().name == _THREAD:
        work.close()
        raise RuntimeError("the synchronous classes cannot be used inside a coroutine of their own client: use alveary.aio there")
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop())
    except AlvearyError:
        work.close()
        raise
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
