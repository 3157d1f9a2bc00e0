"""The port that an attempt speaks to its gang by: what it reports of itself, what it waits for, how far it may go.

The protocol is in gang.py, who speaks it in rendezvous.py. An attempt on one node is a gang of one.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import Host
from alveary_trainer.end_signal import EndSignal, from_exit_reason
from alveary_trainer.gang import ENDED, LISTED, READY, RUNNING, STORED

# Of an order, in place of a digest: the names could not be decided, and nothing is stored.
NO_FILE_NAMES = "none"
# The leader's decision about file names: from the reports of all members to the digest of the object with the names.
DecideNames = Callable[[Mapping[int, pb.GangReport]], Awaitable[str]]


class GangChannel(ABC):
    """One member's view of its gang: what it reports of itself, and how far it may go."""

    def __init__(self, index: int, node: str, incarnation: str, end: EndSignal) -> None:
        """`end` is requested where the gang's orders say so."""
        self.report = pb.GangReport(index=index, node=node, incarnation=incarnation, phase=pb.GANG_PHASE_STAGING)
        self.order = pb.GangOrder()
        self._end = end
        self._news = asyncio.Event()
        # What the conversation failed with. Every wait raises it: heartbeats go on, so nothing else would end the wait.
        self._failure: BaseException | None = None

    @abstractmethod
    async def start(self) -> None:
        """Begin to talk."""

    @abstractmethod
    async def close(self) -> None:
        """Stop talking."""

    @abstractmethod
    def _reported(self) -> None:
        """Pass the changed report on."""

    @abstractmethod
    async def wait_for_members(self, phase: int) -> None:
        """Return when this member needs to wait no longer for others to reach `phase`.

        Raises:
            Unavailable: a member whose processes have ended is silent.
        """

    @abstractmethod
    async def _settled(self) -> None:
        """Return when the leader has this member's last report, and those of all others."""

    @abstractmethod
    async def _decide_file_names(self, decide: DecideNames) -> None:
        """Let the leader decide under which names files are stored."""

    @abstractmethod
    async def _offer_port(self, port: int) -> None:
        """Wait until all are ready, where this member leads, and give them a port of this node."""

    @abstractmethod
    async def launch_on(self, host: str, command: str) -> int:
        """Run a command of mpirun's on another node; returns its exit code once it has ended.

        Raises:
            ValueError: mpirun does not run here, or has no such node, or has started its command there before.
        """

    @abstractmethod
    def exit_status(self, own: c.ExitStatus) -> c.ExitStatus:
        """How the attempt ended, as far as this member knows; `own` is how its own part did."""

    # ---- the phases of an attempt ---------------------------------------------------------------------------------

    async def rendezvous(self, host: Host) -> launch.Team:
        """Wait until all members are ready; returns where all of them are. `host`: where this one is.

        Raises:
            StagingFailed: they cannot reach each other.
        """
        self.tell(phase=READY, host=host.name, network_scope=host.network_scope)
        await self._offer_port(host.port)
        order = await self.wait_for_order(RUNNING)
        return launch.Team(self.report.index, list(order.hosts), order.port, host)

    async def daemon_command(self) -> Sequence[str]:
        """What mpirun, on the leader's node, wants started here."""
        return (await self.wait_for_order(RUNNING, with_command=True)).command

    async def running(self) -> None:
        """Report that the processes of this node run; return when those of all do."""
        self.tell(phase=RUNNING)
        await self.wait_for_members(RUNNING)

    async def ended(self, status: c.ExitStatus, failed_at: float, ranks: Sequence[int]) -> None:
        """Report how the processes of this node ended; return when those of all have.

        `failed_at`: Unix seconds of the first failure of a rank; 0: none failed.
        """
        self.tell(phase=ENDED, exit=status, failed_at=failed_at, ranks=ranks)
        await self.wait_for_members(ENDED)

    async def agree_on_file_names(self, file_list_digest: str, error: str, decide: DecideNames) -> str:
        """Report which files this node has; returns the digest of the names they are stored under, or NO_FILE_NAMES.

        `error`: why the files could not be listed. `decide` is called on the leader, once all have reported.
        """
        self.tell(phase=LISTED, file_list_digest=file_list_digest, error=error)
        await self._decide_file_names(decide)
        return (await self.wait_for_order(STORED)).file_names_digest

    async def stored(self, error: str) -> None:
        """Report that the files of this node are stored, or why not; return when it is known, on the leader of all members."""
        self.report_stored(error)
        await self._settled()

    def report_stored(self, error: str) -> None:
        """Report that storing is over, without waiting for anything."""
        self.tell(phase=STORED, error=error)

    # ---- talking --------------------------------------------------------------------------------------------------

    def tell(self, **fields: object) -> None:
        """Add to this member's report."""
        self.report.MergeFrom(pb.GangReport(**fields))  # type: ignore[arg-type]
        self._reported()

    def _receive(self, order: pb.GangOrder) -> None:
        if order.version <= self.order.version:
            return
        self.order = order
        # Once the processes have ended, an order to end them must not interrupt the storing.
        if order.phase == ENDED and not self._end.storing:
            self._end.request(from_exit_reason(order.end_reason), order.message)
        self._news.set()

    async def wait_for_order(self, phase: int, *, with_command: bool = False) -> pb.GangOrder:
        """The first order that lets this member go as far as `phase`, and names a command where that is asked for."""
        while self.order.phase < phase or (with_command and self.order.phase == phase and not self.order.command):
            self._news.clear()
            self._raise_failure()
            await self._news.wait()
        return self.order

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _conversation_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._failure = failure
            self._wake_all()

    def _wake_all(self) -> None:
        self._news.set()
