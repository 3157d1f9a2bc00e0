"""One attempt of a run on this node: stage, rendezvous, supervise, classify, store, report.

Each node of a run has an `Attempt`, its part of the placement. In a gang the first node leads, and writes the attempt's events.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence
from contextlib import AsyncExitStack

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch
from alveary_trainer import exit_status, launch
from alveary_trainer.adapters.runtime import AttemptPaths, Host, Outcome, StagingFailed
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.assignment import Assignment, Progress
from alveary_trainer.attempt_logs import AttemptLogs
from alveary_trainer.background import BackgroundTasks
from alveary_trainer.checkpoints import Checkpoints
from alveary_trainer.context_server import ContextServer
from alveary_trainer.end_signal import EndReason, EndSignal, Fenced
from alveary_trainer.file_names import printable
from alveary_trainer.member_outputs import upload_failed
from alveary_trainer.node import NodeContext
from alveary_trainer.outputs import OutputStore
from alveary_trainer.rank_state import first_failure
from alveary_trainer.roles import role_of
from alveary_trainer.script_api import operations
from alveary_trainer.staging import StagedAttempt, Stager
from alveary_trainer.supervisor import ProcessSupervisor, SupervisedOutcome

_ALONE = Host("localhost", "", 0)
# How long attempts that lost their place on this node may take to be gone: they were killed.
_PREDECESSOR_SECONDS = 30.0
# How long each part of an attempt may take to be closed.
_CLOSE_SECONDS = 30.0
# How long logs and metrics may stand still at the end before the rest is lost; while the disk is full; where storing is interrupted.
_STALLED_SECONDS, _DISK_FULL_SECONDS, _HURRIED_SECONDS = 60.0, 900.0, 10.0
_MAX_FAULT_CHARACTERS = 4000


class Attempt:
    """One node's part of an attempt, from its placement to the report of its end."""

    def __init__(
        self, node: NodeContext, key: Key, placement: ev.PlacementMade, index: int = 0, after: Sequence[asyncio.Task[None]] = ()
    ) -> None:
        """`index` into the placement's nodes. `after`: attempts that must be gone from this node before anything is launched."""
        it = self.assignment = Assignment(node, key.workspace, key.id, placement, index)
        self._after = after
        self.end, self.progress = EndSignal(), Progress()
        self._logs = AttemptLogs(it)
        self._log = self._logs.log_system_line
        self._outputs = OutputStore(node.store, it.run_id, it.number, index, it.work, self._log)
        kept = node.settings.checkpoints_kept
        folder = it.work / "outputs/checkpoints"
        self._checkpoints = Checkpoints(node.store, it.run_id, it.number, folder, kept, index, self._log)
        # What is held on this node until the attempt is over.
        self._held = AsyncExitStack()
        self._stager = Stager(it, self._held, self._log)
        role = role_of(it, self._outputs, self.end, self._log)
        self._channel, self._events, self._member_outputs = role.channel, role.events, role.outputs
        self._supervisor = ProcessSupervisor(
            it, self._channel, self._logs, self.progress, self.end, self._background, self._script_server, self._started
        )

    async def run(self) -> None:
        """Run the attempt to its end, and remove everything it left on this node. A failure in here fails no other attempt."""
        it = self.assignment
        try:
            self._events.publish(ev.AttemptAccepted(node=it.allocation.node, incarnation=it.node.incarnation))
            finished = await self._finish(await self._stage_and_supervise())
            await self.end.run_until_fenced(self._report(finished))
        except Fenced:
            telemetry.logger().info("attempt.fenced", run=it.run_id, attempt=it.number, member=it.index)
        finally:
            await self._clean_up()

    # ---- the phases -----------------------------------------------------------------------------------------------

    async def _stage_and_supervise(self) -> tuple[c.ExitStatus, SupervisedOutcome]:
        """Exit status and outcome of this node's processes, which have ended, or were never launched."""
        supervised = SupervisedOutcome(Outcome(), {})
        try:
            await self._channel.start()
            prepared = await self.end.run_until_end(self._prepare())
            if prepared is not None and self.end.end is None:
                supervised = await self._supervisor.run(*prepared)
            self.end.raise_if_fenced()
            return self._classify(supervised), supervised
        except Fenced:
            raise
        except (StagingFailed, DigestMismatch, AlvearyError) as error:
            status = c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED, message=printable(str(error)))
        except Exception as error:
            status = self._fault(error, "staging or running it")
        self.end.raise_if_fenced()
        return status, supervised

    async def _prepare(self) -> tuple[StagedAttempt, launch.Team, Sequence[str]]:
        """Everything the processes need: files, the other nodes, a free place here, and of an MPI follower its command."""
        it = self.assignment
        staged = await self._stager.stage()
        host = await it.node.runtime.host(it.gang_name, it.index, it.network) if it.needs_host else _ALONE
        team = await self._channel.rendezvous(host)
        if self._after:
            await asyncio.wait(self._after, timeout=_PREDECESSOR_SECONDS)
        command = await self._channel.daemon_command() if it.is_mpi_daemon else ()
        return staged, team, command

    async def _started(self) -> None:
        """The processes of this node run: the time limit begins, and once those of all nodes do, the attempt has started."""
        it = self.assignment
        seconds = it.spec.max_run_duration_seconds
        if seconds and it.index == 0:
            sentence = f"it ran longer than max_run_duration_seconds = {seconds:g}"
            timer = asyncio.get_running_loop().call_later(seconds, self.end.request, EndReason.TIMEOUT, sentence)
            self._held.callback(timer.cancel)
        await self._channel.running()
        self._events.publish(ev.AttemptStarted(process_count=it.node_count * launch.ranks_per_node(it.spec)))

    def _classify(self, supervised: SupervisedOutcome) -> c.ExitStatus:
        it = self.assignment
        status = exit_status.classify(supervised.outcome, self.end.end, supervised.ranks, it.facts)
        if exit_status.seems_to_lack_shared_memory(status, supervised.outcome, self._supervisor.tail):
            hint = it.node.runtime.shared_memory(it.spec.resources)
            status.message += f"; it seems to have found no room for shared memory: {hint}"
        exit_status.add_disk_fault(status, it.node.disk_fault())
        return status

    async def _finish(self, ended: tuple[c.ExitStatus, SupervisedOutcome]) -> ev.AttemptFinished:
        """Store what the attempt left, unless its storing is interrupted or fails; returns its last event."""
        status, supervised = ended
        self.progress.phase = pb.ATTEMPT_PHASE_FINALIZING
        self.end.begin_storing()
        if self.end.stores_nothing:  # others need the space now
            await asyncio.to_thread(remove_tree, self.assignment.root)
        if not status.last_lines:
            status.last_lines[:] = self._supervisor.tail
        try:
            finished = await self.end.run_until_fenced(self.end.run_until_interrupted(self._store(status, supervised)))
            return finished if finished is not None else await self.end.run_until_fenced(self._interrupted(status))
        except Fenced:
            raise
        except AlvearyError as error:
            return upload_failed(error)
        except Exception as error:
            fault = self._fault(error, "storing its outputs")
            self._channel.report_stored(fault.message)
            return ev.AttemptFinished(exit=fault)

    async def _store(self, status: c.ExitStatus, supervised: SupervisedOutcome) -> ev.AttemptFinished:
        first = first_failure(supervised.ranks)
        await self._channel.ended(status, first.ended_at if first else 0.0, sorted(supervised.ranks))
        self._events.publish(ev.AttemptFinalizing(exit=self._channel.exit_status(status)))
        stored = await self._member_outputs.store()
        await self._ship_logs()
        await self._channel.stored(stored.error)
        return await self._member_outputs.publish(self._channel.exit_status(status), stored)

    async def _interrupted(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """The end of an attempt whose storing was interrupted."""
        assert self.end.interruption is not None
        self._outputs.stop()
        done = f"{self._outputs.stored} of {self._outputs.total} files were stored by then"
        text = f"{self.end.interruption.sentence}; {done}"
        self._log(text)
        status = self._channel.exit_status(status)
        if not exit_status.was_requested(status.reason):
            status.reason = self.end.interruption.reason.exit_reason
        status.message = text
        self._channel.report_stored(text)
        return await self._member_outputs.publish_partial(status)

    async def _report(self, finished: ev.AttemptFinished) -> None:
        """Ship the rest of the logs, and the last event."""
        await self._ship_logs()
        finished.exit.message = "; ".join(filter(None, [finished.exit.message, *self._logs.losses()]))
        self._events.publish(finished)
        await self._events.finish()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _script_server(self, paths: AttemptPaths) -> ContextServer:
        self._outputs.own, self._outputs.below = paths.root, self.assignment.node.runtime.readable_below(paths)
        asks = operations(self.assignment, paths, self._outputs, self._log)
        return ContextServer(paths.socket, self.assignment.run_id, self._logs.metrics, asks, self._log)

    def _background(self, paths: AttemptPaths) -> BackgroundTasks:
        below = self.assignment.node.runtime.readable_below(paths)
        return BackgroundTasks(self.assignment, self._outputs, self._checkpoints, self._logs, self.progress, self.end, below)

    async def _ship_logs(self) -> None:
        """Return when all that was printed and logged is stored, or lost."""
        seconds = _DISK_FULL_SECONDS if self.assignment.node.disk_fault() else _STALLED_SECONDS
        await self._logs.finish(_HURRIED_SECONDS if self.end.interruption else seconds)

    def _fault(self, error: Exception, doing: str) -> c.ExitStatus:
        """The exit status of an attempt that the trainer failed on: a bug."""
        telemetry.logger().error("attempt.fault", run=self.assignment.run_id, attempt=self.assignment.number, exc_info=error)
        text = f"the trainer failed while {doing}: {type(error).__name__}: {error}"
        for line in [text, *"".join(traceback.format_exception(error)).splitlines()]:
            self._log(line)
        message, tail = printable(text)[:_MAX_FAULT_CHARACTERS], self._supervisor.tail
        return c.ExitStatus(reason=c.EXIT_REASON_INTERNAL_ERROR, message=message, last_lines=tail)

    async def _clean_up(self) -> None:
        """Leave nothing on this node; a part that cannot be closed holds up no other."""

        async def stop() -> None:
            self._outputs.stop()
            self._supervisor.kill()

        steps = (
            self._events.close,
            stop,
            self._channel.close,
            self._logs.lines.close,
            self._logs.metrics.close,
            self._held.aclose,
            lambda: asyncio.to_thread(remove_tree, self.assignment.root),
        )
        for step in steps:
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await step()
            except Exception:
                telemetry.logger().exception("attempt.clean_up", run=self.assignment.run_id, attempt=self.assignment.number)
