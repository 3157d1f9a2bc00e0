"""One attempt of a run on this node: stage, launch, supervise, store, report."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import time
from collections import deque
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import path_problem, token
from alveary_core import telemetry
from alveary_core.errors import AlvearyError
from alveary_core.eventlog import Conflict
from alveary_core.events import Key
from alveary_core.objectstore import DigestMismatch
from alveary_trainer.adapters.runtime import Limits, Outcome, Place, Say, Staged, StagingFailed, Tree, Usage, View, opened
from alveary_trainer.adapters.shared_cache import remove_tree
from alveary_trainer.checkpoints import Checkpoints, fetch
from alveary_trainer.context_server import Ask, ContextServer
from alveary_trainer.node import NodeContext
from alveary_trainer.shipper import FolderTail, Lines, Shipper, log_chunk, metric_batch, pump


class Attempt:
    """An attempt from placement to report."""

    def __init__(self, node: NodeContext, key: Key, placement: ev.PlacementMade) -> None:
        self._node, self.run_id, self.workspace = node, key.id, key.workspace
        self._placement, self.spec, self.number = placement, placement.spec, placement.attempt
        self.phase = "staging"
        self.usage = Usage()
        self._key = Key(key.workspace, "attempt", f"{key.id}-{self.number}")
        self._sequence = 0
        self._root = node.runs_dir / f"{key.id}-{self.number}"
        self._code = self._root / "work"
        self._place: Place | None = None
        self._tree: Tree | None = None
        # Why it must end before its time: "canceled", "timeout", "preempted", "out_of_memory", or "fenced" (then it says nothing).
        self._end: str = ""
        self._ending = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=20)
        self._logs = Shipper(node.log.js, f"alveary-logs.{token(key.workspace)}.{token(key.id)}", log_chunk)
        self._metrics = Shipper(node.log.js, f"alveary-metrics.{token(key.workspace)}.{token(key.id)}", metric_batch)
        self._reports: asyncio.Queue[Message | None] = asyncio.Queue()
        self._uploaded: dict[str, c.FileEntry] = {}
        self._held = AsyncExitStack()
        self._resume = self._code / ".alveary-resume"
        folder = self._code / "outputs/checkpoints"
        self._checkpoints = Checkpoints(node.store, self.run_id, self.number, folder, node.settings.checkpoints_kept)

    def end(self, why: str) -> None:
        """Ask for the end, once; "fenced" overrules everything."""
        if not self._end or why == "fenced":
            self._end = why
            self._ending.set()
            if why == "fenced" and self._tree:
                self._tree.kill()

    async def run(self) -> None:
        """All of it; returns when nothing is left of it on this node."""
        reporter = asyncio.create_task(self._report())
        self._say("accepted", ev.AttemptAccepted(node=self._placement.nodes[0].node, incarnation=self._node.incarnation))
        manifest_digest, files = "", c.Manifest()
        try:
            try:
                status = await self._stage_and_run()
            except (StagingFailed, DigestMismatch, AlvearyError) as error:
                status = c.ExitStatus(reason="staging_failed", message=str(error))
            if self._end != "fenced":
                self.phase = "finalizing"
                self._say("finalizing", ev.AttemptFinalizing(exit=status))
                try:
                    manifest_digest, files = await self._store()
                except (AlvearyError, OSError) as error:
                    status = c.ExitStatus(reason="upload_failed", message=f"its outputs could not be stored: {error}")
                await self._logs.flush()
                await self._metrics.flush()
                status.last_lines[:] = self._tail
                self._say(
                    "finished",
                    ev.AttemptFinished(
                        exit=status, manifest_digest=manifest_digest, output_files=len(files.files),
                        output_bytes=sum(f.size for f in files.files),
                    ),
                )  # fmt: skip
                self._reports.put_nowait(None)
                await reporter
        finally:
            reporter.cancel()
            if self._tree:
                self._tree.kill()
            await self._logs.close()
            await self._metrics.close()
            await self._held.aclose()
            await asyncio.to_thread(remove_tree, self._root)

    # ---- reports --------------------------------------------------------------------------------------------------

    def _say(self, phase: str, event: Message) -> None:
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
        line = logs_pb2.LogLine(stream="system", attempt=self.number, data=text.encode())
        line.time.GetCurrentTime()
        self._logs.add(line)

    # ---- staging and running --------------------------------------------------------------------------------------

    async def _stage_and_run(self) -> c.ExitStatus:
        async def say(text: str) -> None:
            self._note(text)

        self._code.mkdir(parents=True)
        inputs: dict[str, Path] = {}
        staging = asyncio.create_task(self._stage(inputs, say))
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({staging, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not staging.done():
            staging.cancel()
            await asyncio.gather(staging, return_exceptions=True)
            return self._status(Outcome())
        return await self._supervise(staging.result(), inputs)

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

    def _argv(self, staged: Staged, view: View) -> list[str]:
        spec, python = self.spec, staged.python
        arguments = list(spec.arguments)
        for name, folder in view.inputs.items():
            arguments = [a.replace(f"{{inputs.{name}}}", folder) for a in arguments]
        if spec.command:
            first, *rest = spec.command
            if first in ("python", "python3"):
                return [python, "-u", *rest, *arguments]
            return [self._node.runtime.command(first, staged), *rest, *arguments]
        program = ["-m", spec.module] if spec.module else [spec.entry_script]
        if spec.launcher == c.LAUNCHER_TORCHRUN:
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec.process_count_per_node}"]
            return [python, "-u", *run, *(["--module", spec.module] if spec.module else program), *arguments]
        return [python, "-u", *program, *arguments]

    def _environment(self, view: View) -> dict[str, str]:
        env = dict(view.inherited) | dict(self.spec.environment.environment_variables)
        if "PATH" in view.inherited:
            env["PATH"] = view.inherited["PATH"]
        # The module that talks to the trainer is in every environment: standard library alone, first on the path.
        env |= {
            "PYTHONPATH": ":".join(filter(None, [view.lib, env.get("PYTHONPATH")])), "PYTHONUNBUFFERED": "1", "TMPDIR": view.tmp,
            "ALVEARY_RUN_ID": self.run_id, "ALVEARY_ATTEMPT": str(self.number), "ALVEARY_SOCKET": view.socket,
            "ALVEARY_EXPERIMENT": self.spec.experiment, "ALVEARY_WORK_DIR": view.work,
        }  # fmt: skip
        if self._resume.is_dir():
            env["ALVEARY_RESUME_FROM"] = f"{view.work}/{self._resume.name}"
        return env | {f"ALVEARY_INPUT_{name.upper().replace('-', '_').replace('.', '_')}": path for name, path in view.inputs.items()}

    def _limits(self) -> Limits:
        share = self._placement.nodes[0]
        gpus = tuple(self._node.settings.gpu_offset + i for i in share.gpu_indexes)
        return Limits(self.spec.resources, gpus, self._placement.network or "bridge")

    async def _supervise(self, staged: Staged, inputs: dict[str, Path]) -> c.ExitStatus:
        runtime = self._node.runtime
        (self._root / "tmp").mkdir()
        sockets = self._node.sockets_dir / f"{self.run_id}-{self.number}"
        sockets.mkdir(mode=0o700)
        place = self._place = Place(f"{self.run_id}-{self.number}", self._root, sockets / "run.sock", self._node.runtime_dir, inputs)
        server = ContextServer(place.socket, self.run_id, self._metrics, self._asks(place))
        await server.start()
        tasks: list[asyncio.Task[None]] = []
        try:
            view = runtime.view(place, staged)
            tree = self._tree = await runtime.launch(place, staged, self._argv(staged, view), self._environment(view), self._limits())
            self.phase = "running"
            self._say("started", ev.AttemptStarted(process_count=self.spec.process_count_per_node))
            pumps = [
                asyncio.create_task(pump(fd, Lines(self._logs, name, 0, self.number, self._tail), self._logs))
                for fd, name in ((tree.stdout, "stdout"), (tree.stderr, "stderr"))
            ]
            folder = FolderTail(self._code / "logs", self._logs, self.number, runtime.readable_below(place))
            tasks = [asyncio.create_task(w) for w in (folder.run(), self._measure(), self._enforce(tree), self._limit(), self._keep(place))]
            outcome = await tree.wait()
            await asyncio.gather(*pumps)
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            await folder.finish()
            await server.finish()
            tasks[-1].cancel()
            await asyncio.gather(tasks[-1], return_exceptions=True)
            await self._sync(place, last=True)
            return self._status(outcome)
        finally:
            for task in tasks:
                task.cancel()
            await server.finish(0.1)
            shutil.rmtree(sockets, ignore_errors=True)

    async def _enforce(self, tree: Tree) -> None:
        """When the end is asked for: SIGTERM, the grace, SIGKILL."""
        await self._ending.wait()
        if self._end in ("canceled", "timeout", "preempted"):
            self._note(f"{self._end}: SIGTERM, then SIGKILL after {self.spec.grace_seconds:g} s")
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
        if self._end == "fenced":
            return
        try:
            await self._checkpoints.sync(self._node.runtime.readable_below(place), last=last)
        except (AlvearyError, OSError) as error:
            # The run goes on; the next second tries again, and the end stores all outputs or fails.
            self._note(f"its checkpoints could not be copied: {error}")

    async def _limit(self) -> None:
        if self.spec.max_run_duration_seconds:
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
        if self._end in ("canceled", "timeout", "preempted", "out_of_memory"):
            status.reason = self._end
            status.message = {
                "canceled": "canceled",
                "preempted": "a run that comes first needs its place",
                "timeout": f"it ran longer than max_run_duration_seconds = {self.spec.max_run_duration_seconds:g}",
                "out_of_memory": f"it used more than the {self.spec.resources.memory_bytes / 2**20:.0f} MiB of memory it asked for",
            }[self._end]
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
        return status

    # ---- storing --------------------------------------------------------------------------------------------------

    async def _put(self, path: Path, name: str) -> c.FileEntry:
        below = self._node.runtime.readable_below(self._place) if self._place else self._root
        with opened(path, below) as readable:
            entry = await self._node.store.put_file("runs", f"{self.run_id}/{self.number}/{name}", readable)
        entry.path = name
        self._uploaded[name] = entry
        return entry

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

    async def _store(self) -> tuple[str, c.Manifest]:
        """./outputs and ./logs, then the manifest that makes them whole; returns its digest."""
        code = self._code
        files = await asyncio.to_thread(self._stored_files)
        total = sum(f.stat().st_size for f in files)
        if files:
            self._note(f"storing {len(files)} files, {total / 1e6:.1f} MB")
        done, said = 0, time.monotonic()
        slots = asyncio.Semaphore(8)

        async def one(path: Path) -> None:
            nonlocal done, said
            async with slots:
                entry = await self._put(path, path.relative_to(code).as_posix())
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
        manifest = c.Manifest(files=sorted(self._uploaded.values(), key=lambda f: f.path))
        data = manifest_json(manifest)
        if self._end == "fenced":
            return "", c.Manifest()
        await self._node.store.put("runs", f"{self.run_id}/{self.number}/manifest.json", data)
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
