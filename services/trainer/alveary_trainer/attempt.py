"""One attempt of a run on this node: stage, rendezvous, supervise, classify, store, report.

Each node of a run has an `Attempt`, its part of the placement. In a gang the first node leads, and writes the attempt's events.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch
from alveary_trainer import exit_status, launch
from alveary_trainer.adapters.runtime import Host, Outcome, StagingFailed
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.assignment import Assignment, Progress
from alveary_trainer.attempt_parts import AttemptParts
from alveary_trainer.end_signal import EndReason, EndSignal, Fenced
from alveary_trainer.file_names import printable
from alveary_trainer.member_outputs import upload_failed
from alveary_trainer.node import NodeContext
from alveary_trainer.rank_state import first_failure
from alveary_trainer.staging import StagedAttempt
from alveary_trainer.supervisor import SupervisedOutcome

_ALONE = Host("localhost", "", 0)
# How long attempts that lost their place on this node may take to be gone: they were killed.
_PREDECESSOR_SECONDS = 30.0
# How long logs and metrics may stand still at the end before the rest is lost; while the disk is full; where storing is interrupted.
_STALLED_SECONDS, _DISK_FULL_SECONDS, _HURRIED_SECONDS = 60.0, 900.0, 10.0
_MAX_FAULT_CHARACTERS = 4000


class Attempt:
    """One node's part of an attempt, from its placement to the report of its end."""

    def __init__(
        self, node: NodeContext, key: Key, placement: ev.PlacementMade, index: int = 0, after: Sequence[asyncio.Task[None]] = ()
    ) -> None:
        """`index` into the placement's nodes. `after`: attempts that must be gone from this node before anything is launched."""
        self.assignment = Assignment(node, key.workspace, key.id, placement, index)
        self.end, self.progress = EndSignal(), Progress()
        self._after = after
        self._parts = AttemptParts(self.assignment, self.end, self.progress, self._started)

    async def run(self) -> None:
        """Run the attempt to its end, and remove everything it left on this node. A failure in here fails no other attempt."""
        it = self.assignment
        try:
            self._parts.events.publish(ev.AttemptAccepted(node=it.allocation.node, incarnation=it.node.incarnation))
            finished = await self._finish(await self._stage_and_supervise())
            await self.end.run_until_fenced(self._report(finished))
        except Fenced:
            telemetry.logger().info("attempt.fenced", run=it.run_id, attempt=it.number, member=it.index)
        finally:
            await self._parts.close()

    async def _stage_and_supervise(self) -> tuple[c.ExitStatus, SupervisedOutcome]:
        """Exit status and outcome of this node's processes, which have ended, or were never launched."""
        supervised = SupervisedOutcome(Outcome(), {})
        try:
            await self._parts.channel.start()
            prepared = await self.end.run_until_end(self._prepare())
            if prepared is not None and self.end.end is None:
                supervised = await self._parts.supervisor.run(*prepared)
            self.end.raise_if_fenced()
            return self._classify(supervised), supervised
        except Fenced:
            raise
        except (StagingFailed, DigestMismatch, AlvearyError) as error:
            status = c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED, message=printable(str(error)))
        except Exception as error:
            status = self._fault(error, "staging or running it")
        self.end.raise_if_fenced()
        # Where supervising failed, its ranks are known all the same.
        return status, SupervisedOutcome(supervised.outcome, self._parts.supervisor.ranks)

    async def _prepare(self) -> tuple[StagedAttempt, launch.Team, Sequence[str]]:
        """Everything the processes need: files, the other nodes, a free place here, and of an MPI follower its command."""
        it = self.assignment
        staged = await self._parts.stager.stage()
        host = await it.node.runtime.host(it.gang_name, it.index, it.network) if it.needs_host else _ALONE
        team = await self._parts.channel.rendezvous(host)
        if self._after:
            await asyncio.wait(self._after, timeout=_PREDECESSOR_SECONDS)
        command = await self._parts.channel.daemon_command() if it.is_mpi_daemon else ()
        return staged, team, command

    async def _started(self) -> None:
        """The processes of this node run: the time limit begins, and once those of all nodes do, the attempt has started."""
        it = self.assignment
        seconds = it.spec.max_run_duration_seconds
        if seconds and it.index == 0:
            sentence = f"it ran longer than max_run_duration_seconds = {seconds:g}"
            timer = asyncio.get_running_loop().call_later(seconds, self.end.request, EndReason.TIMEOUT, sentence)
            self._parts.held.callback(timer.cancel)
        await self._parts.channel.running()
        self._parts.events.publish(ev.AttemptStarted(process_count=it.node_count * launch.ranks_per_node(it.spec)))

    def _classify(self, supervised: SupervisedOutcome) -> c.ExitStatus:
        it = self.assignment
        status = exit_status.classify(supervised.outcome, self.end.end, supervised.ranks, it.facts)
        if exit_status.seems_to_lack_shared_memory(status, supervised.outcome, self._parts.supervisor.tail):
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
            status.last_lines[:] = self._parts.supervisor.tail
        try:
            finished = await self.end.run_until_fenced(self.end.run_until_interrupted(self._store(status, supervised)))
            return finished if finished is not None else await self.end.run_until_fenced(self._interrupted(status))
        except Fenced:
            raise
        except AlvearyError as error:
            return upload_failed(error)
        except Exception as error:
            fault = self._fault(error, "storing its outputs")
            self._parts.channel.report_stored(fault.message)
            return ev.AttemptFinished(exit=fault)

    async def _store(self, status: c.ExitStatus, supervised: SupervisedOutcome) -> ev.AttemptFinished:
        first = first_failure(supervised.ranks)
        await self._parts.channel.ended(status, first.ended_at if first else 0.0, sorted(supervised.ranks))
        self._parts.events.publish(ev.AttemptFinalizing(exit=self._parts.channel.exit_status(status)))
        stored = await self._parts.outputs.store()
        await self._ship_logs()
        await self._parts.channel.stored(stored.error)
        return await self._parts.outputs.publish(self._parts.channel.exit_status(status), stored)

    async def _interrupted(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """The end of an attempt whose storing was interrupted."""
        assert self.end.interruption is not None
        self._parts.store.stop()
        stored, total = self._parts.store.progress
        text = f"{self.end.interruption.sentence}; {stored} of {total} files were stored by then"
        self._parts.log(text)
        status = self._parts.channel.exit_status(status)
        if not exit_status.was_requested(status.reason):
            status.reason = self.end.interruption.reason.exit_reason
        status.message = text
        self._parts.channel.report_stored(text)
        return await self._parts.outputs.publish_partial(status)

    async def _report(self, finished: ev.AttemptFinished) -> None:
        """Ship the rest of the logs, and the last event."""
        await self._ship_logs()
        finished.exit.message = "; ".join(filter(None, [finished.exit.message, *self._parts.logs.losses()]))
        self._parts.events.publish(finished)
        await self._parts.events.finish()

    async def _ship_logs(self) -> None:
        """Return when all that was printed and logged is stored, or lost."""
        seconds = _DISK_FULL_SECONDS if self.assignment.node.disk_fault() else _STALLED_SECONDS
        await self._parts.logs.finish(_HURRIED_SECONDS if self.end.interruption else seconds)

    def _fault(self, error: Exception, doing: str) -> c.ExitStatus:
        """The exit status of an attempt that the trainer failed on: a bug."""
        telemetry.logger().error("attempt.fault", run=self.assignment.run_id, attempt=self.assignment.number, exc_info=error)
        text = f"the trainer failed while {doing}: {type(error).__name__}: {error}"
        for line in [text, *"".join(traceback.format_exception(error)).splitlines()]:
            self._parts.log(line)
        message, tail = printable(text)[:_MAX_FAULT_CHARACTERS], self._parts.supervisor.tail
        return c.ExitStatus(reason=c.EXIT_REASON_INTERNAL_ERROR, message=message, last_lines=tail)
