"""The trainers of one attempt, talking: the leader's side and the others'. What they mean by it is in gang.py.

A report is a NATS request that is repeated until it is answered; it says all that is so. The leader holds its answer back
until there is news for that share, or two seconds have passed. Whoever loses the others altogether learns of it from the
scheduler, which takes the placement back: no wait here needs an end of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import nats.errors
from google.protobuf.message import DecodeError
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from alveary_contracts.names import token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_trainer.gang import ENDED, Gang

_PATIENCE = 2.0
# How long a share whose processes have ended may say nothing, and a leader may not answer, seconds.
_SILENT, _UNANSWERED = 120.0, 600.0


def subject(workspace: str, run_id: str, attempt: int) -> str:
    """Where the leader of an attempt listens."""
    return f"alveary-gang.{token(workspace)}.{token(run_id)}.{attempt}"


class Crew:
    """One share's view: what it says of itself, and how far it may go."""

    def __init__(self, index: int, node: str, incarnation: str, on_order: Callable[[pb.GangOrder], None]) -> None:
        self.me = pb.GangReport(index=index, node=node, incarnation=incarnation, phase=pb.GANG_PHASE_STAGING)
        self.order = pb.GangOrder()
        self._on_order = on_order
        self._news = asyncio.Event()
        # What the talking died of. It is raised where something is waited for: a share that hears nothing more would wait
        # for ever, as its beats go on.
        self._failure: BaseException | None = None

    def tell(self, **what: object) -> None:
        """Say more of this share."""
        self.me.MergeFrom(pb.GangReport(**what))  # type: ignore[arg-type]
        self._told()

    def _told(self) -> None:
        raise NotImplementedError

    def _ordered(self, order: pb.GangOrder) -> None:
        if order.version > self.order.version:
            self.order = order
            self._on_order(order)
            self._news.set()

    async def until(self, phase: int, command: bool = False) -> pb.GangOrder:
        """The first order that lets this share go so far (and names a command)."""
        while self.order.phase < phase or (command and self.order.phase == phase and not self.order.command):
            self._news.clear()
            self._sound()
            await self._news.wait()
        return self.order

    def _sound(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _talked(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            self._wake()

    def _wake(self) -> None:
        """Let all who wait look again."""
        self._news.set()

    async def close(self) -> None:
        raise NotImplementedError


class Leader(Crew):
    """Of the first share. Alone, it needs no messages."""

    def __init__(
        self, connection: Client, where: str, gang: Gang, node: str, incarnation: str, on_order: Callable[[pb.GangOrder], None]
    ) -> None:
        super().__init__(0, node, incarnation, on_order)
        self.gang, self._connection, self._where = gang, connection, where
        self._subscription: Subscription | None = None
        # What was last decided for each share; its version grows with each change.
        self._orders: dict[int, pb.GangOrder] = {}
        self._moved = asyncio.Event()
        self._answers: set[asyncio.Task[None]] = set()
        # When each other share spoke last, time.monotonic().
        self._heard: dict[int, float] = {}
        self._closing = False
        self._told()

    async def start(self) -> None:
        """Listen to the others."""
        if self.gang.count > 1:
            self._subscription = await self._connection.subscribe(self._where, cb=self._hear)

    def _told(self) -> None:
        self.gang.take(self.me)
        self.decide()

    def decide(self) -> None:
        """Look at what is known anew."""
        for index in range(self.gang.count):
            fresh, present = self.gang.order(index), self._orders.get(index, pb.GangOrder())
            fresh.version = present.version
            if fresh != present or not present.version:
                fresh.version += 1
                self._orders[index] = fresh
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        self._ordered(self._orders[0])

    def _wake(self) -> None:
        super()._wake()
        self._moved.set()

    async def all_at(self, phase: int, note: Callable[[str], None]) -> None:
        """Return when every share has come so far; says every half minute who has not.

        Raises:
            Unavailable: one that is awaited after the processes' end has said nothing for long.
        """
        begun = time.monotonic()
        while not self.gang.all_at(phase):
            self._sound()
            moved = self._moved
            try:
                async with asyncio.timeout(30):
                    await moved.wait()
            except TimeoutError:
                late = self.gang.behind(phase) or ["nodes that have not said a word"]
                note(f"waits for {', '.join(late)}")
                self._look_for_silence(phase, begun)

    def _look_for_silence(self, phase: int, begun: float) -> None:
        now = time.monotonic()
        silent = [
            report.node for index, report in sorted(self.gang.reports.items())
            if index and report.phase < phase and now - max(self._heard.get(index, 0.0), begun) > _SILENT
        ]  # fmt: skip
        if phase >= ENDED and silent:
            raise Unavailable(f"{', '.join(silent)} said nothing for {_SILENT:.0f} s: its trainer does not get on with this run")

    async def moved(self) -> None:
        """Return when something that anybody said, or was told, has changed."""
        self._sound()
        await self._moved.wait()
        self._sound()

    async def _hear(self, message: Msg) -> None:
        # A task of its own: the answer may take a while, and others speak meanwhile.
        task = asyncio.create_task(self._answer(message))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        task.add_done_callback(self._talked)

    async def _answer(self, message: Msg) -> None:
        try:
            report = pb.GangReport.FromString(message.data)
        except DecodeError as error:
            telemetry.logger().warning("gang.malformed", error=str(error))
            return
        if not 0 < report.index < self.gang.count:
            telemetry.logger().warning("gang.stranger", index=report.index, node=report.node)
            return
        self._heard[report.index] = time.monotonic()
        if self.gang.take(report):
            self.decide()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                while self._orders[report.index].version <= report.seen and report.phase < pb.GANG_PHASE_STORED and not self._closing:
                    await self._moved.wait()
        with contextlib.suppress(nats.errors.Error, OSError):  # it asks again
            await message.respond(self._orders[report.index].SerializeToString())

    async def close(self) -> None:
        """Hear nothing more; what was decided last is still said to those who have asked."""
        self._closing = True
        self._moved.set()
        if self._answers:
            await asyncio.wait(list(self._answers), timeout=_PATIENCE)
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()
        for task in list(self._answers):
            task.cancel()


class Member(Crew):
    """Of any other share."""

    def __init__(
        self, connection: Client, where: str, index: int, node: str, incarnation: str, on_order: Callable[[pb.GangOrder], None]
    ) -> None:
        super().__init__(index, node, incarnation, on_order)
        self._connection, self._where = connection, where
        self._changed = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._task = asyncio.create_task(self._talk())
        self._task.add_done_callback(self._talked)

    async def start(self) -> None:
        """It talks from the beginning."""

    def _told(self) -> None:
        self._acknowledged.clear()
        self._changed.set()

    def _wake(self) -> None:
        super()._wake()
        self._acknowledged.set()

    async def _talk(self) -> None:
        pause, answered = 0.1, time.monotonic()
        while True:
            self._changed.clear()
            self.me.seen = self.order.version
            said = self.me.SerializeToString()
            asking = asyncio.ensure_future(self._connection.request(self._where, said, timeout=_PATIENCE + 3))
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({asking, changed}, return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():  # there is something new to say
                    continue
                try:
                    answer = pb.GangOrder.FromString(asking.result().data)
                except (nats.errors.Error, TimeoutError, OSError, DecodeError) as error:
                    telemetry.logger().info("gang.unanswered", where=self._where, error=str(error) or type(error).__name__)
                    if time.monotonic() - answered > _UNANSWERED:
                        raise Unavailable(f"the first node of this run has not answered for {_UNANSWERED:.0f} s") from error
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 2.0)
                    continue
                pause, answered = 0.1, time.monotonic()
                self._ordered(answer)
                if not self._changed.is_set():
                    self._acknowledged.set()
            finally:
                for task in (asking, changed):
                    task.cancel()
                await asyncio.gather(asking, changed, return_exceptions=True)

    async def heard(self) -> None:
        """Return when the leader has answered to the newest that was told."""
        await self._acknowledged.wait()
        self._sound()

    async def close(self) -> None:
        """Say nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
