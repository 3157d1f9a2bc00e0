"""The node agent: placements in, attempts out; its heartbeats are in heartbeat.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import OrderedDict
from collections.abc import Coroutine
from functools import partial
from typing import Any

import psutil

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_contracts.trainer.v1 import trainer_pb2_grpc as rpc
from alveary_core import auth, machine, telemetry
from alveary_core.events import Event, Key, decode
from alveary_trainer.adapters.gpus import gpu_models, gpu_utilisation
from alveary_trainer.attempt import Attempt
from alveary_trainer.disk import DiskWatch, Occupant
from alveary_trainer.end_signal import EndReason
from alveary_trainer.file_names import printable
from alveary_trainer.heartbeat import Heartbeat
from alveary_trainer.node import NodeContext

# Cancelled or preempted before their placement was seen here: so many are remembered, oldest out.
_REMEMBERED = 10_000
# How long the end of a placement that could not be taken is tried to be reported, seconds.
_REPORTING = 300.0


class Agent:
    """One node."""

    def __init__(self, context: NodeContext) -> None:
        self._context, self._settings = context, context.settings
        self.attempts: dict[str, Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._preempted: OrderedDict[str, None] = OrderedDict()
        self._canceled: OrderedDict[str, None] = OrderedDict()
        self.done = asyncio.Event()
        s = context.settings
        folders = [context.runs_dir.parent, s.cache_dir or s.state_dir]
        self.disk = DiskWatch(s.node, folders, s.disk_reserve_bytes, s.disk_reserve_fraction, self._occupants)
        context.disk_fault = self.disk.fault
        self.heartbeat = Heartbeat(
            self._settings, self.beat_message, end=lambda name: self._end_attempt(name, EndReason.FENCED), end_all=self.end_all,
            leave=self.leave, idle=lambda: not self.attempts,
        )  # fmt: skip

    async def follow(self, start: int) -> None:
        """Follow placements of this node, revocations, preemptions and cancels, for ever."""
        placements = [f"alveary.*.placement.*.{what}" for what in ("made", "revoked", "preempting")]
        subjects = [*placements, "alveary.*.run.*.cancel_requested"]
        async with contextlib.aclosing(self._context.log.follow(subjects, start)) as stream:
            async for item in stream:
                if item is None:
                    continue
                message, sequence = item
                try:
                    self._handle_event(decode(message.subject, dict(message.headers or {}), message.data, sequence))
                except Exception:  # one event that is not understood must not stop those behind it
                    telemetry.DEAD_LETTERS.labels("trainer").inc()
                    telemetry.logger().exception("event.set_aside", subject=message.subject, sequence=sequence)

    def _handle_event(self, event: Event) -> None:
        telemetry.start_trace(event.traceparent)
        match event.message:
            case ev.PlacementMade() as made:
                for index, mine in enumerate(made.nodes):
                    if (mine.node, mine.incarnation) == (self._settings.node, self._context.incarnation):
                        self._accept(event.key, made, index)
            case ev.PlacementRevoked() as revoked:
                self._end_attempt(f"{event.key.id}-{revoked.attempt}", EndReason.FENCED)
            case ev.PlacementPreempting() as preempting:
                name = f"{event.key.id}-{preempting.attempt}"
                _remember(self._preempted, name)
                self._end_attempt(name, EndReason.PREEMPTED)
            case ev.RunCancelRequested():
                _remember(self._canceled, event.key.id)
                for attempt in list(self.attempts.values()):
                    if attempt.assignment.run_id == event.key.id:
                        attempt.end.request(EndReason.CANCELED)

    def _accept(self, key: Key, made: ev.PlacementMade, index: int) -> None:
        name = f"{key.id}-{made.attempt}" + (f".{index}" if index else "")
        if name in self.attempts:
            return
        # Their GPUs may be this attempt's now, and their processes take a moment to exit.
        leaving = [t for t in self._tasks if (a := self.attempts.get(t.get_name())) is not None and a.end.fenced]
        try:
            attempt = Attempt(self._context, key, made, index, leaving)
        except Exception as error:
            telemetry.logger().exception("attempt.refused", attempt=name)
            if not index:  # of the others, the scheduler learns that they are not there
                self._spawn(self._refuse(key, made.attempt, error), f"{name} refused")
            return
        self.attempts[name] = attempt
        telemetry.ATTEMPTS.set(len(self.attempts))
        if attempt.assignment.run_id in self._canceled:
            attempt.end.request(EndReason.CANCELED)
        if attempt.assignment.attempt_id in self._preempted:
            attempt.end.request(EndReason.PREEMPTED)
        self._spawn(attempt.run(), name)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    async def _refuse(self, key: Key, attempt: int, error: Exception) -> None:
        """Report the end of an attempt that could not even begin."""
        message = printable(f"the trainer cannot take it: {type(error).__name__}: {error}")
        status = c.ExitStatus(reason=c.EXIT_REASON_INTERNAL_ERROR, message=message)
        where = Key(key.workspace, "attempt", f"{key.id}-{attempt}")
        async with asyncio.timeout(_REPORTING):
            await self._context.log.append(where, [ev.AttemptFinished(exit=status)], 0)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.attempts.pop(task.get_name(), None)
        telemetry.ATTEMPTS.set(len(self.attempts))
        if not task.cancelled() and (error := task.exception()):
            # It could not report its own end. This node no longer names it, so the scheduler revokes its placement.
            telemetry.logger().error("attempt.crashed", attempt=task.get_name(), exc_info=error)

    def leave(self) -> None:
        """Stop serving as a node."""
        self.done.set()

    def end_all(self) -> None:
        """Stop everything: the lease is over."""
        for attempt in list(self.attempts.values()):
            attempt.end.request(EndReason.FENCED)

    def _end_attempt(self, attempt_id: str, reason: EndReason) -> None:
        for attempt in list(self.attempts.values()):
            if attempt.assignment.attempt_id == attempt_id:
                attempt.end.request(reason)

    def _occupants(self) -> list[Occupant]:
        return [
            Occupant(
                a.assignment.name,
                a.assignment.root,
                partial(a.end.request, EndReason.DISK_FULL),
                a.progress.phase == pb.ATTEMPT_PHASE_RUNNING,
            )
            for a in list(self.attempts.values())
        ]

    def beat_message(self, leaving: bool = False) -> pb.Heartbeat:
        """What this node says of itself now. From any thread; blocks for a moment where there are GPUs."""
        s = self._settings
        memory = psutil.virtual_memory()
        disk = self.disk.disk
        return pb.Heartbeat(
            node=s.node, incarnation=self._context.incarnation, target=s.target, leaving=leaving,
            hostname=socket.gethostname(), labels=s.node_labels, cpus=s.node_cpus or machine.cpus(), cpu_percent=psutil.cpu_percent(None),
            memory_total_bytes=s.node_memory_bytes or machine.memory_bytes(), memory_used_bytes=memory.total - memory.available,
            gpus=len(s.gpus), gpu_models=[m for i, m in enumerate(gpu_models()) if i in s.gpus],
            gpu_percent=gpu_utilisation(s.gpus),
            disk_total_bytes=disk.total if disk else 0, disk_free_bytes=disk.free if disk else 0, cordon_reason=self.disk.problem,
            attempts=[
                pb.AttemptInfo(
                    run_id=it.run_id, attempt=it.number, phase=now.phase, pids=now.usage.pids,
                    cpu_percent=now.usage.cpu_percent, memory_bytes=now.usage.memory_bytes,
                    seconds_since_checkpoint=max(time.monotonic() - now.checkpoint_at, 0.001) if now.checkpoint_at else 0.0,
                )
                for it, now in [(a.assignment, a.progress) for a in list(self.attempts.values())]
            ],
        )  # fmt: skip

    async def stop(self) -> None:
        """End all attempts, whose runs may get their next attempt elsewhere, and announce that the node leaves."""
        self.end_all()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)
        await self.heartbeat.stop()


def _remember(names: OrderedDict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > _REMEMBERED:
        names.popitem(last=False)


class TrainerService(rpc.TrainerServiceServicer):
    """alveary.trainer.v1.TrainerService."""

    def __init__(self, agent: Agent, context: NodeContext) -> None:
        self._agent, self._context = agent, context

    async def GetNode(self, request: pb.GetNodeRequest, context: Any) -> pb.GetNodeResponse:
        auth.require("reader")
        beat = await asyncio.to_thread(self._agent.beat_message)
        return pb.GetNodeResponse(node=beat.node, target=beat.target, incarnation=beat.incarnation, attempts=beat.attempts)
