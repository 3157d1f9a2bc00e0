"""How the members of a gang talk: the leader's side, a follower's, and that of an attempt on one node. Their protocol is in gang.py.

A report is a NATS request that is repeated until it is answered, and carries the member's full state. The leader holds its answer
back until it has a new order for that member, or two seconds have passed. A member that loses contact with the others is ended by
the scheduler, which revokes the placement: waits here therefore need no timeout of their own while processes run.
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

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import Unavailable
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import StagingFailed
from alveary_trainer.end_signal import REQUESTED_ENDS, End, EndSignal
from alveary_trainer.gang import ENDED, LISTED, READY, STORED, Gang
from alveary_trainer.gang_channel import DecideNames, GangChannel

# How long the leader holds an answer back.
_ANSWER_SECONDS = 2.0
_REQUEST_SECONDS = _ANSWER_SECONDS + 3
# How long a member may be silent once its processes have ended, and the leader may not answer.
_SILENT_SECONDS = 120.0
_UNANSWERED_SECONDS = 600.0
# How often the members that all others wait for are named in the log.
_NAME_LATE_SECONDS = 30.0
_MAX_PAUSE_SECONDS = 2.0
Log = Callable[[str], None]
_SEPARATE_MACHINES = (
    "the nodes of this run cannot reach each other: they are on different machines, and have addresses that hold on one "
    "alone. Trainers in virtual environments: set ALVEARY_ADDRESS. Containers: create an overlay network, and the "
    "target with network=<its name>"
)


def subject(workspace: str, run_id: str, attempt: int) -> str:
    """Where the leader of an attempt listens."""
    return f"alveary-gang.{token(workspace)}.{token(run_id)}.{attempt}"


class Solo(GangChannel):
    """Of an attempt on one node: the same protocol without messages. Also what a leader decides by."""

    def __init__(self, gang: Gang, node: str, incarnation: str, end: EndSignal, log: Log) -> None:
        super().__init__(0, node, incarnation, end)
        self.gang, self._log = gang, log
        # The newest order for each member; its version grows with each change.
        self._orders: dict[int, pb.GangOrder] = {}
        self._moved = asyncio.Event()
        end.subscribe(self._pass_on)
        self._reported()

    async def start(self) -> None:
        """There is nobody to talk to."""

    async def close(self) -> None:
        """There is nobody to talk to."""

    def _pass_on(self, end: End) -> None:
        """An end that was requested of the attempt here is that of all members."""
        if end.reason in REQUESTED_ENDS:
            self.gang.request_end(end.reason.exit_reason, end.sentence)
            self.issue_orders()

    def _reported(self) -> None:
        self.gang.merge_report(self.report)
        self.issue_orders()

    def issue_orders(self) -> None:
        """Decide again how far each member may go."""
        for index in range(self.gang.count):
            fresh, present = self.gang.order(index), self._orders.get(index, pb.GangOrder())
            fresh.version = present.version
            if fresh != present or not present.version:
                fresh.version += 1
                self._orders[index] = fresh
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        self._receive(self._orders[0])

    def _wake_all(self) -> None:
        super()._wake_all()
        self._moved.set()

    async def wait_for_members(self, phase: int) -> None:
        """Return when every member has reached `phase`; every half minute the log names those that have not."""
        begun = time.monotonic()
        while not self.gang.all_at(phase):
            self._raise_failure()
            moved = self._moved
            try:
                async with asyncio.timeout(_NAME_LATE_SECONDS):
                    await moved.wait()
            except TimeoutError:
                late = self.gang.behind(phase) or ["nodes that have not said a word"]
                self._log(f"waits for {', '.join(late)}")
                if phase >= ENDED:
                    self._raise_if_silent(phase, begun)

    def _raise_if_silent(self, phase: int, begun: float) -> None:
        """Raise where a member that has not reached `phase` is silent; `begun`: since when it is waited for."""

    async def _settled(self) -> None:
        await self.wait_for_members(STORED)

    async def _offer_port(self, port: int) -> None:
        await self.wait_for_members(READY)
        if len(self.gang.network_scopes()) > 1:
            raise StagingFailed(_SEPARATE_MACHINES)
        self.gang.port = port or 1
        self.issue_orders()

    async def _decide_file_names(self, decide: DecideNames) -> None:
        await self.wait_for_members(LISTED)
        self.gang.file_names_digest = await decide(self.gang.reports)
        self.issue_orders()

    async def launch_on(self, host: str, command: str) -> int:
        """See GangChannel."""
        if self.gang.launcher != c.LAUNCHER_MPI:
            raise ValueError("only a run with MpiConfiguration starts processes on other nodes")
        index = launch.mpi_index(host)
        if not 0 < index < self.gang.count or index in self.gang.commands:
            raise ValueError(f"{host} is no other node of this run, or has its command already")
        self.gang.commands[index] = [command]
        self.issue_orders()
        while (report := self.gang.reports[index]).phase < ENDED:
            self._raise_failure()
            await self._moved.wait()
        return report.exit.exit_code if report.exit.HasField("exit_code") else 1

    def exit_status(self, own: c.ExitStatus) -> c.ExitStatus:
        """See GangChannel."""
        status = c.ExitStatus()
        status.CopyFrom(self.gang.exit_status() if self.gang.all_at(ENDED) else own)
        return status


class Leader(Solo):
    """Of the first node of a gang: hears the others' reports, and answers with orders."""

    def __init__(self, connection: Client, where: str, gang: Gang, node: str, incarnation: str, end: EndSignal, log: Log) -> None:
        """`where`: the subject to listen at."""
        super().__init__(gang, node, incarnation, end, log)
        self._connection, self._where = connection, where
        self._subscription: Subscription | None = None
        self._answers: set[asyncio.Task[None]] = set()
        # When each other member reported last, time.monotonic().
        self._heard_at: dict[int, float] = {}
        self._closing = False

    async def start(self) -> None:
        """Listen to the others."""
        self._subscription = await self._connection.subscribe(self._where, cb=self._hear)

    def _raise_if_silent(self, phase: int, begun: float) -> None:
        now = time.monotonic()
        silent = [
            report.node
            for index, report in sorted(self.gang.reports.items())
            if index and report.phase < phase and now - max(self._heard_at.get(index, 0.0), begun) > _SILENT_SECONDS
        ]
        if silent:
            raise Unavailable(f"{', '.join(silent)} said nothing for {_SILENT_SECONDS:.0f} s: its trainer does not get on with this run")

    async def _hear(self, message: Msg) -> None:
        # A task of its own: the answer may take a while, and other members report meanwhile.
        task = asyncio.create_task(self._answer(message))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        task.add_done_callback(self._conversation_ended)

    async def _answer(self, message: Msg) -> None:
        try:
            report = pb.GangReport.FromString(message.data)
        except DecodeError as error:
            telemetry.logger().warning("gang.malformed", error=str(error))
            return
        if not 0 < report.index < self.gang.count:
            telemetry.logger().warning("gang.stranger", index=report.index, node=report.node)
            return
        self._heard_at[report.index] = time.monotonic()
        if self.gang.merge_report(report):
            self.issue_orders()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                while self._nothing_new_for(report):
                    await self._moved.wait()
        with contextlib.suppress(nats.errors.Error, OSError):  # it asks again
            await message.respond(self._orders[report.index].SerializeToString())

    def _nothing_new_for(self, report: pb.GangReport) -> bool:
        seen = self._orders[report.index].version <= report.last_order_version
        # Once the conversation has failed, _moved stays set.
        return seen and report.phase < STORED and not self._closing and self._failure is None

    async def close(self) -> None:
        """Answer the requests that wait with the newest orders, and listen no more."""
        self._closing = True
        self._moved.set()
        if self._answers:
            await asyncio.wait(list(self._answers), timeout=_ANSWER_SECONDS)
        if self._subscription is not None:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._subscription.unsubscribe()
        for task in list(self._answers):
            task.cancel()


class Follower(GangChannel):
    """Of any other node of a gang: reports to the leader, and follows its orders."""

    def __init__(self, connection: Client, where: str, index: int, node: str, incarnation: str, end: EndSignal) -> None:
        """`where`: the subject that the leader listens at."""
        super().__init__(index, node, incarnation, end)
        self._connection, self._where = connection, where
        self._changed = asyncio.Event()
        self._acknowledged = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Report, and go on reporting."""
        self._task = asyncio.create_task(self._talk())
        self._task.add_done_callback(self._conversation_ended)

    def _reported(self) -> None:
        self._acknowledged.clear()
        self._changed.set()

    def _wake_all(self) -> None:
        super()._wake_all()
        self._acknowledged.set()

    async def _talk(self) -> None:
        pause, answered_at = 0.1, time.monotonic()
        while True:
            self._changed.clear()
            self.report.last_order_version = self.order.version
            data = self.report.SerializeToString()
            asking = asyncio.ensure_future(self._connection.request(self._where, data, timeout=_REQUEST_SECONDS))
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({asking, changed}, return_when=asyncio.FIRST_COMPLETED)
                if not asking.done():  # there is something new to report
                    continue
                try:
                    order = pb.GangOrder.FromString(asking.result().data)
                except (nats.errors.Error, TimeoutError, OSError, DecodeError) as error:
                    telemetry.logger().info("gang.unanswered", where=self._where, error=str(error) or type(error).__name__)
                    if time.monotonic() - answered_at > _UNANSWERED_SECONDS:
                        raise Unavailable(f"the first node of this run has not answered for {_UNANSWERED_SECONDS:.0f} s") from error
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _MAX_PAUSE_SECONDS)
                    continue
                pause, answered_at = 0.1, time.monotonic()
                self._receive(order)
                if not self._changed.is_set():
                    self._acknowledged.set()
            finally:
                for task in (asking, changed):
                    task.cancel()
                await asyncio.gather(asking, changed, return_exceptions=True)

    async def wait_for_members(self, phase: int) -> None:
        """The leader waits for the others; a follower waits for the leader's orders."""

    async def _settled(self) -> None:
        """Return when the leader has answered the newest report."""
        await self._acknowledged.wait()
        self._raise_failure()

    async def _offer_port(self, port: int) -> None:
        """Only the leader's port is used."""

    async def _decide_file_names(self, decide: DecideNames) -> None:
        """The leader decides."""

    async def launch_on(self, host: str, command: str) -> int:
        """See GangChannel."""
        raise ValueError("mpirun runs on the first node of a run, and starts processes on the others from there")

    def exit_status(self, own: c.ExitStatus) -> c.ExitStatus:
        """See GangChannel."""
        return own

    async def close(self) -> None:
        """Report nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
