"""The processes of an attempt on one node, from their launch until nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import AttemptPaths, Outcome, ProcessTree
from alveary_trainer.assignment import Assignment, Progress
from alveary_trainer.attempt_logs import AttemptLogs
from alveary_trainer.background import BackgroundTasks, cancel_and_wait
from alveary_trainer.context_server import ContextServer
from alveary_trainer.end_signal import EndReason, EndSignal, Fenced
from alveary_trainer.gang_channel import GangChannel
from alveary_trainer.launcher import ProcessLauncher
from alveary_trainer.lines import Lines
from alveary_trainer.rank_state import Rank
from alveary_trainer.ranks import Ranks
from alveary_trainer.resource_watch import watch_resources
from alveary_trainer.shipper import pump
from alveary_trainer.staging import StagedAttempt

# How long killed processes may take to end before the attempt fails, and where it has failed already.
_KILLED_SECONDS, _EXIT_TIMEOUT_SECONDS = 120.0, 30.0
_KILL_AGAIN_SECONDS = 0.2
# How long the output of ended processes may take to be read.
_READ_SECONDS = 120.0
# How long ranks and script may take to be heard where supervising has failed.
_HURRIED_SECONDS = 0.1
_TAIL_LINES = 20


class Unkillable(Exception):
    """Killed processes do not end."""


@dataclass(frozen=True)
class SupervisedOutcome:
    """How the processes of one node ended."""

    outcome: Outcome
    # Ranks of this node by number; empty where the attempt has one process.
    ranks: Mapping[int, Rank]


class ProcessSupervisor:
    """Supervises one attempt on this node."""

    def __init__(
        self,
        assignment: Assignment,
        channel: GangChannel,
        logs: AttemptLogs,
        progress: Progress,
        end: EndSignal,
        make_background: Callable[[AttemptPaths], BackgroundTasks],
        make_script_server: Callable[[AttemptPaths], ContextServer],
        on_running: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """`on_running` is run beside the processes once they run."""
        self._assignment, self._channel, self._logs = assignment, channel, logs
        self._progress, self._end = progress, end
        self._make_background, self._make_script_server = make_background, make_script_server
        self._on_running = on_running
        self._log = logs.log_system_line
        # What was launched; None: nothing is.
        self.tree: ProcessTree | None = None
        # The newest lines of what was launched.
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        # Ranks of this node by number, as far as they are known; empty where the attempt has one process.
        self.ranks: Mapping[int, Rank] = {}
        # Unix seconds.
        self._ended_at = 0.0
        end.subscribe(lambda end: self.kill() if end.reason is EndReason.FENCED else None)

    def kill(self) -> None:
        """SIGKILL to every process; harmless to repeat."""
        if self.tree is not None:
            self.tree.kill()

    async def run(self, staged: StagedAttempt, team: launch.Team, command: Sequence[str]) -> SupervisedOutcome:
        """Launch the processes, and return when nothing of them is left.

        `command`: what mpirun wants started here, of a follower.

        Raises:
            StagingFailed: they cannot be started.
            Unkillable: they were killed and do not end.
        """
        it, node = self._assignment, self._assignment.node
        (it.root / "tmp").mkdir(mode=0o700)
        sockets = node.sockets_dir / it.name
        sockets.mkdir(mode=0o700, parents=True)
        paths = AttemptPaths(it.name, it.root, sockets / "run.sock", node.runtime_dir, staged.inputs)
        async with contextlib.AsyncExitStack() as closing:
            closing.callback(node.runtime.leave, paths)
            closing.push_async_callback(asyncio.to_thread, shutil.rmtree, sockets, ignore_errors=True)
            server = self._make_script_server(paths)
            ranks = Ranks(sockets, self._logs.lines, it.number, self._channel.launch_on)
            self.ranks = ranks.ranks
            closing.push_async_callback(ranks.finish, _HURRIED_SECONDS)
            await server.start()
            closing.push_async_callback(server.finish, _HURRIED_SECONDS)
            background = self._make_background(paths)
            closing.push_async_callback(background.close)
            launcher = ProcessLauncher(it, paths, staged, team)
            self.tree = await launcher.launch(ranks, command)
            outcome = await self._watch(self.tree, ranks, server, background)
            self.ranks = self._ranks(ranks, outcome)
            return SupervisedOutcome(outcome, self.ranks)

    def _ranks(self, ranks: Ranks, outcome: Outcome) -> Mapping[int, Rank]:
        """Those that the launcher reported; of a gang without a launcher, the program itself is a rank."""
        it = self._assignment
        if it.node_count == 1 or launch.has_ranks(it.spec):
            return ranks.ranks
        stopped = self._end.end is not None and self._end.end.reason.graceful
        return {it.index: Rank(it.index, 0, self.tail, outcome.exit_code, outcome.signal, stopped, self._ended_at)}

    async def _watch(self, tree: ProcessTree, ranks: Ranks, server: ContextServer, background: BackgroundTasks) -> Outcome:
        """How the processes ended, once what they left is read."""
        self._progress.phase = pb.ATTEMPT_PHASE_RUNNING
        output_ended = asyncio.Event()
        pumps = self._read_output(tree, output_ended)
        memory_bytes = self._assignment.spec.resources.memory_bytes
        watchers = [
            asyncio.create_task(watch_resources(tree, memory_bytes, self._progress, self._end, self._log)),
            asyncio.create_task(self._enforce_end(tree, ranks)),
            asyncio.create_task(self._on_running()),
        ]
        background.start()
        try:
            outcome = await self._wait(tree, watchers)
            self._progress.phase = pb.ATTEMPT_PHASE_FINALIZING
            self._ended_at = time.time()
            self._end.begin_storing()
            output_ended.set()
            if outcome.left:
                pids = ", ".join(map(str, outcome.left))
                self._log(f"processes {pids} were killed and do not die: they wait for a device or a file system")
            await self._finish_output(pumps)
            await ranks.finish()
            await background.finish_logs()
            await server.finish()
            await background.finish_checkpoints()
            return outcome
        finally:
            await cancel_and_wait(*watchers, *pumps)

    def _read_output(self, tree: ProcessTree, ended: asyncio.Event) -> list[asyncio.Task[None]]:
        it = self._assignment
        prefix = "launcher-" if launch.has_ranks(it.spec) else ""
        tasks = []
        for descriptor, name in ((tree.stdout, "stdout"), (tree.stderr, "stderr")):
            lines = Lines(self._logs.lines, f"{prefix}{name}", it.first_rank, it.number, self.tail)
            tasks.append(asyncio.create_task(pump(descriptor, lines, self._logs.lines, ended)))
        return tasks

    async def _wait(self, tree: ProcessTree, watchers: Sequence[asyncio.Task[None]]) -> Outcome:
        """How the processes ended; where a watcher fails, they are killed, and its failure is raised."""
        waiting, running = asyncio.ensure_future(tree.wait()), set(watchers)
        try:
            while not waiting.done():
                done, _ = await asyncio.wait({waiting, *running}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & running:
                    running.discard(task)
                    task.result()
            return waiting.result()
        finally:
            deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
            while not waiting.done() and time.monotonic() < deadline:
                tree.kill()  # again: a process that is just being started was not there the first time
                await asyncio.wait({waiting}, timeout=_KILL_AGAIN_SECONDS)
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def _enforce_end(self, tree: ProcessTree, ranks: Ranks) -> None:
        """Once the end is requested: SIGTERM to the main process of each rank, the grace period, SIGKILL to all."""
        end, grace = await self._end.wait(), self._assignment.spec.grace_seconds
        if end.reason.graceful:
            self._log(f"{end.sentence}: SIGTERM, then SIGKILL after {grace:g} s")
            if not ranks.ask():
                tree.terminate()
            with contextlib.suppress(Fenced):
                await self._end.run_until_fenced(asyncio.sleep(grace))
        killed_at = time.monotonic()
        while True:  # until the end of the processes cancels this
            tree.kill()
            await asyncio.sleep(_KILL_AGAIN_SECONDS)
            if time.monotonic() - killed_at > _KILLED_SECONDS:
                raise Unkillable(
                    f"its processes have not ended {_KILLED_SECONDS:.0f} s after SIGKILL: the kernel holds them, look at the node"
                )

    async def _finish_output(self, pumps: Sequence[asyncio.Task[None]]) -> None:
        """Read what the processes left in their pipes, which end when no process holds them any more."""
        _, late = await asyncio.wait(pumps, timeout=_READ_SECONDS)
        if late:
            self._log(f"its output was still open {_READ_SECONDS:.0f} s after its end: what comes now is not kept")
        await cancel_and_wait(*late)
        for task in pumps:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
