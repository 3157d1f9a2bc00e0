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
from alveary_trainer.adapters.environments import StagingFailed
from alveary_trainer.adapters.process import Outcome, ProcessTree, Usage, oom_kills
from alveary_trainer.context_server import ContextServer
from alveary_trainer.node import NodeContext
from alveary_trainer.shipper import FolderTail, Lines, Shipper, log_chunk, metric_batch, pump

# What a training process inherits of the trainer's environment; everything else is the run's own.
_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "LD_LIBRARY_PATH")  # fmt: skip
_SOCKET_PATH = 100  # sun_path has 108 bytes


class Attempt:
    """An attempt from placement to report."""

    def __init__(self, node: NodeContext, key: Key, placement: ev.PlacementMade) -> None:
        self._node, self.run_id, self.workspace = node, key.id, key.workspace
        self._placement, self.spec, self.number = placement, placement.spec, placement.attempt
        self.phase = "staging"
        self.usage = Usage()
        self._key = Key(key.workspace, "attempt", f"{key.id}-{self.number}")
        self._sequence = 0
        self._work = node.runs_dir / f"{key.id}-{self.number}"
        self._tree: ProcessTree | None = None
        # Why it must end before its time: "canceled", "timeout", "out_of_memory", or "fenced" (then it says nothing).
        self._end: str = ""
        self._ending = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=20)
        self._logs = Shipper(node.log.js, f"alveary-logs.{token(key.workspace)}.{token(key.id)}", log_chunk)
        self._metrics = Shipper(node.log.js, f"alveary-metrics.{token(key.workspace)}.{token(key.id)}", metric_batch)
        self._reports: asyncio.Queue[Message | None] = asyncio.Queue()
        self._uploaded: dict[str, c.FileEntry] = {}
        self._held = AsyncExitStack()

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
            await asyncio.to_thread(shutil.rmtree, self._work, ignore_errors=True)

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

        code = self._work / "work"
        code.mkdir(parents=True)
        inputs: dict[str, str] = {}
        staging = asyncio.create_task(self._stage(code, inputs, say))
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({staging, ending}, return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if not staging.done():
            staging.cancel()
            await asyncio.gather(staging, return_exceptions=True)
            return self._status(Outcome(), 0)
        return await self._supervise(code, staging.result(), inputs)

    async def _stage(self, code: Path, inputs: dict[str, str], say: Any) -> Path:
        """Everything that the run needs, held on this node until the attempt is over."""
        env, node = self.spec.environment, self._node

        async def environment() -> Path:
            return await self._held.enter_async_context(
                node.environments.use(self._placement.image_digest, env.interpreter, env.user_managed, say)
            )

        async def snapshot() -> None:
            if self.spec.snapshot:
                async with node.snapshots.use(self.spec.snapshot) as source:
                    await asyncio.to_thread(shutil.copytree, source, code, dirs_exist_ok=True, symlinks=True)

        async def dataset(item: c.InputDataset) -> None:
            cache = node.models if item.model else node.datasets
            inputs[item.name] = str(await self._held.enter_async_context(cache.use(item.manifest_digest)))

        try:
            async with asyncio.TaskGroup() as group:
                python = group.create_task(environment())
                group.create_task(snapshot())
                for item in self.spec.inputs:
                    group.create_task(dataset(item))
        except ExceptionGroup as error:
            raise error.exceptions[0] from error
        (code / "outputs").mkdir(exist_ok=True)
        (code / "logs").mkdir(exist_ok=True)
        return python.result()

    def _argv(self, python: Path, inputs: dict[str, str]) -> list[str]:
        spec = self.spec
        arguments = list(spec.arguments)
        for name, folder in inputs.items():
            arguments = [a.replace(f"{{inputs.{name}}}", folder) for a in arguments]
        if spec.command:
            first, *rest = spec.command
            if first in ("python", "python3"):
                return [str(python), "-u", *rest, *arguments]
            found = shutil.which(first, path=f"{python.parent}:{os.environ.get('PATH', '')}")
            if found is None:
                raise StagingFailed(f"command {first!r} is neither in the environment nor on this node")
            return [found, *rest, *arguments]
        program = ["-m", spec.module] if spec.module else [spec.entry_script]
        if spec.launcher == c.LAUNCHER_TORCHRUN:
            run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec.process_count_per_node}"]
            return [str(python), "-u", *run, *(["--module", spec.module] if spec.module else program), *arguments]
        return [str(python), "-u", *program, *arguments]

    def _environment(self, code: Path, python: Path, inputs: dict[str, str], socket: Path) -> dict[str, str]:
        env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        env.update(self.spec.environment.environment_variables)
        env["PATH"] = f"{python.parent}:{env.get('PATH', '/usr/bin:/bin')}"
        # The module that talks to the trainer is in every environment: standard library alone, first on the path.
        paths = [str(self._node.runtime_dir), *filter(None, [env.get("PYTHONPATH")])]
        env |= {
            "PYTHONPATH": ":".join(paths), "PYTHONUNBUFFERED": "1", "TMPDIR": str(self._work / "tmp"),
            "ALVEARY_RUN_ID": self.run_id, "ALVEARY_ATTEMPT": str(self.number), "ALVEARY_SOCKET": str(socket),
            "ALVEARY_EXPERIMENT": self.spec.experiment, "ALVEARY_WORK_DIR": str(code),
        }  # fmt: skip
        env |= {f"ALVEARY_INPUT_{name.upper().replace('-', '_').replace('.', '_')}": path for name, path in inputs.items()}
        share = self._placement.nodes[0]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(self._node.settings.gpu_offset + i) for i in share.gpu_indexes)
        return env

    async def _supervise(self, code: Path, python: Path, inputs: dict[str, str]) -> c.ExitStatus:
        (self._work / "tmp").mkdir()
        socket_dir = self._work
        if len(str(self._work / "run.sock")) > _SOCKET_PATH:
            socket_dir = self._node.sockets_dir / f"{self.run_id}-{self.number}"
            socket_dir.mkdir(mode=0o700)
        server = ContextServer(socket_dir / "run.sock", self.run_id, self._metrics, self._asks(code))
        await server.start()
        before = oom_kills()
        tasks: list[asyncio.Task[None]] = []
        try:
            env = self._environment(code, python, inputs, socket_dir / "run.sock")
            tree = self._tree = ProcessTree.launch(self._argv(python, inputs), code, env)
            self.phase = "running"
            self._say("started", ev.AttemptStarted(process_count=self.spec.process_count_per_node))
            pumps = [
                asyncio.create_task(pump(fd, Lines(self._logs, name, 0, self.number, self._tail), self._logs))
                for fd, name in ((tree.stdout, "stdout"), (tree.stderr, "stderr"))
            ]
            folder = FolderTail(code / "logs", self._logs, self.number)
            tasks = [asyncio.create_task(w) for w in (folder.run(), self._measure(), self._enforce(tree), self._limit())]
            outcome = await tree.wait()
            await asyncio.gather(*pumps)
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            await folder.finish()
            await server.finish()
            return self._status(outcome, oom_kills() - before)
        finally:
            for task in tasks:
                task.cancel()
            await server.finish(0.1)
            if socket_dir != self._work:
                shutil.rmtree(socket_dir, ignore_errors=True)

    async def _enforce(self, tree: ProcessTree) -> None:
        """When the end is asked for: SIGTERM, the grace, SIGKILL."""
        await self._ending.wait()
        if self._end == "canceled" or self._end == "timeout":
            self._note(f"{self._end}: SIGTERM, then SIGKILL after {self.spec.grace_seconds:g} s")
            tree.terminate()
            await asyncio.sleep(self.spec.grace_seconds)
        while True:  # until wait() sees the end and cancels this
            tree.kill()
            await asyncio.sleep(0.2)

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

    def _status(self, outcome: Outcome, oom: int) -> c.ExitStatus:
        status = c.ExitStatus()
        if outcome.exit_code is not None:
            status.exit_code = outcome.exit_code
        if outcome.signal is not None:
            status.signal = outcome.signal
        if self._end in ("canceled", "timeout", "out_of_memory"):
            status.reason = self._end
            status.message = {
                "canceled": "canceled",
                "timeout": f"it ran longer than max_run_duration_seconds = {self.spec.max_run_duration_seconds:g}",
                "out_of_memory": f"it used more than the {self.spec.resources.memory_bytes / 2**20:.0f} MiB of memory it asked for",
            }[self._end]
        elif outcome.signal == signal.SIGKILL and oom > 0:
            status.reason, status.message = "out_of_memory", "the kernel killed it because the node ran out of memory"
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
        entry = await self._node.store.put_file("runs", f"{self.run_id}/{self.number}/{name}", path)
        entry.path = name
        self._uploaded[name] = entry
        return entry

    async def _store(self) -> tuple[str, c.Manifest]:
        """./outputs and ./logs, then the manifest that makes them whole; returns its digest."""
        code = self._work / "work"
        files = []
        for top in ("outputs", "logs"):
            for root, _, names in os.walk(code / top):
                files += [Path(root, n) for n in names if Path(root, n).is_file()]
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

    def _asks(self, code: Path) -> dict[str, Any]:
        async def upload(message: dict[str, Any]) -> Any:
            name = str(message["name"])
            if problem := path_problem(name):
                raise ValueError(problem)
            path = Path(str(message["path"]))
            if not path.is_file():
                raise ValueError(f"{path} is not a file")
            entry = await self._put(path, name)
            return {"path": entry.path, "size": entry.size, "sha256": entry.sha256}

        async def tag(message: dict[str, Any]) -> Any:
            await self._node.tag(self.run_id, message)
            return True

        async def register(message: dict[str, Any]) -> Any:
            path = (code / str(message["path"])).resolve()
            if not path.is_relative_to(code.resolve()) or not path.exists():
                raise ValueError(f"model_path {message['path']!r} is no file or folder of this run's working directory")
            return await self._node.register(self.run_id, path, message)

        async def info(_: dict[str, Any]) -> Any:
            return {"run_id": self.run_id, "attempt": self.number, "tags": dict(self.spec.tags), "properties": dict(self.spec.properties)}

        return {"upload": upload, "tag": tag, "register": register, "info": info}
