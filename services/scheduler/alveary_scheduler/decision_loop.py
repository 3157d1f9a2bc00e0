"""Plans whenever something has changed, and carries the decisions out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core import telemetry
from alveary_core.disk import DiskGuard
from alveary_core.errors import Aborted, FailedPrecondition, Unavailable
from alveary_core.events import Key
from alveary_core.settings import CoreSettings
from alveary_scheduler.core.requests import Placement, Preemption
from alveary_scheduler.event_writer import EventWriter
from alveary_scheduler.fleet import Fleet
from alveary_scheduler.heartbeats import Heartbeats
from alveary_scheduler.plan import Decision, ProvisionGroup, ReleaseGroup, Reserve, Scale, Wait, plan
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.state import Placed, State, TargetKey, lost_nodes
from alveary_scheduler.wait_reason import render

# Another scheduler is active: this one must stop.
_FATAL = (FailedPrecondition, Aborted)
_ROUND_SECONDS = 1.0
_MIN_PAUSE_SECONDS = 0.5
_MIN_RETRY_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 60.0
# How much newer a checkpoint must be to be recorded.
_CHECKPOINT_SECONDS = 60.0
# Checkpoints recorded in one round, so that they hold up no decisions.
_MAX_CHECKPOINTS = 20


class DecisionLoop:
    """The loop of the active scheduler."""

    def __init__(
        self, settings: CoreSettings, disk: DiskGuard, projection: SchedulerProjection, writer: EventWriter, fleet: Fleet, heartbeats: Heartbeats,
        wake: asyncio.Event,
    ) -> None:  # fmt: skip
        """`wake` is set when something has changed."""
        self._settings = settings
        self._disk = disk
        self._projection = projection
        self._writer = writer
        self._fleet = fleet
        self._heartbeats = heartbeats
        self._wake = wake
        self._released: set[str] = set()
        # Runs and targets of which a decision failed: when it is tried again, and how long it was put off.
        self._put_off: dict[str, tuple[float, float]] = {}

    @property
    def _state(self) -> State:
        return self._projection.state

    async def run(self) -> None:
        """Decide whenever something has changed, and once a second."""
        await self._projection.caught_up.wait()
        # A long queue is many objects that live long: the collector need not walk them again and again.
        gc.collect()
        gc.freeze()
        pause = 0.0
        while True:
            try:
                await self._decide()
                pause = 0.0
            except Unavailable as error:  # the event log takes nothing now, as on a full disk: heartbeats go on meanwhile
                telemetry.logger().warning("decide.unavailable", error=str(error))
            except _FATAL:
                raise
            except Exception as error:  # heartbeats go on, and so do runs
                telemetry.HANDLED.labels("decide", "error").inc()
                telemetry.logger().error("decide.failed", exc_info=error)
                pause = min(max(pause * 2, _MIN_PAUSE_SECONDS), _MAX_PAUSE_SECONDS)
                await asyncio.sleep(pause)
            self._set_gauges()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ROUND_SECONDS):
                    await self._wake.wait()
            self._wake.clear()

    async def _decide(self) -> None:
        cordoned = await self.cordoned()
        await self._release_canceled()
        # A lost node of a run frees the run's other nodes, where its processes still run until they hear of it: nothing
        # is decided until the revocation is in the log, and nothing else happens between the last look and the plan.
        while await self._revoke_stale():
            pass
        decisions = plan(
            self._state, self._fleet.starting(), self._idle(), time.time(), self._fleet.coming(), self._fleet.troubles(), cordoned
        )
        for decision in decisions:
            await self._try(decision)
        await self._record_checkpoints()

    async def trouble(self) -> str:
        """Why nothing is placed anywhere; empty: nothing stands against it."""
        try:
            problem = (await self._disk.look()).problem
        except OSError as error:
            problem = f"the platform's disk cannot be looked at: {error}"
        return problem and f"{problem}, the platform's own"

    async def cordoned(self) -> dict[str, str]:
        """Nodes that take no new runs for now, and why: their own disks, or the platform's."""
        if trouble := await self.trouble():
            return dict.fromkeys(self._state.nodes, trouble)
        return self._heartbeats.cordoned()

    def _idle(self) -> dict[TargetKey, int]:
        """How many nodes of each target have been idle for as long as it allows."""
        now = time.monotonic()
        busy = {node for placed in self._state.placed.values() for node, _ in placed.nodes}
        found: dict[TargetKey, int] = {}
        for node in self._state.nodes.values():
            last = self._heartbeats.of(node.id)
            if node.id in busy:
                last.idle_since = 0.0
                continue
            last.idle_since = last.idle_since or now
            key = (node.workspace, node.target)
            target = self._state.targets.get(key)
            limit = target.spec.idle_seconds_before_scaledown if target else 0.0
            if now - last.idle_since >= limit and self._fleet.cool(key) and node.id not in self._fleet.leaving:
                found[key] = found.get(key, 0) + 1
        return found

    # ---- before a plan --------------------------------------------------------------------------------------------

    async def _release_canceled(self) -> None:
        """Say of runs that were cancelled before they had nodes that they will never get any."""
        for run, workspace in list(self._state.canceled.items()):
            if run not in self._released:
                await self._append(workspace, run, ev.PlacementReleased(attempt=0))
                self._released.add(run)
        self._released &= self._state.canceled.keys()

    async def _revoke_stale(self) -> int:
        """Revoke placements of which a node is gone or has restarted; returns how many."""
        stale = [(placed, lost) for placed in self._state.placed.values() if (lost := lost_nodes(self._state, placed))]
        for placed, lost in stale:
            why = "its trainer was restarted" if lost[0] in self._state.nodes else "its node sent no heartbeat"
            revoked = ev.PlacementRevoked(attempt=placed.attempt, reason=f"node {lost[0]} is lost: {why}")
            await self._append(placed.workspace, placed.run, revoked)
        return len(stale)

    # ---- decisions ------------------------------------------------------------------------------------------------

    async def _try(self, decision: Decision) -> None:
        """Carry a decision out. One that fails is put off, longer each time, and holds up no other run and no other target."""
        subject = getattr(decision, "run", "") or f"{getattr(decision, 'workspace', '')}/{getattr(decision, 'target', '')}"
        if self._is_due(subject):
            await self._attempt(subject, type(decision).__name__, self._carry_out(decision))

    def _is_due(self, subject: str) -> bool:
        return time.monotonic() >= self._put_off.get(subject, (0.0, 0.0))[0]

    async def _attempt(self, subject: str, name: str, action: Coroutine[Any, Any, None]) -> None:
        try:
            await action
        except (Unavailable, *_FATAL):
            raise
        except Exception as error:
            telemetry.HANDLED.labels("decide", "error").inc()
            telemetry.logger().error("decision.failed", decision=name, subject=subject, exc_info=error)
            _, pause = self._put_off.get(subject, (0.0, 0.0))
            pause = min(max(pause * 2, _MIN_RETRY_SECONDS), _MAX_PAUSE_SECONDS)
            self._put_off[subject] = (time.monotonic() + pause, pause)
        else:
            self._put_off.pop(subject, None)

    async def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Placement():
                await self._place(decision)
            case Preemption():
                await self._preempt(decision)
            case Reserve(workspace=workspace, run=run, nodes=nodes):
                if run in self._state.queue:
                    await self._append(workspace, run, ev.PlacementReserved(nodes=nodes))
            case Wait():
                await self._explain(decision)
            case Scale():
                await self._fleet.scale(decision)
            case ProvisionGroup():
                self._fleet.provision_group(decision)
                self._wake.set()
            case ReleaseGroup():
                self._fleet.release_group(decision)

    async def _append(self, workspace: str, run: str, message: Message) -> None:
        await self._writer.append(Key(workspace, "placement", run), message)

    async def _place(self, decision: Placement) -> None:
        waiting = self._state.queue.get(decision.run)
        nodes = [self._state.nodes.get(part.node) for part in decision.allocation]
        if waiting is None or any(node is None or node.id in self._fleet.leaving for node in nodes):
            return
        asked = self._projection.specs[decision.run].message
        assert isinstance(asked, (ev.RunPrepared, ev.RunRetrying))
        target = self._state.targets[waiting.workspace, waiting.target]
        each = 1 if asked.spec.launcher == c.LAUNCHER_PLAIN else asked.spec.process_count_per_node
        parts = [
            ev.AllocatedNode(node=node.id, incarnation=node.incarnation, gpu_indexes=part.gpus, first_rank=i * each, rank_count=each)
            for i, (node, part) in enumerate(zip(nodes, decision.allocation, strict=True))
            if node is not None
        ]
        made = ev.PlacementMade(
            attempt=waiting.attempt,
            target=waiting.target,
            nodes=parts,
            spec=asked.spec,
            image_digest=asked.image_digest,
            lease_seconds=self._settings.lease_seconds,
            submitted_by=asked.submitted_by,
            network=target.spec.network,
        )
        # The trainers may hear of it, and name it in a heartbeat, before this process has folded its own event.
        placing = self._heartbeats.placing
        placing.add((waiting.run, waiting.attempt))
        try:
            await self._append(waiting.workspace, waiting.run, made)
        finally:
            placing.discard((waiting.run, waiting.attempt))
        for part in decision.allocation:
            self._heartbeats.of(part.node).idle_since = 0.0

    async def _preempt(self, decision: Preemption) -> None:
        held = self._state.placed.get(decision.run)
        if held is not None and held.attempt == decision.attempt:
            message = ev.PlacementPreempting(attempt=decision.attempt, beneficiary=decision.beneficiary, reason=decision.reason)
            await self._append(held.workspace, decision.run, message)

    async def _explain(self, decision: Wait) -> None:
        waiting = self._state.queue.get(decision.run)
        if waiting is None:
            return
        reason, sentence = decision.reason, render(decision.reason)
        message: Message = ev.PlacementWaiting(reason=sentence, wait_reason=reason)
        if reason.code == c.WAIT_CODE_PROVISIONING:
            message = ev.PlacementProvisioning(reason=sentence, wait_reason=reason, target=waiting.target)
        await self._append(waiting.workspace, decision.run, message)

    # ---- after a plan ---------------------------------------------------------------------------------------------

    async def _record_checkpoints(self) -> None:
        """Record when attempts that may be preempted last stored a checkpoint, as their nodes' heartbeats say."""
        for held, stored_at in itertools.islice(self._new_checkpoints(), _MAX_CHECKPOINTS):
            checkpointed = ev.PlacementCheckpointed(attempt=held.attempt, stored_at=stored_at)
            action = self._append(held.workspace, held.run, checkpointed)
            await self._attempt(_checkpoint_of(held), "PlacementCheckpointed", action)

    def _new_checkpoints(self) -> Iterator[tuple[Placed, float]]:
        """Attempts with a checkpoint to record, and when each was stored, in Unix seconds."""
        for last in list(self._heartbeats.last.values()):
            for attempt in last.message.attempts:
                held = self._state.placed.get(attempt.run_id)
                if held is None or held.attempt != attempt.attempt or not attempt.seconds_since_checkpoint:
                    continue
                stored_at = time.time() - (time.monotonic() - last.at) - attempt.seconds_since_checkpoint
                if self._is_newer_checkpoint(held, stored_at) and self._is_due(_checkpoint_of(held)):
                    yield held, stored_at

    def _is_newer_checkpoint(self, held: Placed, stored_at: float) -> bool:
        pool = self._state.pool_of(held)
        running = pool.running.get(held.run) if pool is not None else None
        return running is not None and running.request.preemptible and stored_at - running.last_checkpoint >= _CHECKPOINT_SECONDS

    def _set_gauges(self) -> None:
        state = self._state
        for workspace, name in state.targets:
            nodes = sum((node.workspace, node.target) == (workspace, name) for node in state.nodes.values())
            telemetry.WAITING.labels(workspace, name).set(len(state.pools[workspace, name].queue))
            telemetry.NODES.labels(workspace, name).set(nodes)
        for workspace in {w for w, _ in state.targets}:
            telemetry.PLACED.labels(workspace).set(sum(placed.workspace == workspace for placed in state.placed.values()))


def _checkpoint_of(held: Placed) -> str:
    """The subject of an attempt's checkpoint, apart from that of its run's decisions."""
    return f"{held.run}/checkpoint"
