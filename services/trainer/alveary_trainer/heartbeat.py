"""Heartbeats: on a thread, a loop and a connection of their own, so that nothing that an attempt does can delay them.

What the answers ask for is done on the trainer's loop. A trainer whose loop stands still keeps its lease for a while, as its
processes run on; one that stands still for good, or that cannot stop what it lost, ends at once: the kernel ends its processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import nats.errors

from alveary_contracts.names import token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.eventlog import connect
from alveary_trainer.settings import TrainerSettings

# A trainer whose control plane is gone for good leaves after this, seconds.
_ABANDONED = 900.0
# How long the trainer's loop may stand still, and may take to stop what it lost its lease for, seconds.
_STUCK, _FENCING = 300.0, 10.0
_LOOK = 1.0


class _Life:
    """Signs of life of a loop, asked for from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked = self._alive = time.monotonic()

    def owed(self) -> float:
        """For how long the loop has owed a sign of life, seconds; asks for the next one."""
        now = time.monotonic()
        if self._alive < self._asked:
            return now - self._asked
        self._asked = now
        self._loop.call_soon_threadsafe(self._answer)
        return 0.0

    def _answer(self) -> None:
        self._alive = time.monotonic()


class Heartbeat:
    """Beats for a node until it is stopped."""

    def __init__(
        self, settings: TrainerSettings, message: Callable[[bool], pb.Heartbeat], *, end: Callable[[str], None], end_all: Callable[[], None],
        leave: Callable[[], None], idle: Callable[[], bool], die: Callable[[int], None] = os._exit,
    ) -> None:  # fmt: skip
        """`message(leaving)` makes a beat, on the heartbeat's thread; `idle` is asked there too.

        On the loop that this is made in: `end(name)` ends what the scheduler took back, `end_all` everything, `leave` stops the
        node. `die` ends the process without a further word.
        """
        self._settings, self._message = settings, message
        self._end, self._end_all, self._leave, self._idle, self._die = end, end_all, leave, idle, die
        self._home = asyncio.get_running_loop()
        self._subject = f"alveary-heartbeat.{token(settings.workspace)}.{token(settings.node)}"
        self._life = _Life(self._home)
        self._stop = threading.Event()
        self._wake: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Done when the thread is over; it has what the heartbeat failed of.
        self.over: asyncio.Future[None] = self._home.create_future()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    async def stop(self) -> None:
        """Say good-bye, and end."""
        self._stop.set()
        if self._loop is not None and self._wake is not None:
            with contextlib.suppress(RuntimeError):  # it is over
                self._loop.call_soon_threadsafe(self._wake.set)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.shield(self.over)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._beat())
        except BaseException as failure:  # handed to the trainer's loop, which ends the service
            error = failure

        def tell() -> None:
            if not self.over.done():
                self.over.set_exception(error) if error is not None else self.over.set_result(None)

        with contextlib.suppress(RuntimeError):  # the trainer's loop is closed
            self._home.call_soon_threadsafe(tell)

    def _at_home(self, work: Callable[[], None]) -> Future[None]:
        """Do something on the trainer's loop."""
        done: Future[None] = Future()

        def do() -> None:
            try:
                work()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._home.call_soon_threadsafe(do)
        return done

    async def _beat(self) -> None:
        s = self._settings
        self._loop, self._wake = asyncio.get_running_loop(), asyncio.Event()
        connection = await connect(s.nats_url, s.nats_user, s.nats_password.get_secret_value(), "alveary-heartbeat", ca=s.ca)
        watching = asyncio.create_task(self._watch())
        answered = time.monotonic()
        try:
            while not self._stop.is_set():
                try:
                    raw = await connection.request(
                        self._subject, self._message(False).SerializeToString(), timeout=max(2.0, s.beat_seconds)
                    )
                    answer = pb.HeartbeatResponse.FromString(raw.data)
                except (nats.errors.Error, TimeoutError, OSError) as error:
                    silent = time.monotonic() - answered
                    telemetry.logger().info("beat.unanswered", seconds=round(silent, 1), error=str(error) or type(error).__name__)
                    if silent > s.lease_seconds - s.beat_seconds:
                        await self._fence()
                    if silent > max(_ABANDONED, 2 * s.lease_seconds):
                        telemetry.logger().warning("beat.abandoned", seconds=round(silent))
                        self._at_home(self._leave)  # nobody will ever ask for this node again
                        return
                    await self._pause(min(0.3, s.beat_seconds))
                    continue
                answered = time.monotonic()
                for name in answer.stop:
                    self._at_home(lambda name=name: self._end(name))  # type: ignore[misc]
                if answer.leave and self._idle():
                    self._at_home(self._leave)
                await self._pause(s.beat_seconds)
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):  # it is missed soon enough anyway
                await connection.request(self._subject, self._message(True).SerializeToString(), timeout=1)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            with contextlib.suppress(nats.errors.Error, TimeoutError, OSError):
                await connection.close()

    async def _pause(self, seconds: float) -> None:
        assert self._wake is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    async def _fence(self) -> None:
        """Stop everything before the scheduler gives it to others."""
        done = self._at_home(self._end_all)
        try:
            async with asyncio.timeout(_FENCING):
                await asyncio.wrap_future(done)
        except TimeoutError:
            telemetry.logger().error("fence.stuck", seconds=_FENCING)
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            self._die(70)

    async def _watch(self) -> None:
        """Look whether the trainer's loop lives; one that stands still for good must not keep its lease."""
        while True:
            if self._life.owed() > _STUCK:
                telemetry.logger().error("loop.stuck", seconds=_STUCK)
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                self._die(70)
                return
            await asyncio.sleep(_LOOK)
