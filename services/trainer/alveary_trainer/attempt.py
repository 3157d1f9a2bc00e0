"""One attempt of a run on this node: stage, launch, supervise, store, report.

Of a run on several nodes each has an `Attempt`, its share of the placement; the first one leads and writes the events.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import path_problem, token
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.eventlog import Conflict
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import Host, Limits, Outcome, Place, Say, Staged, StagingFailed, Tree, Usage, View, opened
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.checkpoints import Checkpoints, fetch
from alveary_trainer.context_server import Ask, ContextServer
from alveary_trainer.crew import Leader, Member, subject
from alveary_trainer.gang import ASKED, ENDED, LISTED, PEER, READY, RUNNING, STORED, File, Gang, name_files
from alveary_trainer.node import NodeContext
from alveary_trainer.ranks import Rank, Ranks
from alveary_trainer.shipper import FolderTail, Lines, Shipper, log_chunk, metric_batch, pump

T = TypeVar("T")
# What is said of an end that was asked for.
_WORDS = {
    "canceled": "canceled",
    "preempted": "a run that comes first needs its place",
    "timeout": "it ran longer than max_run_duration_seconds = {:g}",
    PEER: "another node of the run failed",
}
_STORING = (AlvearyError, DigestMismatch, OSError)
# Instead of names: the leader could not decide them.
_NO_NAMES = "none"
_ALONE = Host("localhost", "", 0)
# How long what was taken back on this node may take to be gone, seconds; it was killed.
_GONE = 30.0


class Fenced(Exception):
    """The attempt's place was taken from it: it says and stores nothing more."""


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
        self._logs = Shipper(node.log.js, f"alveary-logs.{token(key.workspace)}.{token(key.id)}", log_chunk)
        self._metrics = Shipper(node.log.js, f"alveary-metrics.{token(key.workspace)}.{token(key.id)}", metric_batch(self.number))
        self._reports: asyncio.Queue[Message | None] = asyncio.Queue()
        self._uploaded: dict[str, c.FileEntry] = {}
        self._held = AsyncExitStack()
        self._resume = self._code / ".alveary-resume"
        self._ranks: Ranks | None = None
        folder = self._code / "outputs/checkpoints"
        self._checkpoints = Checkpoints(node.store, self.run_id, self.number, folder, node.settings.checkpoints_kept, index)
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
        """Ask for the end, once; "fenced" overrules everything."""
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
        """All of it; returns when nothing is left of it on this node."""
        reporter = asyncio.create_task(self._report())
        self._say("accepted", ev.AttemptAccepted(node=self._share.node, incarnation=self._node.incarnation))
        try:
            await self._crew.start()
            try:
                status = await self._stage_and_run()
            except (StagingFailed, DigestMismatch, AlvearyError) as error:
                status = c.ExitStatus(reason="staging_failed", message=str(error))
            if self._end != "fenced":
                await self._conclude(status)
                self._reports.put_nowait(None)
                await self._unfenced(reporter)
        except Fenced:
            telemetry.logger().info("attempt.fenced", run=self.run_id, attempt=self.number, share=self.index)
        finally:
            reporter.cancel()
            if self._tree:
                self._tree.kill()
            await self._crew.close()
            await self._logs.close()
            await self._metrics.close()
            await self._held.aclose()
            await asyncio.to_thread(remove_tree, self._root)

    async def _conclude(self, status: c.ExitStatus) -> None:
        """From the end of this node's processes to the report on the whole attempt."""
        self.phase = "finalizing"
        crew = self._crew
        if self._end == "disk_full":  # nothing of it is stored, and others need the space now
            await asyncio.to_thread(remove_tree, self._root)
        # A failure before there were ranks: what the program said, if anything.
        if not status.last_lines:
            status.last_lines[:] = self._tail
        first = self._ranks.first_failure() if self._ranks is not None else None
        crew.tell(
            phase=ENDED, exit=status, failed_at=first.ended_at if first else 0.0,
            ranks=sorted(self._ranks.ranks) if self._ranks is not None else [],
        )  # fmt: skip
        if isinstance(crew, Leader):
            await self._unfenced(crew.all_at(ENDED, self._note))
            self._say("finalizing", ev.AttemptFinalizing(exit=crew.gang.verdict()))
        error, listing = "", ""
        if self._count > 1:
            try:
                listing = await self._unfenced(self._list_files())
            except _STORING as failure:
                error = f"its outputs could not be stored: {failure}"
        crew.tell(phase=LISTED, listing=listing, error=error)
        if isinstance(crew, Leader):
            await self._unfenced(crew.all_at(LISTED, self._note))
            try:
                crew.gang.names = await self._unfenced(self._name_files(crew.gang))
            except _STORING as failure:
                error, crew.gang.names = f"its outputs could not be stored: {failure}", _NO_NAMES
            crew.decide()
        order = await self._unfenced(crew.until(STORED))
        files: dict[str, c.FileEntry] = {}
        if order.names != _NO_NAMES:
            try:
                files = await self._unfenced(self._store(await self._names(order)))
            except _STORING as failure:
                error = f"its outputs could not be stored: {failure}"
        await self._unfenced(self._logs.flush())
        await self._unfenced(self._metrics.flush())
        crew.tell(phase=STORED, error=error)
        if isinstance(crew, Member):
            await self._unfenced(crew.heard())
            return
        await self._unfenced(crew.all_at(STORED, self._note))
        manifest_digest, manifest = "", c.Manifest()
        status = crew.gang.verdict()
        if status.reason != "upload_failed":
            try:
                manifest_digest, manifest = await self._unfenced(self._make_whole(crew.gang, files))
            except _STORING as failure:
                status = c.ExitStatus(reason="upload_failed", message=f"its outputs could not be stored: {failure}")
        self._say(
            "finished",
            ev.AttemptFinished(
                exit=status, manifest_digest=manifest_digest, output_files=len(manifest.files),
                output_bytes=sum(f.size for f in manifest.files),
            ),
        )  # fmt: skip

    # ---- reports --------------------------------------------------------------------------------------------------

    def _say(self, phase: str, event: Message) -> None:
        if self.index:  # the first share speaks for all
            return
        telemetry.logger().info("attempt", run=self.run_id, attempt=self.number, phase=phase)
        self._reports.put_nowait(event)

    async def _report(self) -> None:
        """Append events in order without holding up the work; ends after None."""
        while (event := await self._reports.get()) is not None:
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
                except AlvearyError as error:
                    telemetry.logger().warning("attempt.report", run=self.run_id, error=str(error))
                    await asyncio.sleep(0.5)

    def _note(self, text: str) -> None:
        where = f"{self._share.node}: " if self._count > 1 else ""
        line = logs_pb2.LogLine(stream="system", attempt=self.number, data=f"{where}{text}".encode())
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
                async with node.snapshots.use(self.spec.snapshot) as source:
                    await asyncio.to_thread(shutil.copytree, source, self._code, dirs_exist_ok=True, symlinks=True)

        async def dataset(item: c.InputDataset) -> None:
            cache = node.models if item.model else node.datasets
            inputs[item.name] = await self._held.enter_async_context(cache.use(item.manifest_digest))

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
        if spec.command and own[0] == spec.command[0]:
            own[0] = runtime.command(own[0], staged)
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
        (self._root / "tmp").mkdir()
        sockets = self._node.sockets_dir / self.name
        sockets.mkdir(mode=0o700)
        place = self._place = Place(self.name, self._root, sockets / "run.sock", self._node.runtime_dir, inputs)
        server = ContextServer(place.socket, self.run_id, self._metrics, self._asks(place))
        await server.start()
        tasks: list[asyncio.Task[None]] = []
        mpi = self.spec.launcher == c.LAUNCHER_MPI and isinstance(self._crew, Leader)
        ranks = Ranks(sockets, self._logs, self.number, self._launch_there if mpi else None)
        self._ranks = ranks if launch.has_ranks(self.spec) or self._count > 1 else None
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
            launcher = "launcher-" if launch.has_ranks(self.spec) else ""
            first = self.index * launch.ranks_per_node(self.spec)
            pumps = [
                asyncio.create_task(pump(fd, Lines(self._logs, f"{launcher}{name}", first, self.number, self._tail), self._logs))
                for fd, name in ((tree.stdout, "stdout"), (tree.stderr, "stderr"))
            ]
            folder = FolderTail(self._code / "logs", self._logs, self.number, runtime.readable_below(place), first)
            work = (folder.run(), self._measure(), self._enforce(tree), self._limit(), self._started(), self._keep(place))
            tasks = [asyncio.create_task(w) for w in work]
            outcome = await tree.wait()
            ended_at = time.time()
            await asyncio.gather(*pumps)
            await ranks.finish()
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            await folder.finish()
            await server.finish()
            tasks[-1].cancel()
            await asyncio.gather(tasks[-1], return_exceptions=True)
            await self._sync(place, last=True)
            if self._count > 1 and not launch.has_ranks(self.spec):
                stopped = self._end in (PEER, *ASKED)
                ranks.ranks[self.index] = Rank(self.index, 0, self._tail, outcome.exit_code, outcome.signal, stopped, ended_at)
            return self._status(outcome)
        finally:
            for task in tasks:
                task.cancel()
            await server.finish(0.1)
            await ranks.finish(0.1)
            shutil.rmtree(sockets, ignore_errors=True)

    async def _started(self) -> None:
        """Say that it runs once it does on every node."""
        if isinstance(self._crew, Leader):
            if not self._crew.gang.all_at(RUNNING):
                await self._crew.all_at(RUNNING, self._note)
            self._say("started", ev.AttemptStarted(process_count=self._count * launch.ranks_per_node(self.spec)))

    async def _enforce(self, tree: Tree) -> None:
        """When the end is asked for: SIGTERM, the grace, SIGKILL."""
        await self._ending.wait()
        if self._end in (PEER, *ASKED):
            self._note(f"{self._why or self._end}: SIGTERM, then SIGKILL after {self.spec.grace_seconds:g} s")
            tree.terminate()
            await asyncio.sleep(self.spec.grace_seconds)
        while True:  # until wait() sees the end and cancels this
            tree.kill()
            await asyncio.sleep(0.2)

    async def _keep(self, place: Place) -> None:
        """Copy checkpoints away, once a second."""
        while True:
            await asyncio.sleep(1.0)
            await self._sync(place)

    async def _sync(self, place: Place, *, last: bool = False) -> None:
        if self._end in ("fenced", "disk_full"):
            return
        try:
            if await self._checkpoints.sync(self._node.runtime.readable_below(place), last=last):
                self.saved_at = time.monotonic()
        except (AlvearyError, OSError) as error:
            # The run goes on; the next second tries again, and the end stores all outputs or fails.
            self._note(f"its checkpoints could not be copied: {error}")

    async def _limit(self) -> None:
        if self.spec.max_run_duration_seconds and self.index == 0:
            await asyncio.sleep(self.spec.max_run_duration_seconds)
            self.end("timeout")

    async def _measure(self) -> None:
        limit = self.spec.resources.memory_bytes
        while self._tree is not None:
            self.usage = await asyncio.to_thread(self._tree.usage)
            if limit and self.usage.memory_bytes > limit:
                self._note(f"out of memory: {self.usage.memory_bytes / 2**20:.0f} MiB are more than the {limit / 2**20:.0f} asked for")
                self.end("out_of_memory")
            await asyncio.sleep(0.25 if limit else 1.0)

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
        elif outcome.signal == signal.SIGKILL and outcome.out_of_memory:
            limit = self.spec.resources.memory_bytes
            what = f"it needed more than its {limit / 2**20:.0f} MiB" if limit else "the node ran out of memory"
            status.reason, status.message = "out_of_memory", f"the kernel killed it because {what}"
        elif outcome.signal is not None:
            name = signal.Signals(outcome.signal).name if outcome.signal in set(signal.Signals) else str(outcome.signal)
            status.reason, status.message = "signal", f"it was ended by {name}"
        elif outcome.exit_code is not None:
            status.reason = "exited"
            status.message = "" if outcome.exit_code == 0 else f"it ended with exit code {outcome.exit_code}"
        else:
            status.reason, status.message = "launch_failed", "its supervisor was killed"
        if self._ranks is not None:
            self._blame(status, self._ranks)
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

    # ---- storing --------------------------------------------------------------------------------------------------

    async def _put(self, path: Path, name: str, final: str = "") -> c.FileEntry:
        """Store a file under its final name; where that is not known yet, any share but the first has a place of its own."""
        below = self._node.runtime.readable_below(self._place) if self._place else self._root
        with opened(path, below) as readable:
            entry = await self._node.store.put_file("runs", self._object(final) if final else self._aside(name), readable)
        entry.path = name
        self._uploaded[name] = entry
        return entry

    def _object(self, name: str) -> str:
        return f"{self.run_id}/{self.number}/{name}"

    def _aside(self, name: str) -> str:
        return self._object(f".gang/{self.index}/{name}" if self.index else name)

    def _stored_files(self) -> list[Path]:
        """Files of ./outputs and ./logs; what leads outside the run's folders is left out, and said."""
        found = []
        below = self._node.runtime.readable_below(self._place) if self._place else self._root
        for top in ("outputs", "logs"):
            for root, _, names in os.walk(self._code / top):
                for path in (Path(root, n) for n in names):
                    try:
                        with opened(path, below):
                            found.append(path)
                    except (ValueError, OSError) as error:
                        self._note(f"not stored: {path.relative_to(self._code)}: {error}")
        return found

    async def _store(self, names: dict[str, str] | None) -> dict[str, c.FileEntry]:
        """./outputs and ./logs, under the names that were decided (None: their own); returns what is stored, by its own path."""
        code, store = self._code, self._node.store
        files = await asyncio.to_thread(self._stored_files)
        if names is not None:
            files = [f for f in files if names.get(f.relative_to(code).as_posix())]
        total = sum(f.stat().st_size for f in files)
        if files:
            self._note(f"storing {len(files)} files, {total / 1e6:.1f} MB")
        done, said = 0, time.monotonic()
        slots = asyncio.Semaphore(32)
        before = dict(self._uploaded)
        stored: dict[str, c.FileEntry] = {}

        async def one(path: Path) -> None:
            nonlocal done, said
            async with slots:
                own = path.relative_to(code).as_posix()
                stored[own] = entry = await self._put(path, own, names[own] if names is not None else own)
            done += entry.size
            if time.monotonic() - said > 2:
                said = time.monotonic()
                self._note(f"stored {done / 1e6:.1f} of {total / 1e6:.1f} MB")

        try:
            async with asyncio.TaskGroup() as group:
                for path in files:
                    group.create_task(one(path))
        except ExceptionGroup as error:
            raise error.exceptions[0] from error
        # What the script stored itself, under names that are no files of ./outputs and ./logs.
        if names is not None:
            for own in before.keys() - stored.keys():
                if names.get(own) and self._object(names[own]) != self._aside(own):
                    await store.copy("runs", self._object(names[own]), "runs", self._aside(own))
        return before | stored

    async def _list_files(self) -> str:
        """Say in the object store which files this share has; returns the digest of what it said."""
        code = self._code

        def look() -> list[File]:
            below = self._node.runtime.readable_below(self._place) if self._place else self._root
            found = {n: File(n, e.size, e.sha256, e.executable) for n, e in self._uploaded.items()}
            for path in self._stored_files():
                own = path.relative_to(code).as_posix()
                with opened(path, below) as readable, readable.open("rb") as content:
                    info = os.fstat(content.fileno())
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                    found[own] = File(own, info.st_size, digest, bool(info.st_mode & 0o100))
            return [f for _, f in sorted(found.items())]

        return await self._say_aside(f"{self.index}.json", [asdict(f) for f in await asyncio.to_thread(look)])

    async def _say_aside(self, name: str, what: object) -> str:
        data = json.dumps(what).encode()
        await self._node.store.put("runs", self._object(f".gang/{name}"), data)
        return hashlib.sha256(data).hexdigest()

    async def _read_aside(self, name: str, digest: str) -> Any:
        data = await self._node.store.get("runs", self._object(f".gang/{name}"))
        if hashlib.sha256(data).hexdigest() != digest:
            raise DigestMismatch(f"runs/{self.run_id}/{self.number}/.gang/{name} is not what was written there")
        return json.loads(data)

    async def _listings(self, gang: Gang) -> dict[int, list[File]]:
        found = {}
        for index, report in sorted(gang.reports.items()):
            found[index] = [File(**f) for f in await self._read_aside(f"{index}.json", report.listing)] if report.listing else []
        return found

    async def _name_files(self, gang: Gang) -> str:
        """Decide under which names all shares store their files: the one with rank 0 keeps its own."""
        if self._count == 1:
            return "own"
        order = sorted(gang.reports, key=lambda i: (min(gang.reports[i].ranks, default=10**9), i))
        names = name_files(await self._listings(gang), order)
        return await self._say_aside("names.json", names)

    async def _names(self, order: pb.GangOrder) -> dict[str, str] | None:
        if self._count == 1:
            return None
        found: dict[str, str] = (await self._read_aside("names.json", order.names))[str(self.index)]
        return found

    async def _make_whole(self, gang: Gang, mine: dict[str, c.FileEntry]) -> tuple[str, c.Manifest]:
        """The manifest that makes what all shares stored the run's; returns its digest."""
        entries: dict[str, c.FileEntry] = {}
        if self._count == 1:
            entries = mine
        else:
            names = await self._names(self._crew.order)
            assert names is not None
            every: dict[str, dict[str, str]] = await self._read_aside("names.json", self._crew.order.names)
            for index, files in (await self._listings(gang)).items():
                for file in files:
                    if name := every[str(index)].get(file.path):
                        entries[name] = c.FileEntry(path=name, size=file.size, sha256=file.sha256, executable=file.executable)
        manifest = c.Manifest(files=sorted(entries.values(), key=lambda f: f.path))
        data = manifest_json(manifest)
        await self._node.store.put("runs", self._object("manifest.json"), data)
        if self._count > 1:
            await self._node.store.delete("runs", await self._node.store.keys("runs", self._object(".gang/")))
        return hashlib.sha256(data).hexdigest(), manifest

    # ---- what the script may ask ----------------------------------------------------------------------------------

    def _asks(self, place: Place) -> dict[str, Ask]:
        runtime = self._node.runtime

        async def upload(message: dict[str, Any]) -> Any:
            name = str(message["name"])
            if problem := path_problem(name):
                raise ValueError(problem)
            entry = await self._put(runtime.host_path(place, str(message["path"])), name)
            return {"path": entry.path, "size": entry.size, "sha256": entry.sha256}

        async def tag(message: dict[str, Any]) -> Any:
            await self._node.tag(self.run_id, message)
            return True

        async def register(message: dict[str, Any]) -> Any:
            path = (self._code / str(message["path"])).resolve()
            if not path.is_relative_to(self._code.resolve()) or not path.exists():
                raise ValueError(f"model_path {message['path']!r} is no file or folder of this run's working directory")
            return await self._node.register(self.run_id, path, message, runtime.readable_below(place))

        async def info(_: dict[str, Any]) -> Any:
            return {"run_id": self.run_id, "attempt": self.number, "tags": dict(self.spec.tags), "properties": dict(self.spec.properties)}

        return {"upload": upload, "tag": tag, "register": register, "info": info}
