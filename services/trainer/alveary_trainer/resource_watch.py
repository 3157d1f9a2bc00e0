"""What the processes of an attempt use, measured while they run; a run that exceeds its limits is ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from alveary_trainer.adapters.runtime import ProcessTree
from alveary_trainer.assignment import Progress
from alveary_trainer.end_signal import EndReason, EndSignal

_MIB = 2**20
# How often usage is measured, with and without a limit of memory; measuring takes at most a tenth of the time.
_LIMITED_SECONDS, _UNLIMITED_SECONDS = 0.25, 1.0
_MAX_SHARE = 10


async def watch_resources(tree: ProcessTree, memory_bytes: int, progress: Progress, end: EndSignal, log: Callable[[str], None]) -> None:
    """Keep `progress.usage` up to date, and request the end of an attempt that takes too much; runs until it is cancelled.

    `memory_bytes`: what the run asked for; 0: no limit.
    """
    while True:
        begun = time.monotonic()
        usage = progress.usage = await asyncio.to_thread(tree.usage)
        took = time.monotonic() - begun
        if usage.excess:
            end.request(EndReason.TOO_MANY_PROCESSES, usage.excess)
        if usage.oom_kills:
            reached = f"it reached its limit of {memory_bytes / _MIB:.0f} MiB" if memory_bytes else "the node has none left"
            log(f"out of memory: {reached}, and the kernel killed a process of it")
            end.request(EndReason.OUT_OF_MEMORY)
            return
        if memory_bytes and usage.memory_bytes > memory_bytes:
            log(f"out of memory: {usage.memory_bytes / _MIB:.0f} MiB are more than the {memory_bytes / _MIB:.0f} asked for")
            end.request(EndReason.OUT_OF_MEMORY)
        await asyncio.sleep(max(_LIMITED_SECONDS if memory_bytes else _UNLIMITED_SECONDS, _MAX_SHARE * took))
