"""The scheduler around its decision core: events in, decisions out, beats, lost nodes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError, Message
from nats.aio.msg import Msg
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeout

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.trainer.v1 import trainer_pb2 as tr
from alveary_core import telemetry
from alveary_core.errors import Aborted, FailedPrecondition, Unavailable
from alveary_core.eventlog import Conflict
from alveary_core.events import Event, Key
from alveary_core.service import Service
from alveary_scheduler.adapters.local import LocalNodes
from alveary_scheduler.adapters.ray_nodes import RayNodes
from alveary_scheduler.core.requests import Placement, Preemption
from alveary_scheduler.joining import Joining
from alveary_scheduler.plan import Decision, ProvisionGroup, ReleaseGroup, Reserve, Scale, Wait, plan
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.state import State, lost_nodes
from alveary_scheduler.wait_reason import render

_TRIES = 5
# Another scheduler is at work: this one must stop.
_FATAL = (FailedPrecondition, Aborted)
_LONGEST_PAUSE_SECONDS = 60.0
# How much newer a checkpoint must be to be recorded.
_CHECKPOINT_SECONDS = 60.0
# Whoever is active answers here.
_WHO = "alveary-scheduler.who"


@dataclass
class Pulse:
    """What is known of a node's last beat; never stored."""

    at: float
    beat: tr.Beat = field(default_factory=tr.Beat)
    idle_since: float = 0.0


class Scheduler:
    """The only writer of targets, nodes and placements. One replica is active."""

    def __init__(self, service: Service, projection: SchedulerProjection, local: LocalNodes, joining: Joining) -> None:
        self._service, self.view, self._local, self.joining = service, projection, local, joining
        self._settings, self.disk = service.settings, service.disk
        self._wake = asyncio.Event()
        self._sequences: dict[Key, int] = {}
        self.pulses: dict[str, Pulse] = {}
        self._leaving: set[str] = set()
        self._released: set[str] = set()
        # Placements that are in the log, or about to be, and perhaps not yet in the state.
        self._placing: set[tuple[str, int]] = set()
        # Since when a node's beats have not named an attempt that is placed on it.
        self._missing: dict[tuple[str, int, str], float] = {}
        self._joining: dict[str, asyncio.Lock] = {}
        self._booted = time.monotonic()
        self._me = f"{socket.gethostname()}, pid {os.getpid()}, {new_id()}".encode()
        # Runs and targets of which a decision could not be carried out: when it is tried again, and how long that was put off.
        self._put_off: dict[str, tuple[float, float]] = {}
        # When nodes of a target came or went last.
        self._resized: dict[tuple[str, str], float] = {}
        self._ray = RayNodes(service.settings.state_dir, joining.admit, self._wake.set)
        service.on_close(self._ray.close)
        projection.on_event(self._on_event)

    @property
    def state(self) -> State:
        """The live state."""
        return self.view.state

    def _on_event(self, event: Event) -> None:
        if event.key.aggregate in ("target", "node", "placement"):
            self._sequences[event.key] = event.sequence
        elif event.name in ("completed", "failed", "canceled"):
            self._sequences.pop(Key(event.key.workspace, "placement", event.key.id), None)
        self._wake.set()

    def desired(self, key: tuple[str, str]) -> int:
        """How many nodes a target has or is getting."""
        target = self.state.targets.get(key)
        if target is not None and target.spec.kind != c.TARGET_KIND_LOCAL:
            return self._joined(key) + sum(self._coming().get(key, {}).values())
        return len([n for n in self._local.nodes(key) if n not in self._leaving])

    def _joined(self, key: tuple[str, str]) -> int:
        return sum((n.workspace, n.target) == key for n in self.state.nodes.values())

    def _coming(self) -> dict[tuple[str, str], dict[str, int]]:
        """What is gathered for single runs, by target."""
        joined = set(self.state.nodes)
        return {key: self._ray.coming(key, joined) for key, t in self.state.targets.items() if t.spec.kind == c.TARGET_KIND_RAY}

    async def append(self, key: Key, message: Message) -> int:
        """Append one event of ours and wait until the state includes it."""
        for _ in range(_TRIES):
            if key not in self._sequences:
                events = await self._service.log.read(key)
                self._sequences[key] = events[-1].sequence if events else 0
            try:
                done = await self._service.log.append(key, [message], self._sequences[key])
            except Conflict:
                # An append of ours whose acknowledgement never came, or another scheduler: that must not be.
                await self._must_be_alone(1.0)
                self._sequences.pop(key, None)
                await asyncio.sleep(0.05)
                continue
            self._sequences[key] = done.sequence
            await self.view.wait_for(done.sequence)
            return done.sequence
        raise Aborted(f"{key.subject()}: somebody else writes it: is a second scheduler running?")

    async def take_over(self) -> None:
        """Become the active scheduler.

        Raises:
            FailedPrecondition: another one is.
        """
        await self._must_be_alone(2.0)

        async def answer(message: Msg) -> None:
            if message.data != self._me:
                await message.respond(self._me)

        await self._service.connection.subscribe(_WHO, cb=answer)

    async def _must_be_alone(self, patience: float) -> None:
        try:
            reply = await self._service.connection.request(_WHO, self._me, timeout=patience)
        except (NoRespondersError, NatsTimeout):
            return
        raise FailedPrecondition(
            f"another scheduler is active ({reply.data.decode(errors='replace')}): two would place runs twice, so this one stops"
        )

    async def run(self) -> None:
        """Decide whenever something changed, and once a second."""
        await self.view.caught_up.wait()
        # A long queue is many objects that live long: the collector need not walk them again and again.
        gc.collect()
        gc.freeze()
        pause = 0.0
        while True:
            try:
                await self._decide()
                pause = 0.0
            except Unavailable as error:  # the event log takes nothing now, as on a full disk: nodes go on beating meanwhile
                telemetry.logger().warning("decide.unavailable", error=str(error))
            except _FATAL:
                raise
            except Exception as error:  # nodes go on beating, and what runs goes on running
                telemetry.HANDLED.labels("decide", "error").inc()
                telemetry.logger().error("decide.failed", exc_info=error)
                pause = min(max(pause * 2, 0.5), _LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(pause)
            self._count()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()
            self._wake.clear()

    async def _decide(self) -> None:
        cordoned = await self._cordoned()
        await self._release_canceled()
        # A lost node of a run frees the run's other nodes, where its processes still run until they hear of it: nothing
        # is decided until that is said, and nothing else happens between the last look and the decisions.
        while await self._revoke_stale():
            pass
        await self._record_checkpoints()
        clusters = {key: t.spec.address for key, t in self.state.targets.items() if t.spec.kind == c.TARGET_KIND_RAY}
        self._ray.tend(clusters)
        troubles = {key: trouble for key in clusters if (trouble := self._ray.trouble(key))}
        for decision in plan(self.state, self._starting(), self._idle(), time.time(), self._coming(), troubles, cordoned):
            await self._try(decision)

    async def _try(self, decision: Decision) -> None:
        """Carry a decision out. One that cannot be is put off, later and later, and holds up no other run and no other target."""
        subject = getattr(decision, "run", "") or f"{getattr(decision, 'workspace', '')}/{getattr(decision, 'target', '')}"
        due, pause = self._put_off.get(subject, (0.0, 0.0))
        if time.monotonic() < due:
            return
        try:
            await self._do(decision)
        except (Unavailable, *_FATAL):
            raise
        except Exception as error:
            telemetry.HANDLED.labels("decide", "error").inc()
            telemetry.logger().error("decision.failed", decision=type(decision).__name__, subject=subject, exc_info=error)
            pause = min(max(pause * 2, 1.0), _LONGEST_PAUSE_SECONDS)
            self._put_off[subject] = (time.monotonic() + pause, pause)
        else:
            self._put_off.pop(subject, None)

    async def trouble(self) -> str:
        """Why nothing is placed anywhere; empty: nothing stands against it."""
        try:
            problem = (await self._service.disk.look()).problem
        except OSError as error:
            problem = f"the platform's disk cannot be looked at: {error}"
        return problem and f"{problem}, the platform's own"

    async def _cordoned(self) -> dict[str, str]:
        """Nodes that take no new runs for now, and why: their own disks, or the platform's."""
        if trouble := await self.trouble():
            return dict.fromkeys(self.state.nodes, trouble)
        return {name: pulse.beat.cordon_reason for name, pulse in self.pulses.items() if pulse.beat.cordon_reason}

    def _count(self) -> None:
        """Gauges of what is live."""
        state = self.state
        for workspace, name in state.targets:
            waiting = len(state.pools[workspace, name].waiting)
            nodes = sum((n.workspace, n.target) == (workspace, name) for n in state.nodes.values())
            telemetry.WAITING.labels(workspace, name).set(waiting)
            telemetry.NODES.labels(workspace, name).set(nodes)
        for workspace in {w for w, _ in state.targets}:
            telemetry.PLACED.labels(workspace).set(sum(p.workspace == workspace for p in state.placed.values()))

    async def _do(self, decision: Decision) -> None:
        match decision:
            case Placement():
                await self._place(decision)
            case Preemption(run=run, attempt=attempt, beneficiary=beneficiary, reason=reason):
                held = self.state.placed.get(run)
                if held is not None and held.attempt == attempt:
                    message = ev.PlacementPreempting(attempt=attempt, beneficiary=beneficiary, reason=reason)
                    await self.append(Key(held.workspace, "placement", run), message)
            case Reserve(workspace=workspace, run=run, nodes=names):
                if run in self.state.queue:
                    await self.append(Key(workspace, "placement", run), ev.PlacementReserved(nodes=names))
            case Wait(run=run, reason=reason):
                waiting = self.state.queue.get(run)
                if waiting is None:
                    return
                told: Message = ev.PlacementWaiting(reason=render(reason), wait_reason=reason)
                if reason.code == c.WAIT_CODE_PROVISIONING:
                    told = ev.PlacementProvisioning(reason=render(reason), wait_reason=reason, target=waiting.target)
                await self.append(Key(waiting.workspace, "placement", run), told)
            case Scale():
                await self._scale(decision)
            case ProvisionGroup(workspace=workspace, target=name, run=run):
                self._ray.make((workspace, name), run, decision.shape, decision.count, decision.spread)
                self._resized[workspace, name] = time.monotonic()
                self._wake.set()
            case ReleaseGroup(workspace=workspace, target=name, run=run):
                self._ray.drop((workspace, name), run)

    async def _place(self, decision: Placement) -> None:
        waiting = self.state.queue.get(decision.run)
        nodes = [self.state.nodes.get(share.node) for share in decision.allocation]
        if waiting is None or any(n is None or n.id in self._leaving for n in nodes):
            return
        asked = self.view.specs[decision.run].message
        assert isinstance(asked, (ev.RunPrepared, ev.RunRetrying))
        target = self.state.targets[waiting.workspace, waiting.target]
        each = 1 if asked.spec.launcher == c.LAUNCHER_PLAIN else asked.spec.process_count_per_node
        shares = [
            ev.AllocatedNode(node=node.id, incarnation=node.incarnation, gpu_indexes=share.gpus, first_rank=i * each, rank_count=each)
            for i, (node, share) in enumerate(zip(nodes, decision.allocation, strict=True)) if node is not None
        ]  # fmt: skip
        made = ev.PlacementMade(
            attempt=waiting.attempt, target=waiting.target, nodes=shares, spec=asked.spec, image_digest=asked.image_digest,
            lease_seconds=self._settings.lease_seconds, submitted_by=asked.submitted_by,
            network=target.spec.network,
        )  # fmt: skip
        # The trainers may hear of it, and beat with it, before this process has folded its own event.
        self._placing.add((waiting.run, waiting.attempt))
        try:
            await self.append(Key(waiting.workspace, "placement", waiting.run), made)
        finally:
            self._placing.discard((waiting.run, waiting.attempt))
        for share in decision.allocation:
            self.pulses.setdefault(share.node, Pulse(time.monotonic())).idle_since = 0.0

    async def _revoke_stale(self) -> int:
        """Take back placements of which a node is gone, or lives another life than then; returns how many."""
        stale = [(placed, lost) for placed in self.state.placed.values() if (lost := lost_nodes(self.state, placed))]
        for placed, lost in stale:
            why = "its trainer was restarted" if lost[0] in self.state.nodes else "its node stopped beating"
            reason = f"node {lost[0]} is lost: {why}"
            await self.append(Key(placed.workspace, "placement", placed.run), ev.PlacementRevoked(attempt=placed.attempt, reason=reason))
        return len(stale)

    async def _record_checkpoints(self) -> None:
        """Record when attempts that may be preempted last stored a checkpoint, as their nodes' heartbeats say."""
        for pulse in list(self.pulses.values()):
            for attempt in pulse.beat.attempts:
                held = self.state.placed.get(attempt.run_id)
                if held is None or held.attempt != attempt.attempt or not attempt.seconds_since_checkpoint:
                    continue
                pool = self.state.pool_of(held)
                running = pool.running.get(attempt.run_id) if pool is not None else None
                if running is None or not running.request.preemptible:
                    continue
                stored_at = time.time() - (time.monotonic() - pulse.at) - attempt.seconds_since_checkpoint
                if stored_at - running.last_checkpoint >= _CHECKPOINT_SECONDS:
                    recorded = ev.PlacementCheckpointed(attempt=attempt.attempt, stored_at=stored_at)
                    await self.append(Key(held.workspace, "placement", held.run), recorded)

    async def _release_canceled(self) -> None:
        """Runs that were cancelled before they had a place: say that they will never get one."""
        for run, workspace in list(self.state.canceled.items()):
            if run not in self._released:
                await self.append(Key(workspace, "placement", run), ev.PlacementReleased(attempt=0))
                self._released.add(run)
        self._released &= self.state.canceled.keys()

    # ---- nodes ----------------------------------------------------------------------------------------------------

    def _starting(self) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for key in self.state.targets:
            joined = {n.id for n in self.state.nodes.values()}
            found[key] = len([n for n in self._local.nodes(key) if n not in joined and n not in self._leaving])
        return found

    def _idle(self) -> dict[tuple[str, str], int]:
        now = time.monotonic()
        busy = {name for p in self.state.placed.values() for name, _ in p.nodes}
        found: dict[tuple[str, str], int] = {}
        for node in self.state.nodes.values():
            pulse = self.pulses.setdefault(node.id, Pulse(now))
            if node.id in busy:
                pulse.idle_since = 0.0
                continue
            pulse.idle_since = pulse.idle_since or now
            target = self.state.targets.get((node.workspace, node.target))
            limit = target.spec.idle_seconds_before_scaledown if target else 0.0
            key = (node.workspace, node.target)
            cool = now - self._resized.get(key, 0.0) >= (target.spec.cooldown_seconds if target else 0.0)
            if now - pulse.idle_since >= limit and cool and node.id not in self._leaving:
                found[key] = found.get(key, 0) + 1
        return found

    def _of(self, node: str) -> tuple[str, str]:
        found = self.state.nodes[node]
        return (found.workspace, found.target)

    async def _scale(self, decision: Scale) -> None:
        key = (decision.workspace, decision.target)
        target = self.state.targets[key]
        present = self._local.nodes(key) if target.spec.kind == c.TARGET_KIND_LOCAL else [n for n in self.state.nodes if self._of(n) == key]
        if decision.nodes > len(present):
            await self.append(Key(*_target_key(key)), ev.TargetScaling(desired_nodes=decision.nodes, reason=decision.reason))
            self._resized[key] = time.monotonic()
            self._local.grow(key, target.spec, decision.nodes)
            return
        busy = {name for p in self.state.placed.values() for name, _ in p.nodes}
        idle = [
            n.id for n in self.state.nodes.values() if (n.workspace, n.target) == key and n.id not in busy and n.id not in self._leaving
        ]
        surplus = len(present) - decision.nodes
        doomed = sorted(idle, reverse=True)[: max(surplus, 0)]
        if doomed:
            await self.append(Key(*_target_key(key)), ev.TargetScaling(desired_nodes=decision.nodes, reason=decision.reason))
            self._resized[key] = time.monotonic()
        for node in doomed:
            self._leaving.add(node)
            await self.append(Key(decision.workspace, "node", node), ev.NodeDraining(reason=decision.reason))

    async def on_beat(self, message: Msg) -> None:
        """A node's beat: renew its leases, or tell it what must stop."""
        try:
            beat = tr.Beat.FromString(message.data)
        except DecodeError as error:
            telemetry.logger().warning("beat.malformed", error=str(error))
            return
        lock = self._joining.setdefault(beat.node, asyncio.Lock())
        if lock.locked() or not self.view.caught_up.is_set():
            return  # unanswered: the trainer beats again
        async with lock:
            answer = await self._answer(beat, message.subject.split(".")[1])
        await message.respond(answer.SerializeToString())

    async def _answer(self, beat: tr.Beat, workspace: str) -> tr.BeatAnswer:
        key = Key(workspace, "node", beat.node)
        node = self.state.nodes.get(beat.node)
        if beat.leaving:
            if node is not None and node.incarnation == beat.incarnation:
                await self.append(key, ev.NodeLeft(incarnation=beat.incarnation))
            self._leaving.discard(beat.node)
            self._local.left(beat.node)
            self._ray.gone(beat.node)
            return tr.BeatAnswer(known=True)
        target = self.state.targets.get((workspace, beat.target))
        if target is None:
            return tr.BeatAnswer(known=True, leave=True)
        if node is None or node.incarnation != beat.incarnation:
            resources = c.Resources(cpus=beat.cpus, memory_bytes=beat.memory_total_bytes, gpus=beat.gpus)
            joined = ev.NodeJoined(
                target=beat.target, incarnation=beat.incarnation, resources=resources, gpu_models=beat.gpu_models,
                hostname=beat.hostname, labels=beat.labels,
            )  # fmt: skip
            await self.append(key, joined)
        pulse = self.pulses.setdefault(beat.node, Pulse(0.0))
        pulse.at, pulse.beat = time.monotonic(), beat
        stop = []
        for attempt in beat.attempts:
            held = self.state.placed.get(attempt.run_id)
            placing = (attempt.run_id, attempt.attempt) in self._placing
            if not placing and (held is None or held.attempt != attempt.attempt or (beat.node, beat.incarnation) not in held.nodes):
                stop.append(f"{attempt.run_id}-{attempt.attempt}")
        await self._revoke_missing(beat)
        return tr.BeatAnswer(known=True, stop=stop, leave=beat.node in self._leaving)

    async def _revoke_missing(self, beat: tr.Beat) -> None:
        """Take back what is placed on a node that beats, but has not named it for a whole lease.

        It gave the attempt up (a lease of its own ran out), or never heard of it. A finished one is never taken for
        lost: its end is in the log before its node forgets it, and runs read the log in order.
        """
        now = time.monotonic()
        named = {(a.run_id, a.attempt) for a in beat.attempts}
        held = [p for p in self.state.placed.values() if (beat.node, beat.incarnation) in p.nodes]
        for placed in held:
            key = (placed.run, placed.attempt, beat.node)
            if key[:2] in named:
                self._missing.pop(key, None)
            elif now - self._missing.setdefault(key, now) > self._settings.lease_seconds:
                reason = f"node {beat.node} no longer runs it"
                revoked = ev.PlacementRevoked(attempt=placed.attempt, reason=reason)
                await self.append(Key(placed.workspace, "placement", placed.run), revoked)
        live = {(p.run, p.attempt, name) for p in self.state.placed.values() for name, _ in p.nodes}
        self._missing = {k: v for k, v in self._missing.items() if k in live}

    async def watch_nodes(self) -> None:
        """Declare nodes lost that were silent for longer than their trainers' leases; keep local ones alive."""
        await self.view.caught_up.wait()
        # A trainer gives up after lease_seconds without an answer; the margin covers its SIGKILLs.
        limit = self._settings.lease_seconds + max(2.0, 2 * self._settings.beat_seconds)
        while True:
            try:
                await self._declare_lost(limit)
            except Unavailable as error:
                telemetry.logger().warning("lost.unavailable", error=str(error))
            for key in [k for k, t in self.state.targets.items() if t.spec.kind == c.TARGET_KIND_LOCAL]:
                self._local.keep_alive(key, self.state.targets[key].spec, self._leaving)
            await asyncio.sleep(min(0.5, self._settings.beat_seconds))

    async def _declare_lost(self, limit: float) -> None:
        now = time.monotonic()
        for node in list(self.state.nodes.values()):
            seen = max(self.pulses[node.id].at if node.id in self.pulses else 0.0, self._booted)
            if now - seen > limit:
                reason = f"no beat for {now - seen:.0f} s"
                await self.append(Key(node.workspace, "node", node.id), ev.NodeLost(incarnation=node.incarnation, reason=reason))
                # One of ours: it would neither work nor make room for one that does. Of "nodes" it does nothing.
                self._local.kill(node.id)
                self._ray.gone(node.id)
                self._wake.set()


def _target_key(key: tuple[str, str]) -> tuple[str, str, str]:
    return key[0], "target", key[1]
