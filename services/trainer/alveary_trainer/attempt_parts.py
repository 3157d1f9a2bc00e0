"""The composition root of an attempt: its parts, made for its role in the gang, and closed at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from alveary_core import telemetry
from alveary_trainer.adapters.runtime import AttemptPaths
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.assignment import Assignment, Progress
from alveary_trainer.attempt_logs import AttemptLogs
from alveary_trainer.background import BackgroundTasks
from alveary_trainer.checkpoints import Checkpoints
from alveary_trainer.context_server import ContextServer
from alveary_trainer.end_signal import EndSignal
from alveary_trainer.outputs import OutputStore
from alveary_trainer.roles import role_of
from alveary_trainer.script_api import operations
from alveary_trainer.staging import Stager
from alveary_trainer.supervisor import ProcessSupervisor

# How long each part may take to be closed.
_CLOSE_SECONDS = 30.0


class AttemptParts:
    """What the phases of an attempt work with."""

    def __init__(
        self, assignment: Assignment, end: EndSignal, progress: Progress, on_running: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """`on_running`: see ProcessSupervisor."""
        it, node = assignment, assignment.node
        self._assignment, self._end, self._progress = assignment, end, progress
        self.logs = AttemptLogs(it)
        self.log: Callable[[str], None] = self.logs.log_system_line
        self.store = OutputStore(node.store, it.run_id, it.number, it.index, it.work, self.log)
        kept, folder = node.settings.checkpoints_kept, it.work / "outputs/checkpoints"
        self._checkpoints = Checkpoints(node.store, it.run_id, it.number, folder, kept, it.index, self.log)
        # What is held on this node until the attempt is over.
        self.held = AsyncExitStack()
        self.stager = Stager(it, self.held, self.log)
        role = role_of(it, self.store, end, self.log)
        self.channel, self.events, self.outputs = role.channel, role.events, role.outputs
        self.supervisor = ProcessSupervisor(
            it, self.channel, self.logs, progress, end, self._make_background, self._make_script_server, on_running
        )

    def _make_script_server(self, paths: AttemptPaths) -> ContextServer:
        self.store.own, self.store.below = paths.root, self._assignment.node.runtime.readable_below(paths)
        asks = operations(self._assignment, paths, self.store, self.log)
        return ContextServer(paths.socket, self._assignment.run_id, self.logs.metrics, asks, self.log)

    def _make_background(self, paths: AttemptPaths) -> BackgroundTasks:
        below = self._assignment.node.runtime.readable_below(paths)
        return BackgroundTasks(self._assignment, self.store, self._checkpoints, self.logs, self._progress, self._end, below)

    async def close(self) -> None:
        """Leave nothing of the attempt on this node; a part that cannot be closed holds up no other."""

        async def stop() -> None:
            self.store.stop()
            self.supervisor.kill()

        steps = (
            self.events.close,
            stop,
            self.channel.close,
            self.logs.lines.close,
            self.logs.metrics.close,
            self.held.aclose,
            lambda: asyncio.to_thread(remove_tree, self._assignment.root),
        )
        for step in steps:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await step()
            except Exception:
                telemetry.logger().exception("attempt.close", attempt=self._assignment.name)
