"""Everything that an attempt needs, brought to this node."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer.adapters.runtime import Staged
from alveary_trainer.assignment import Assignment
from alveary_trainer.checkpoints import fetch

_RESUME = ".alveary-resume"


@dataclass(frozen=True)
class StagedAttempt:
    """What is ready on this node, for as long as the attempt holds it."""

    environment: Staged
    # Folders of datasets and models, by the names that the run gives them.
    inputs: Mapping[str, Path]
    # Where the checkpoints of an earlier attempt, or of another run, are, relative to the working directory; None: there are none.
    resume: str | None


class Stager:
    """Stages one attempt."""

    def __init__(self, assignment: Assignment, held: AsyncExitStack, log: Callable[[str], None]) -> None:
        """`held` keeps what is staged until the attempt is over. `log` writes to the run's system log."""
        self._assignment, self._held, self._log = assignment, held, log

    async def stage(self) -> StagedAttempt:
        """Fetch environment, snapshot, inputs and checkpoints, all at the same time.

        Raises:
            StagingFailed, AlvearyError, DigestMismatch: one of them cannot be had here.
        """
        it = self._assignment
        it.work.mkdir(parents=True)
        try:
            async with asyncio.TaskGroup() as group:
                environment = group.create_task(self._stage_environment())
                group.create_task(self._copy_snapshot())
                group.create_task(self._fetch_checkpoints())
                inputs = {item.name: group.create_task(self._stage_input(item)) for item in it.spec.inputs}
        except ExceptionGroup as error:
            raise error.exceptions[0] from error
        for name in ("outputs", "logs"):
            (it.work / name).mkdir(exist_ok=True)
        if self._checkpoints.is_dir():
            await asyncio.to_thread(os.rename, self._checkpoints, it.work / _RESUME)
        folders = {name: task.result() for name, task in inputs.items()}
        return StagedAttempt(environment.result(), folders, _RESUME if (it.work / _RESUME).is_dir() else None)

    @property
    def _checkpoints(self) -> Path:
        return self._assignment.root / "resume"

    async def _say(self, text: str) -> None:
        self._log(text)

    async def _stage_environment(self) -> Staged:
        it = self._assignment
        staged = it.node.runtime.stage(it.workspace, it.placement.image_digest, it.spec.environment, self._say)
        return await self._held.enter_async_context(staged)

    async def _copy_snapshot(self) -> None:
        it = self._assignment
        if it.spec.snapshot:
            async with it.node.snapshots.use(it.spec.snapshot, self._say) as source:
                await asyncio.to_thread(shutil.copytree, source, it.work, dirs_exist_ok=True, symlinks=True)

    async def _stage_input(self, item: c.InputDataset) -> Path:
        cache = self._assignment.node.models if item.model else self._assignment.node.datasets
        return await self._held.enter_async_context(cache.use(item.manifest_digest, self._say))

    async def _fetch_checkpoints(self) -> None:
        it = self._assignment
        earlier = [(it.run_id, number) for number in range(it.number - 1, 0, -1)]
        others = [(it.spec.resume_from, number) for number in range(it.spec.resume_attempt, 0, -1)]
        found = await fetch(it.node.store, [*earlier, *others], self._checkpoints)
        if found is not None:
            self._log(f"resumes from {found[2]} files of run {found[0]}, attempt {found[1]}")
