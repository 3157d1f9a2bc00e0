"""What goes on beside the processes of an attempt: ./logs is followed and synced, checkpoints are copied away.

A failure of these does not end the run: the log says so, and the task starts again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from alveary_core import telemetry
from alveary_trainer.assignment import Assignment, Progress
from alveary_trainer.attempt_logs import AttemptLogs
from alveary_trainer.checkpoints import Checkpoints
from alveary_trainer.end_signal import EndSignal
from alveary_trainer.file_walk import walk
from alveary_trainer.log_folder import LogFolder
from alveary_trainer.outputs import OutputStore

_CHECKPOINT_SECONDS = 1.0
# How often ./logs is looked at for files to be synced, and how long a task that failed pauses.
_SYNC_SECONDS = 5.0
# Looking takes at most a twentieth of the time.
_MAX_SHARE = 20
# Larger files are synced once they have not changed for _STILL_SECONDS, and even larger ones at the end alone.
_LARGE_BYTES, _STILL_SECONDS, _TOO_LARGE_BYTES = 64 << 20, 10.0, 4 << 30
_FOLLOWING, _SYNCING, _COPYING = "following ./logs", "syncing ./logs", "copying its checkpoints away"


async def cancel_and_wait(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks, and return when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class BackgroundTasks:
    """Of one attempt on one node."""

    def __init__(
        self,
        assignment: Assignment,
        outputs: OutputStore,
        checkpoints: Checkpoints,
        logs: AttemptLogs,
        progress: Progress,
        end: EndSignal,
        below: Path,
    ) -> None:
        """`below`: where what is read on behalf of the processes must lie."""
        self._assignment, self._outputs, self._checkpoints = assignment, outputs, checkpoints
        self._log, self._progress, self._end, self._below = logs.log_system_line, progress, end, below
        folder = assignment.work / "logs"
        self._folder = LogFolder(folder, logs.lines, assignment.number, below, assignment.first_rank, self._log)
        # Failures that the log has told of.
        self._told: set[str] = set()
        self._about_logs: list[asyncio.Task[None]] = []
        self._copying: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """The processes run."""
        works: list[tuple[Callable[[], Awaitable[None]], str]] = [(self._folder.run, _FOLLOWING)]
        if self._assignment.index == 0:
            works.append((self._sync_logs, _SYNCING))
        self._about_logs = [asyncio.create_task(self._run_forever(*work)) for work in works]
        self._copying = [asyncio.create_task(self._copy_checkpoints())]

    async def finish_logs(self) -> None:
        """The processes have ended: ship the rest of ./logs as lines."""
        await cancel_and_wait(*self._about_logs)
        await self._attempt(self._folder.finish, _FOLLOWING)

    async def finish_checkpoints(self) -> None:
        """The processes have ended: copy whatever checkpoints there are, unless storing is interrupted."""
        await cancel_and_wait(*self._copying)
        await self._end.run_until_interrupted(self._end.run_until_fenced(self._copy_once(last=True)))

    async def close(self) -> None:
        """Stop everything."""
        await cancel_and_wait(*self._about_logs, *self._copying)
        self._folder.close()

    async def _run_forever(self, work: Callable[[], Awaitable[None]], what: str) -> None:
        while True:
            await self._attempt(work, what)
            await asyncio.sleep(_SYNC_SECONDS)

    async def _attempt(self, work: Callable[[], Awaitable[None]], what: str) -> None:
        """Do something whose failure does not end the run."""
        try:
            await work()
        except Exception as error:
            telemetry.logger().exception("attempt.background", run=self._assignment.run_id, what=what)
            text = f"{what} failed: {type(error).__name__}: {error}"
            if text not in self._told:
                self._told.add(text)
                self._log(text)

    async def _sync_logs(self) -> None:
        """Store what of ./logs is not followed as text (event files, profiles) while the run lives."""
        while True:
            begun = time.monotonic()
            found = await asyncio.to_thread(walk, self._assignment.work, ("logs",), self._outputs.own, self._below)
            files = [f for f in found.files if not self._folder.follows((f.device, f.inode)) and f.size <= _TOO_LARGE_BYTES]
            looked = time.monotonic() - begun
            await self._outputs.sync(files, _LARGE_BYTES, _STILL_SECONDS)
            await asyncio.sleep(max(_SYNC_SECONDS, _MAX_SHARE * looked))

    async def _copy_checkpoints(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_SECONDS)
            await self._copy_once()

    async def _copy_once(self, *, last: bool = False) -> None:
        if self._end.stores_nothing:
            return

        async def copy() -> None:
            if await self._checkpoints.sync(self._below, last=last):
                self._progress.checkpoint_at = time.monotonic()

        await self._attempt(copy, _COPYING)
