"""One attempt of a run on this node: stage, launch, supervise, store, report.

Of a run on several nodes each has an `Attempt`, its share of the placement; the first one leads and writes the events.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.eventlog import Conflict
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import Host, Limits, Outcome, Place, Say, Staged, StagingFailed, Tree, Usage, View
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.checkpoints import Checkpoints, fetch
from alveary_trainer.context_server import ContextServer
from alveary_trainer.crew import Leader, Member, subject
from alveary_trainer.file_names import printable
from alveary_trainer.gang import ASKED, ENDED, LISTED, PEER, READY, RUNNING, STORED, Gang
from alveary_trainer.hints import lacked_shared_memory
from alveary_trainer.lines import Lines
from alveary_trainer.log_folder import LogFolder
from alveary_trainer.node import NodeContext
from alveary_trainer.outputs import STORING, OutputStore, walk
from alveary_trainer.ranks import Rank, Ranks
from alveary_trainer.script_api import operations
from alveary_trainer.shipper import Shipper, log_chunk, metric_batch, pump

T = TypeVar("T")
# What is said of an end that was asked for.
_WORDS = {
    "canceled": "canceled",
    "preempted": "a run that comes first needs its place",
    "timeout": "it ran longer than max_run_duration_seconds = {:g}",
    PEER: "another node of the run failed",
}
# Ends that break off the storing as well: the processes are gone by then.
_BREAKING_OFF = ("canceled", "timeout")
# Instead of names: the leader could not decide them.
_NO_NAMES = "none"
_ALONE = Host("localhost", "", 0)
# How long what was taken back on this node may take to be gone, seconds; it was killed.
_GONE = 30.0
# How long killed processes may take to end, what they printed to be read once they have, and each part of an attempt to be closed, seconds.
_KILLED, _READ, _CLOSED = 120.0, 120.0, 30.0
# How long logs and metrics may stand still at the end before what is left of them is lost, seconds; and where the end is broken off.
_STALLED, _HURRIED = 60.0, 10.0
# How long outputs and logs of a run that is over wait for space on a full disk, seconds.
_FULL = 900.0
# How often ./logs is looked at for files to be synced; beyond how many bytes they have to stand still for how long first, or wait for the end.
_SYNC_SECONDS, _SYNCED, _STILL_SECONDS, _SYNCED_AT_END = 5.0, 64 << 20, 10.0, 4 << 30
# An event that cannot be written is tried so often in a row, where nobody foresaw why.
_REPORT_TRIES = 20
_LONGEST_NOTE = 64 << 10


class Fenced(Exception):
    """The attempt's place was taken from it: it says and stores nothing more."""


class Unkillable(Exception):
    """Killed processes do not end."""


class Attempt:
    """A node's share of an attempt, from placement to report."""

    def __init__(
        self, node: NodeContext, key: Key, placement: ev.PlacementMade, index: int = 0, after: Sequence[asyncio.Task[None]] = ()
    ) -> None:
        """`index` into the placement's nodes. `after`: what must be gone from this node before anything is launched."""
        self._node, self.run_id, self.workspace = node, key.id, key.workspace
        self._placement, self.spec, self.number = placement, placement.spec, placement.attempt
        self.index, self._count, self._after = index, len(placement.nodes), after
        self.phase = "staging"
        self.usage = Usage()
        # When it stored a checkpoint last, time.monotonic(); 0: never.
        self.saved_at = 0.0
        self._key = Key(key.workspace, "attempt", f"{key.id}-{self.number}")
        self._sequence = 0
        self._share = placement.nodes[index]
        self.name = f"{key.id}-{self.number}" + (f".{index}" if index else "")
        self._root = node.runs_dir / self.name
        self._code = self._root / "work"
        self._place: Place | None = None
        self._tree: Tree | None = None
        # Why it must end before its time: one of gang.ASKED, "peer", "out_of_memory", "disk_full", or "fenced" (then it says nothing).
        self._end, self._why = "", ""
        self._ending, self._fenced = asyncio.Event(), asyncio.Event()
        self._tail: deque[str] = deque(maxlen=20)
        self._logs = Shipper(node.log.js, f"alveary-logs.{token(key.workspace)}.{token(key.id)}", log_chunk, self._note, "log lines")
        self._metrics = Shipper(
            node.log.js, f"alveary-metrics.{token(key.workspace)}.{token(key.id)}", metric_batch(self.number), self._note, "metric points"
        )
        self._reports: asyncio.Queue[Message | None] = asyncio.Queue()
        # What was said of things beside the run that failed.
        self._said: set[str] = set()
        # Why its storing is broken off; "": it is not.
        self._broken_off, self._breaking_off = "", asyncio.Event()
        self._limiting: asyncio.Task[None] | None = None
        self._outputs = OutputStore(node.store, key.id, self.number, index, self._code, self._note, count=self._count)
        self._held = AsyncExitStack()
        self._resume = self._code / ".alveary-resume"
        self._ranks: Ranks | None = None
        folder = self._code / "outputs/checkpoints"
        self._checkpoints = Checkpoints(node.store, self.run_id, self.number, folder, node.settings.checkpoints_kept, index, self._note)
        connection, where = node.log.connection, subject(key.workspace, key.id, self.number)
        self._crew: Leader | Member
        if index == 0:
            gang = Gang(self._count, self.spec.launcher)
            self._crew = Leader(connection, where, gang, self._share.node, self._share.incarnation, self._on_order)
        else:
            self._crew = Member(connection, where, index, self._share.node, self._share.incarnation, self._on_order)

    @property
    def ended_from_outside(self) -> bool:
        """Its place was taken from it."""
        return self._fenced.is_set()

    def end(self, why: str, message: str = "") -> None:
        """Ask for the end, once; "fenced" overrules everything. While it is finalizing, being canceled or over time breaks that off."""
        if self.phase == "finalizing" and why in _BREAKING_OFF:
            self._broken_off = self._broken_off or why
            self._breaking_off.set()
            return
        if self._end and why != "fenced":
            return
        self._end, self._why = why, message
        self._ending.set()
        if why == "fenced":
            self._fenced.set()
            if self._tree:
                self._tree.kill()
        elif isinstance(self._crew, Leader) and why in ASKED:
            self._crew.gang.end(why, message or _WORDS[why].format(self.spec.max_run_duration_seconds))
            self._crew.decide()

    def _on_order(self, order: pb.GangOrder) -> None:
        if order.phase == ENDED:
            self.end(order.why, order.message)

    async def _unless(self, event: asyncio.Event, work: Awaitable[T]) -> T | None:
        """The result of `work`; None where `event` came first."""
        doing, waiting = asyncio.ensure_future(work), asyncio.create_task(event.wait())
        try:
            await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
            return doing.result() if doing.done() else None
        finally:
            for task in (doing, waiting):
                task.cancel()
            await asyncio.gather(doing, waiting, return_exceptions=True)

    async def _unfenced(self, work: Awaitable[T]) -> T:
        """The result of `work`.

        Raises:
            Fenced: the attempt lost its place first.
        """
        done = await self._unless(self._fenced, work)
        if self._fenced.is_set():
            raise Fenced
        return done  # type: ignore[return-value]

    async def run(self) -> None:
        """All of it; returns when nothing is left of it on this node. What fails here fails this attempt and no other."""
        reporter = asyncio.create_task(self._report())
        self._say("accepted", ev.AttemptAccepted(node=self._share.node, incarnation=self._node.incarnation))
        try:
            try:
                await self._crew.start()
                status = await self._stage_and_run()
            except (StagingFailed, DigestMismatch, AlvearyError) as error:
                status = c.ExitStatus(reason="staging_failed", message=printable(str(error)))
            except Exception as error:
                status = self._fault(error, "staging or running it")
            if self._end != "fenced":
                try:
                    await self._conclude(status)
                except Fenced:
                    raise
                except Exception as error:
                    await self._conclude_anyway(self._fault(error, "storing its outputs"))
                self._reports.put_nowait(None)
                await self._unfenced(reporter)
        except Fenced:
            telemetry.logger().info("attempt.fenced", run=self.run_id, attempt=self.number, share=self.index)
        finally:
            reporter.cancel()
            if self._limiting is not None:
                self._limiting.cancel()
            await self._clean()

    async def _clean(self) -> None:
        """Leave nothing on this node; what cannot be removed holds up nothing else."""

        async def kill() -> None:
            self._outputs.stop()
            if self._tree:
                self._tree.kill()

        steps = (
            kill, self._crew.close, self._logs.close, self._metrics.close, self._held.aclose,
            lambda: asyncio.to_thread(remove_tree, self._root),
        )  # fmt: skip
        for step in steps:
            try:
                async with asyncio.timeout(_CLOSED):
                    await step()
            except Exception:
                telemetry.logger().exception("attempt.clean", run=self.run_id, attempt=self.number)

    def _fault(self, error: Exception, doing: str) -> c.ExitStatus:
        """The end of an attempt that the trainer failed on."""
        telemetry.logger().error("attempt.fault", run=self.run_id, attempt=self.number, exc_info=error)
        text = f"the trainer failed while {doing}: {type(error).__name__}: {error}"
        self._note(text)
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._note(line)
        return c.ExitStatus(reason="internal_error", message=printable(text)[:4000], last_lines=self._tail)

    async def _conclude(self, status: c.ExitStatus) -> None:
        """From the end of this node's processes to the report on the whole attempt, unless it is broken off."""
        self.phase = "finalizing"
        if self._end == "disk_full":  # nothing of it is stored, and others need the space now
            await asyncio.to_thread(remove_tree, self._root)
        # A failure before there were ranks: what the program said, if anything.
        if not status.last_lines:
            status.last_lines[:] = self._tail
        first = self._ranks.first_failure() if self._ranks is not None else None
        self._crew.tell(
            phase=ENDED, exit=status, failed_at=first.ended_at if first else 0.0,
            ranks=sorted(self._ranks.ranks) if self._ranks is not None else [],
        )  # fmt: skip
        try:
            finished = await self._unfenced(self._unless(self._breaking_off, self._store()))
        except AlvearyError as error:
            finished = ev.AttemptFinished(exit=c.ExitStatus(reason="upload_failed", message=_not_stored(error)))
        if self._breaking_off.is_set() and finished is None:
            finished = await self._unfenced(self._break_off(status))
        if finished is not None and not self.index:
            await self._unfenced(self._ship_rest())
            self._append_losses(finished.exit)
            self._say("finished", finished)

    async def _store(self) -> ev.AttemptFinished:
        """Store what this share left, and what all shares left as the run's; returns what is to be said of it."""
        crew = self._crew
        if isinstance(crew, Leader):
            await crew.all_at(ENDED, self._note)
            self._say("finalizing", ev.AttemptFinalizing(exit=crew.gang.verdict()))
        error, listing = "", ""
        if self._count > 1:
            try:
                listing = await self._outputs.list_files()
            except STORING as failure:
                error = _not_stored(failure)
        crew.tell(phase=LISTED, listing=listing, error=error)
        if isinstance(crew, Leader):
            await crew.all_at(LISTED, self._note)
            try:
                crew.gang.names = await self._outputs.name_files(crew.gang)
            except STORING as failure:
                error, crew.gang.names = _not_stored(failure), _NO_NAMES
            crew.decide()
        order = await crew.until(STORED)
        files: dict[str, c.FileEntry] = {}
        if order.names != _NO_NAMES:
            try:
                names = await self._outputs.names(order.names)
                files = await self._with_space(lambda: self._outputs.store_all(names))
            except STORING as failure:
                error = _not_stored(failure)
        await self._ship_rest()
        crew.tell(phase=STORED, error=error)
        if isinstance(crew, Member):
            await crew.heard()
            return ev.AttemptFinished()
        await crew.all_at(STORED, self._note)
        status = crew.gang.verdict()
        if status.reason == "upload_failed":
            return ev.AttemptFinished(exit=status)
        try:
            digest, count, size = await self._with_space(lambda: self._outputs.make_whole(crew.gang, crew.order.names, files))
        except STORING as failure:
            return ev.AttemptFinished(exit=c.ExitStatus(reason="upload_failed", message=_not_stored(failure)))
        return ev.AttemptFinished(exit=status, manifest_digest=digest, output_files=count, output_bytes=size)

    async def _with_space(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` returns. While this node's disk is full it is tried again: the object store may be on it too.

        Raises:
            one of STORING: it failed for another reason, or for _FULL seconds.
        """
        deadline = time.monotonic() + _FULL
        while True:
            try:
                return await work()
            except STORING as failure:
                fault = self._node.disk_fault()
                if not fault or time.monotonic() > deadline:
                    raise
                self._note(f"{_not_stored(failure)}; it is tried again, as {fault}")
                await asyncio.sleep(2.0)

    async def _break_off(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """The end of an attempt whose storing is not waited for; of one node, what was stored so far is the run's."""
        outputs, crew = self._outputs, self._crew
        outputs.stop()
        words = _WORDS[self._broken_off].format(self.spec.max_run_duration_seconds)
        text = f"{words}; {outputs.stored} of {outputs.total} files were stored by then"
        self._note(text)
        if isinstance(crew, Member):
            crew.tell(phase=STORED, error=text)
            return ev.AttemptFinished()
        verdict = c.ExitStatus()
        verdict.CopyFrom(crew.gang.verdict() if crew.gang.all_at(ENDED) else status)
        if verdict.reason not in ASKED:
            verdict.reason = self._broken_off
        verdict.message = text
        if self._count > 1:  # the others are stopped by the scheduler once this is over
            return ev.AttemptFinished(exit=verdict)
        try:
            async with asyncio.timeout(_HURRIED):
                digest, count, size = await outputs.make_whole(crew.gang, "own", outputs.done)
        except (*STORING, TimeoutError) as failure:
            self._note(_not_stored(failure))
            return ev.AttemptFinished(exit=verdict)
        return ev.AttemptFinished(exit=verdict, manifest_digest=digest, output_files=count, output_bytes=size)

    async def _conclude_anyway(self, status: c.ExitStatus) -> None:
        """The report on an attempt whose end could not be brought about as it should."""
        self._crew.tell(phase=STORED, error=status.message)
        await self._unfenced(self._ship_rest())
        self._append_losses(status)
        self._say("finished", ev.AttemptFinished(exit=status))

    async def _ship_rest(self) -> None:
        """Everything that was printed and logged is stored when this returns, or lost."""
        patience = _HURRIED if self._breaking_off.is_set() else _FULL if self._node.disk_fault() else _STALLED
        await self._logs.finish(patience)
        await self._metrics.finish(patience)

    def _append_losses(self, status: c.ExitStatus) -> None:
        for count, what in ((self._logs.lost, "log lines"), (self._metrics.lost, "metric points")):
            if count:
                lost = f"{count:,} {what} were lost: the message bus did not take them"
                status.message = f"{status.message}; {lost}" if status.message else lost

    # ---- reports --------------------------------------------------------------------------------------------------

    def _say(self, phase: str, event: Message) -> None:
        if self.index:  # the first share speaks for all
            return
        telemetry.logger().info("attempt", run=self.run_id, attempt=self.number, phase=phase)
        self._reports.put_nowait(event)

    async def _report(self) -> None:
        """Append events in order without holding up the work; ends after None."""
        while (event := await self._reports.get()) is not None:
            tries = 0
            while self._end != "fenced":
                try:
                    done = await self._node.log.append(self._key, [event], self._sequence)
                    self._sequence = done.sequence
                    break
                except Conflict:
                    # Only this process writes it: an append of ours that was acknowledged too late to be seen.
                    present = await self._node.log.read(self._key)
                    self._sequence = present[-1].sequence if present else 0
                    if present and type(present[-1].message) is type(event):
                        break
                except AlvearyError as error:  # the log is away: for as long as the attempt has its lease
                    telemetry.logger().warning("attempt.report", run=self.run_id, error=str(error))
                    await asyncio.sleep(0.5)
                except Exception:
                    tries += 1
                    telemetry.logger().exception("attempt.report", run=self.run_id, tries=tries)
                    if tries == _REPORT_TRIES:
                        raise  # the placement is taken back once this node no longer names it
                    await asyncio.sleep(0.5)

    def _note(self, text: str) -> None:
        where = f"{self._share.node}: " if self._count > 1 else ""
        data = f"{where}{text}".encode(errors="backslashreplace")[:_LONGEST_NOTE]
        line = logs_pb2.LogLine(stream="system", attempt=self.number, data=data)
        line.time.GetCurrentTime()
        self._logs.add(line)

    # ---- staging and running --------------------------------------------------------------------------------------

    async def _stage_and_run(self) -> c.ExitStatus:
        async def say(text: str) -> None:
            self._note(text)

        self._code.mkdir(parents=True)
        inputs: dict[str, Path] = {}
        staged = await self._unless(self._ending, self._stage(inputs, say))
        if staged is None:
            return self._status(Outcome())
        team = await self._unless(self._ending, self._meet())
        if team is not None and self._after:
            await self._unless(self._ending, asyncio.wait(self._after, timeout=_GONE))
        command: Sequence[str] = ()
        if team is not None and self.spec.launcher == c.LAUNCHER_MPI and self.index:
            order = await self._unless(self._ending, self._crew.until(RUNNING, command=True))
            command = order.command if order is not None else ()
        if team is None or self._ending.is_set():
            return self._status(Outcome())
        return await self._supervise(staged, inputs, team, command)

    @property
    def _gang_name(self) -> str:
        return f"{self.run_id}-{self.number}" if self._count > 1 else ""

    async def _meet(self) -> launch.Team:
        """Wait for the other shares; returns where all of them are.

        Raises:
            StagingFailed: they cannot reach each other.
        """
        host = _ALONE
        if self._count > 1 or launch.has_ranks(self.spec):
            host = await self._node.runtime.host(self._gang_name, self.index, self._placement.network or "bridge")
        self._crew.tell(phase=READY, host=host.name, realm=host.realm)
        if isinstance(self._crew, Leader):
            gang = self._crew.gang
            await self._crew.all_at(READY, self._note)
            if len(gang.realms()) > 1:
                raise StagingFailed(
                    "the nodes of this run cannot reach each other: they are on different machines, and have addresses that hold on one "
                    "alone. Trainers in virtual environments: set ALVEARY_ADDRESS. Containers: create an overlay network, and the "
                    "target with network=<its name>"
                )
            gang.port = host.port or 1
            self._crew.decide()
        order = await self._crew.until(RUNNING)
        return launch.Team(self.index, list(order.hosts), order.port, host)

    async def _stage(self, inputs: dict[str, Path], say: Say) -> Staged:
        """Everything that the run needs, held on this node until the attempt is over."""
        node = self._node

        async def environment() -> Staged:
            staged = node.runtime.stage(self.workspace, self._placement.image_digest, self.spec.environment, say)
            return await self._held.enter_async_context(staged)

        async def snapshot() -> None:
            if self.spec.snapshot:
                async with node.snapshots.use(self.spec.snapshot, say) as source:
                    await asyncio.to_thread(shutil.copytree, source, self._code, dirs_exist_ok=True, symlinks=True)

        async def dataset(item: c.InputDataset) -> None:
            cache = node.models if item.model else node.datasets
            inputs[item.name] = await self._held.enter_async_context(cache.use(item.manifest_digest, say))

        async def resume() -> None:
            earlier = [(self.run_id, number) for number in range(self.number - 1, 0, -1)]
            others = [(self.spec.resume_from, number) for number in range(self.spec.resume_attempt, 0, -1)]
            found = await fetch(node.store, [*earlier, *others], self._root / "resume")
            if found is not None:
                self._note(f"resumes from {found[2]} files of run {found[0]}, attempt {found[1]}")

        try:
            async with asyncio.TaskGroup() as group:
                staged = group.create_task(environment())
                group.create_task(snapshot())
                group.create_task(resume())
                for item in self.spec.inputs:
                    group.create_task(dataset(item))
        except ExceptionGroup as error:
            raise error.exceptions[0] from error
        for name in ("outputs", "logs"):
            (self._code / name).mkdir(exist_ok=True)
        if (self._root / "resume").is_dir():
            await asyncio.to_thread(os.rename, self._root / "resume", self._resume)
        return staged.result()

    def _argv(self, staged: Staged, view: View, team: launch.Team, command: Sequence[str]) -> tuple[list[str], list[str]]:
        """The program of each rank, and what is launched here."""
        spec, runtime = self.spec, self._node.runtime
        own = launch.program(spec, staged.python, view.inputs)
        if spec.launcher == c.LAUNCHER_TORCHRUN:
            return own, launch.torchrun(spec, staged.python, view.lib, team, f"{self.run_id}-{self.number}")
        if spec.launcher == c.LAUNCHER_MPI:
            if self.index:
                return own, launch.mpi_daemon(command)
            try:
                return own, launch.mpirun(spec, runtime.command("mpirun", staged), team)
            except StagingFailed as error:
                raise StagingFailed(f"{error}: {launch.NO_MPIRUN}") from error
        return own, own

    def _limits(self, team: launch.Team) -> Limits:
        gpus = tuple(self._node.settings.gpus[i] for i in self._share.gpu_indexes)
        return Limits(self.spec.resources, gpus, self._placement.network or "bridge", self._gang_name, team.host.name)

    async def _launch_there(self, host: str, command: str) -> int:
        """What mpirun wants of its launch agent: run a command on another node, until it has ended."""
        assert isinstance(self._crew, Leader)
        gang, index = self._crew.gang, launch.mpi_index(host)
        if not 0 < index < self._count or index in gang.commands:
            raise ValueError(f"{host} is no other node of this run, or has its command already")
        gang.commands[index] = [command]
        self._crew.decide()
        while (report := gang.reports[index]).phase < ENDED:
            await self._crew.moved()
        return report.exit.exit_code if report.exit.HasField("exit_code") else 1

    async def _supervise(self, staged: Staged, inputs: dict[str, Path], team: launch.Team, command: Sequence[str]) -> c.ExitStatus:
        runtime = self._node.runtime
        (self._root / "tmp").mkdir(mode=0o700)
        sockets = self._node.sockets_dir / self.name
        sockets.mkdir(mode=0o700, parents=True)
        place = self._place = Place(self.name, self._root, sockets / "run.sock", self._node.runtime_dir, inputs)
        below = runtime.readable_below(place)
        self._outputs.own, self._outputs.below = place.root, below
        asks = operations(self._node, self.run_id, self.number, self.spec, place, self._outputs, self._note)
        server = ContextServer(place.socket, self.run_id, self._metrics, asks, self._note)
        await server.start()
        mpi = self.spec.launcher == c.LAUNCHER_MPI and isinstance(self._crew, Leader)
        ranks = Ranks(sockets, self._logs, self.number, self._launch_there if mpi else None)
        self._ranks = ranks if launch.has_ranks(self.spec) or self._count > 1 else None
        first = self.index * launch.ranks_per_node(self.spec)
        folder = LogFolder(self._code / "logs", self._logs, self.number, below, first, self._note)
        tasks: list[asyncio.Task[None]] = []
        try:
            view = runtime.view(place, staged)
            own, argv = self._argv(staged, view, team, command)
            if launch.has_ranks(self.spec):
                ranks.start(own, view.work)
            env = launch.variables(self.spec, view, staged.python, self.run_id, self.number, team)
            if self._resume.is_dir():
                env["ALVEARY_RESUME_FROM"] = f"{view.work}/{self._resume.name}"
            tree = self._tree = await runtime.launch(place, staged, argv, env, self._limits(team))
            self.phase = "running"
            self._crew.tell(phase=RUNNING)
            self._limiting = asyncio.create_task(self._limit())
            launcher = "launcher-" if launch.has_ranks(self.spec) else ""
            over = asyncio.Event()
            pumps = [
                asyncio.create_task(pump(fd, Lines(self._logs, f"{launcher}{name}", first, self.number, self._tail), self._logs, over))
                for fd, name in ((tree.stdout, "stdout"), (tree.stderr, "stderr"))
            ]
            watching = [asyncio.create_task(w) for w in (self._measure(), self._enforce(tree, ranks), self._started())]
            following = asyncio.create_task(self._kept_up(folder.run, "following ./logs"))
            keeping = asyncio.create_task(self._keep(below))
            syncing = asyncio.create_task(self._kept_up(lambda: self._sync_logs(folder, place, below), "syncing ./logs"))
            tasks = [*watching, following, keeping, syncing, *pumps]
            outcome = await self._outcome(tree, watching)
            self.phase, ended_at = "finalizing", time.time()
            over.set()
            if outcome.left:
                self._note(
                    f"processes {', '.join(map(str, outcome.left))} were killed and do not die: they wait for a device or a file system"
                )
            await self._read_rest(pumps)
            await ranks.finish()
            await _ended(following, syncing)
            await self._attempted(folder.finish, "following ./logs")
            await server.finish()
            await _ended(keeping)
            await self._unless(self._breaking_off, self._unless(self._fenced, self._sync(below, last=True)))
            if self._count > 1 and not launch.has_ranks(self.spec):
                stopped = self._end in (PEER, *ASKED)
                ranks.ranks[self.index] = Rank(self.index, 0, self._tail, outcome.exit_code, outcome.signal, stopped, ended_at)
            return self._status(outcome)
        finally:
            await _ended(*tasks)
            folder.close()
            await server.finish(0.1)
            await ranks.finish(0.1)
            await asyncio.to_thread(shutil.rmtree, sockets, ignore_errors=True)
            runtime.leave(place)

    async def _outcome(self, tree: Tree, watching: Sequence[asyncio.Task[None]]) -> Outcome:
        """How the processes ended. Where one of those who watch them fails, they are killed, and its failure is raised."""
        waiting, watchers = asyncio.ensure_future(tree.wait()), set(watching)
        try:
            while not waiting.done():
                done, _ = await asyncio.wait({waiting, *watchers}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & watchers:
                    watchers.discard(task)
                    task.result()
            return waiting.result()
        finally:
            deadline = time.monotonic() + _GONE
            while not waiting.done() and time.monotonic() < deadline:
                tree.kill()  # again: what is only just being started is not there yet
                await asyncio.wait({waiting}, timeout=0.2)
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def _read_rest(self, pumps: Sequence[asyncio.Task[None]]) -> None:
        """Read what the processes left in their pipes, which end when nobody holds them any more."""
        _, late = await asyncio.wait(pumps, timeout=_READ)
        if late:
            self._note(f"its output was still open {_READ:.0f} s after its end: what comes now is not kept")
        await _ended(*late)
        for task in pumps:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def _kept_up(self, work: Callable[[], Awaitable[None]], what: str) -> None:
        """Something beside the run that runs for ever; where it fails, the run goes on, and it begins again."""
        while True:
            await self._attempted(work, what)
            await asyncio.sleep(_SYNC_SECONDS)

    async def _attempted(self, work: Callable[[], Awaitable[None]], what: str) -> None:
        try:
            await work()
        except Exception as error:
            telemetry.logger().exception("attempt.beside", run=self.run_id, what=what)
            text = f"{what} failed: {type(error).__name__}: {error}"
            if text not in self._said:
                self._said.add(text)
                self._note(text)

    async def _sync_logs(self, folder: LogFolder, place: Place, below: Path) -> None:
        """Store what of ./logs is not followed as text (event files, profiles) while the run lives. Of the first share alone."""
        while not self.index:
            begun = time.monotonic()
            found = await asyncio.to_thread(walk, self._code, ("logs",), place.root, below)
            files = [f for f in found.files if not folder.follows((f.device, f.inode)) and f.size <= _SYNCED_AT_END]
            looked = time.monotonic() - begun
            await self._outputs.sync(files, _SYNCED, _STILL_SECONDS)
            await asyncio.sleep(max(_SYNC_SECONDS, 20 * looked))

    async def _started(self) -> None:
        """Say that it runs once it does on every node."""
        if isinstance(self._crew, Leader):
            if not self._crew.gang.all_at(RUNNING):
                await self._crew.all_at(RUNNING, self._note)
            self._say("started", ev.AttemptStarted(process_count=self._count * launch.ranks_per_node(self.spec)))

    async def _enforce(self, tree: Tree, ranks: Ranks) -> None:
        """When the end is asked for: SIGTERM to the main process of each rank, once; the grace; SIGKILL to all."""
        await self._ending.wait()
        if self._end in (PEER, *ASKED):
            self._note(f"{self._why or self._end}: SIGTERM, then SIGKILL after {self.spec.grace_seconds:g} s")
            if not ranks.ask():
                tree.terminate()
            await asyncio.sleep(self.spec.grace_seconds)
        killed = time.monotonic()
        while True:  # until wait() sees the end and cancels this
            tree.kill()
            await asyncio.sleep(0.2)
            if time.monotonic() - killed > _KILLED:
                raise Unkillable(f"its processes have not ended {_KILLED:.0f} s after SIGKILL: the kernel holds them, look at the node")

    async def _keep(self, below: Path) -> None:
        """Copy checkpoints away, once a second."""
        while True:
            await asyncio.sleep(1.0)
            await self._sync(below)

    async def _sync(self, below: Path, *, last: bool = False) -> None:
        if self._end in ("fenced", "disk_full"):
            return

        async def sync() -> None:
            if await self._checkpoints.sync(below, last=last):
                self.saved_at = time.monotonic()

        # The run goes on; the next second tries again, and the end stores all outputs or fails.
        await self._attempted(sync, "copying its checkpoints away")

    async def _limit(self) -> None:
        if self.spec.max_run_duration_seconds and self.index == 0:
            await asyncio.sleep(self.spec.max_run_duration_seconds)
            self.end("timeout")

    async def _measure(self) -> None:
        limit = self.spec.resources.memory_bytes
        while self._tree is not None:
            begun = time.monotonic()
            self.usage = await asyncio.to_thread(self._tree.usage)
            looked = time.monotonic() - begun
            if self.usage.excess:
                self.end("limit", self.usage.excess)
            if self.usage.oom_kills:
                self._note(f"out of memory: it reached its limit of {limit / 2**20:.0f} MiB, and the kernel killed a process of it")
                self.end("out_of_memory")
                return
            if limit and self.usage.memory_bytes > limit:
                self._note(f"out of memory: {self.usage.memory_bytes / 2**20:.0f} MiB are more than the {limit / 2**20:.0f} asked for")
                self.end("out_of_memory")
            # Where nothing but this counts memory, adding up that of large processes takes its time.
            await asyncio.sleep(max(0.25 if limit else 1.0, 10 * looked))

    def _status(self, outcome: Outcome) -> c.ExitStatus:
        status = c.ExitStatus()
        if outcome.exit_code is not None:
            status.exit_code = outcome.exit_code
        if outcome.signal is not None:
            status.signal = outcome.signal
        if self._end == "out_of_memory":
            status.reason = self._end
            status.message = f"it used more than the {self.spec.resources.memory_bytes / 2**20:.0f} MiB of memory it asked for"
        elif self._end == "disk_full":
            status.reason = self._end
            status.message = f"{self._why}; its outputs are not stored, except for checkpoints that were copied before"
        elif self._end in (PEER, *ASKED):
            status.reason = self._end
            status.message = self._why or _WORDS[self._end].format(self.spec.max_run_duration_seconds)
        elif self._end == "limit":
            status.reason, status.message = "signal", self._why
        elif outcome.out_of_memory:
            limit = self.spec.resources.memory_bytes
            what = f"it needed more than its {limit / 2**20:.0f} MiB" if limit else "the node ran out of memory"
            status.reason, status.message = "out_of_memory", f"the kernel killed it because {what}"
        elif outcome.signal is not None:
            name = signal.Signals(outcome.signal).name if outcome.signal in set(signal.Signals) else str(outcome.signal)
            status.reason, status.message = "signal", f"it was ended by {name}"
        elif outcome.exit_code is not None:
            status.reason = "exited"
            status.message = "" if outcome.exit_code == 0 else outcome.problem or f"it ended with exit code {outcome.exit_code}"
        else:
            status.reason, status.message = "launch_failed", outcome.problem or "its supervisor was killed"
        if self._ranks is not None:
            self._blame(status, self._ranks)
        if status.reason in ("exited", "signal") and not outcome.problem:
            code, number = (getattr(status, name) if status.HasField(name) else None for name in ("exit_code", "signal"))
            if lacked_shared_memory(code, number, status.last_lines or self._tail):
                status.message += (
                    f"; it seems to have found no room for shared memory: {self._node.runtime.shared_memory(self.spec.resources)}"
                )
        if (
            status.reason in ("exited", "signal", "launch_failed")
            and (status.exit_code or status.signal)
            and (fault := self._node.disk_fault())
        ):
            status.message = f"{status.message or status.reason}, and {fault}"
        return status

    def _blame(self, status: c.ExitStatus, ranks: Ranks) -> None:
        """How each rank ended, and of a failure: whose it was."""
        status.ranks.extend(ranks.exits(self._share.node))
        first = ranks.first_failure()
        failed = status.reason == "signal" or (status.reason == "exited" and status.exit_code != 0)
        mpi_daemon = self.spec.launcher == c.LAUNCHER_MPI and self.index
        if first is not None and (failed or mpi_daemon):
            status.ClearField("exit_code")
            status.ClearField("signal")
            status.reason = "exited" if first.exit_code is not None else "signal"
            if first.exit_code is not None:
                status.exit_code = first.exit_code
            if first.signal is not None:
                status.signal = first.signal
            status.rank, status.node = first.number, self._share.node
            where = f" on node {self._share.node}" if self._count > 1 else ""
            again = f", after {first.restarts} restarts" if first.restarts else ""
            status.message = f"rank {first.number}{where} {first.words()}{again}"
            status.last_lines[:] = first.tail
        elif self.spec.launcher == c.LAUNCHER_MPI and not self.index and status.exit_code == launch.NOT_FOUND and not ranks.ranks:
            status.reason, status.message = "launch_failed", launch.NO_MPIRUN
        elif not failed and ranks.ranks:
            status.last_lines[:] = ranks.ranks[min(ranks.ranks)].tail


def _not_stored(failure: BaseException) -> str:
    return printable(f"its outputs could not be stored: {failure or type(failure).__name__}")


async def _ended(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks, and return when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
