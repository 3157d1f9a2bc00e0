"""The event loop behind the synchronous classes: one thread for the process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from alveary._fork import claim_grpc
from alveary.errors import AlvearyError

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_THREAD = "alveary-loop"
# How often the waiting thread looks for signals. A wait without a limit misses a Ctrl-C that arrives just before it begins, or
# that the kernel gives to another thread: nothing interrupts it then.
_LOOK_SECONDS = 0.5


def loop() -> asyncio.AbstractEventLoop:
    """The loop, started when first asked for.

    Raises:
        AlvearyError: this process was forked from one that uses the platform (`alveary._fork`).
    """
    global _loop
    claim_grpc()  # before the lock, which may have been held at the fork
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
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
        while True:
            try:
                return future.result(_LOOK_SECONDS)
            except TimeoutError:
                if future.done():  # it is the work's own
                    return future.result()
    except BaseException:
        future.cancel()
        raise
