"""The node agent: beats, takes placements, ends what must end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import OrderedDict
from functools import partial
from typing import Any

import nats.errors
import psutil

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_contracts.trainer.v1 import trainer_pb2_grpc as rpc
from alveary_core import auth, telemetry
from alveary_core.events import Key, decode
from alveary_trainer.adapters.gpus import gpu_models, gpu_utilisation
from alveary_trainer.attempt import Attempt
from alveary_trainer.disk import DiskWatch, Occupant
from alveary_trainer.node import NodeContext

# A trainer whose control plane is gone for good leaves after this, seconds.
_ABANDONED = 900.0


class Agent:
    """One node."""

    def __init__(self, context: NodeContext) -> None:
        self._context, self._settings = context, context.settings
        self.attempts: dict[str, Attempt] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Cancelled before their placement was seen here; bounded, oldest out.
        self._preempted: OrderedDict[str, None] = OrderedDict()
        self._canceled: OrderedDict[str, None] = OrderedDict()
        self._answered = time.monotonic()
        self.done = asyncio.Event()
        # Whether this process shall begin again once it is done.
        self.afresh = False
        s = context.settings
        folders = [context.runs_dir.parent, s.cache_dir or s.state_dir]
        self.disk = DiskWatch(s.node, folders, s.disk_reserve_bytes, s.disk_reserve_fraction, self._occupants)
        context.disk_fault = self.disk.fault

    async def follow(self, start: int) -> None:
        """Placements for this node, what is taken back or must make room, and cancels, for ever."""
        placements = [f"alveary.*.placement.*.{what}" for what in ("made", "revoked", "preempting")]
        subjects = [*placements, "alveary.*.run.*.cancel_requested"]
        async with contextlib.aclosing(self._context.log.follow(subjects, start)) as stream:
            async for item in stream:
                if item is None:
                    continue
                message, sequence = item
                event = decode(message.subject, dict(message.headers or {}), message.data, sequence)
                telemetry.start_trace(event.traceparent)
                match event.message:
                    case ev.PlacementMade() as made:
                        for index, share in enumerate(made.nodes):
                            if (share.node, share.incarnation) == (self._settings.node, self._context.incarnation):
                                self._take(event.key, made, index)
                    case ev.PlacementRevoked() as revoked:
                        self._end(f"{event.key.id}-{revoked.attempt}", "fenced")
                    case ev.PlacementPreempting() as preempting:
                        name = f"{event.key.id}-{preempting.attempt}"
                        self._preempted[name] = None
                        if len(self._preempted) > 10_000:
                            self._preempted.popitem(last=False)
                        self._end(name, "preempted")
                    case ev.RunCancelRequested():
                        self._canceled[event.key.id] = None
                        if len(self._canceled) > 10_000:
                            self._canceled.popitem(last=False)
                        for attempt in self.attempts.values():
                            if attempt.run_id == event.key.id:
                                attempt.end("canceled")

    def _take(self, key: Key, made: ev.PlacementMade, index: int) -> None:
        name = f"{key.id}-{made.attempt}" + (f".{index}" if index else "")
        if name in self.attempts:
            return
        # Their places may be this attempt's now, and they take a moment to be gone.
        leaving = [t for t in self._tasks if (a := self.attempts.get(t.get_name())) is not None and a.ended_from_outside]
        attempt = self.attempts[name] = Attempt(self._context, key, made, index, leaving)
        telemetry.ATTEMPTS.set(len(self.attempts))
        if attempt.run_id in self._canceled:
            attempt.end("canceled")
        if f"{attempt.run_id}-{attempt.number}" in self._preempted:
            attempt.end("preempted")
        task = asyncio.create_task(attempt.run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.attempts.pop(task.get_name(), None)
        telemetry.ATTEMPTS.set(len(self.attempts))
        if not task.cancelled() and (error := task.exception()):
            # Its placement stands until the scheduler learns that this node no longer reports it.
            telemetry.logger().error("attempt.crashed", attempt=task.get_name(), exc_info=error)
            # The new incarnation lets the scheduler revoke what was here.
            self.afresh = self.afresh or not self.done.is_set()
            self.done.set()

    def leave(self) -> None:
        """Stop serving as a node."""
        self.afresh = False
        self.done.set()

    def _end(self, name: str, why: str) -> None:
        for attempt in list(self.attempts.values()):
            if f"{attempt.run_id}-{attempt.number}" == name:
                attempt.end(why)

    def _occupants(self) -> list[Occupant]:
        return [
            Occupant(a.name, self._context.runs_dir / a.name, partial(a.end, "disk_full"), a.phase == "running")
            for a in self.attempts.values()
        ]

    def beat_message(self, leaving: bool = False) -> pb.Beat:
        """What this node says of itself now."""
        s = self._settings
        memory = psutil.virtual_memory()
        disk = self.disk.disk
        return pb.Beat(
            node=s.node, incarnation=self._context.incarnation, target=s.target, leaving=leaving,
            hostname=socket.gethostname(), labels=s.node_labels, cpus=s.node_cpus or float(len(os.sched_getaffinity(0))), cpu_percent=psutil.cpu_percent(None),
            memory_total_bytes=s.node_memory_bytes or memory.total, memory_used_bytes=memory.total - memory.available,
            gpus=len(s.gpus), gpu_models=[m for i, m in enumerate(gpu_models()) if i in s.gpus],
            gpu_percent=gpu_utilisation(s.gpus),
            disk_total_bytes=disk.total if disk else 0, disk_free_bytes=disk.free if disk else 0, cordon_reason=self.disk.problem,
            attempts=[
                pb.AttemptInfo(
                    run_id=a.run_id, attempt=a.number, phase=a.phase, pids=a.usage.pids,
                    cpu_percent=a.usage.cpu_percent, memory_bytes=a.usage.memory_bytes,
                    seconds_since_checkpoint=max(time.monotonic() - a.saved_at, 0.001) if a.saved_at else 0.0,
                )
                for a in self.attempts.values()
            ],
        )  # fmt: skip

    async def beat(self) -> None:
        """Beat for ever. Unanswered for a lease, everything is stopped before the scheduler gives it to others."""
        s = self._settings
        subject = f"alveary-beat.{token(s.workspace)}.{token(s.node)}"
        while not self.done.is_set():
            try:
                raw = await self._context.log.connection.request(
                    subject, self.beat_message().SerializeToString(), timeout=max(2.0, s.beat_seconds)
                )
            except (nats.errors.Error, TimeoutError, OSError) as error:
                silent = time.monotonic() - self._answered
                telemetry.logger().info("beat.unanswered", seconds=round(silent, 1), error=str(error) or type(error).__name__)
                if silent > s.lease_seconds - s.beat_seconds:
                    for attempt in list(self.attempts.values()):
                        attempt.end("fenced")
                if silent > max(_ABANDONED, 2 * s.lease_seconds):
                    telemetry.logger().warning("beat.abandoned", seconds=round(silent))
                    self.leave()  # nobody will ever ask for this node again
                await asyncio.sleep(min(0.3, s.beat_seconds))
                continue
            self._answered = time.monotonic()
            answer = pb.BeatAnswer.FromString(raw.data)
            for name in answer.stop:
                self._end(name, "fenced")
            if answer.leave and not self.attempts:
                self.done.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(s.beat_seconds):
                    await self.done.wait()

    async def stop(self) -> None:
        """End all attempts, which their runs may make again elsewhere, and say good-bye."""
        for attempt in list(self.attempts.values()):
            attempt.end("fenced")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10)
        subject = f"alveary-beat.{token(self._settings.workspace)}.{token(self._settings.node)}"
        with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):  # it is missed soon enough anyway
            await self._context.log.connection.request(subject, self.beat_message(leaving=True).SerializeToString(), timeout=1)


class TrainerService(rpc.TrainerServiceServicer):
    """alveary.trainer.v1.TrainerService."""

    def __init__(self, agent: Agent, context: NodeContext) -> None:
        self._agent, self._context = agent, context

    async def GetNode(self, request: pb.GetNodeRequest, context: Any) -> pb.GetNodeResponse:
        auth.require("reader")
        beat = self._agent.beat_message()
        return pb.GetNodeResponse(node=beat.node, target=beat.target, incarnation=beat.incarnation, attempts=beat.attempts)
