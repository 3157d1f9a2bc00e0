"""The asynchronous client; the synchronous classes are a thin facade over it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from alveary._lazy import LazyModule
from alveary.config import Config
from alveary.errors import AlvearyError, NoPlatform
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import is_id, new_id
from alveary_contracts.proxies import DIRECT
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc

# What not every call needs is imported by the call that does: a list of runs is to cost no more than a list of runs.
if TYPE_CHECKING:
    from alveary import source as sources
    from alveary import transfer as transfers
    from alveary_contracts.events.v1 import events_pb2 as ev
    from alveary_contracts.images.v1 import images_pb2_grpc
    from alveary_contracts.logs.v1 import logs_pb2, logs_pb2_grpc
    from alveary_contracts.registry.v1 import registry_pb2 as reg
    from alveary_contracts.registry.v1 import registry_pb2_grpc
    from alveary_contracts.scheduler.v1 import scheduler_pb2_grpc
else:
    sources, transfers = LazyModule("alveary.source"), LazyModule("alveary.transfer")
    images_pb2_grpc = LazyModule("alveary_contracts.images.v1.images_pb2_grpc")
    logs_pb2, logs_pb2_grpc = (LazyModule(f"alveary_contracts.logs.v1.logs_{kind}") for kind in ("pb2", "pb2_grpc"))
    reg, registry_pb2_grpc = (LazyModule(f"alveary_contracts.registry.v1.registry_{kind}") for kind in ("pb2", "pb2_grpc"))
    scheduler_pb2_grpc = LazyModule("alveary_contracts.scheduler.v1.scheduler_pb2_grpc")

FINAL = (c.RUN_STATE_COMPLETED, c.RUN_STATE_FAILED, c.RUN_STATE_CANCELED)
TIMEOUT = 60.0
# Of a registration of very many files.
_LONG = 300.0
_TRIES = 8


def state_name(state: int) -> str:
    """ "NotStarted" of RUN_STATE_NOT_STARTED."""
    return "".join(w.capitalize() for w in c.RunState.Name(state).removeprefix("RUN_STATE_").split("_"))  # type: ignore[arg-type]


def run_details(run: pb.Run) -> dict[str, Any]:
    """A run as plain data."""
    from google.protobuf.json_format import MessageToDict

    plain: dict[str, Any] = MessageToDict(run, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    plain["status"] = state_name(run.state)
    plain["runId"] = run.id
    plain.setdefault("exit", {})
    return plain


class Client:
    """Talks to a platform. Make it inside a running loop; `await close()` it.

    Every call has a deadline; calls that may be repeated are, with backoff, while the platform is unavailable.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        options = [
            ("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20),
            ("grpc.keepalive_time_ms", 20000), ("grpc.keepalive_timeout_ms", 10000), ("grpc.max_reconnect_backoff_ms", 2000),
            *DIRECT,
        ]  # fmt: skip
        endpoints = {config.endpoint, *config.endpoints.values()}
        if config.tls:
            trusted = grpc.ssl_channel_credentials(config.ca.encode() or None)
            channels = {e: grpc.aio.secure_channel(e, trusted, options=options) for e in endpoints}
        else:
            channels = {e: grpc.aio.insecure_channel(e, options=options) for e in endpoints}
        self._channels = channels
        self.metadata = (("authorization", f"Bearer {config.token}"),)

    def _at(self, service: str) -> grpc.aio.Channel:
        return self._channels[self.config.endpoints.get(service, self.config.endpoint)]

    @cached_property
    def runs(self) -> runs_pb2_grpc.RunServiceAsyncStub:
        return runs_pb2_grpc.RunServiceStub(self._at("runs"))

    @cached_property
    def experiments(self) -> runs_pb2_grpc.ExperimentServiceAsyncStub:
        return runs_pb2_grpc.ExperimentServiceStub(self._at("runs"))

    @cached_property
    def workspaces(self) -> runs_pb2_grpc.WorkspaceServiceAsyncStub:
        return runs_pb2_grpc.WorkspaceServiceStub(self._at("runs"))

    @cached_property
    def events(self) -> runs_pb2_grpc.EventServiceAsyncStub:
        return runs_pb2_grpc.EventServiceStub(self._at("runs"))

    @cached_property
    def letters(self) -> runs_pb2_grpc.DeadLetterServiceAsyncStub:
        return runs_pb2_grpc.DeadLetterServiceStub(self._at("runs"))

    @cached_property
    def images(self) -> images_pb2_grpc.ImageServiceAsyncStub:
        return images_pb2_grpc.ImageServiceStub(self._at("images"))

    @cached_property
    def compute(self) -> scheduler_pb2_grpc.ComputeServiceAsyncStub:
        return scheduler_pb2_grpc.ComputeServiceStub(self._at("scheduler"))

    @cached_property
    def nodes(self) -> scheduler_pb2_grpc.NodeServiceAsyncStub:
        return scheduler_pb2_grpc.NodeServiceStub(self._at("scheduler"))

    @cached_property
    def queue(self) -> scheduler_pb2_grpc.QueueServiceAsyncStub:
        return scheduler_pb2_grpc.QueueServiceStub(self._at("scheduler"))

    @cached_property
    def logs(self) -> logs_pb2_grpc.LogServiceAsyncStub:
        return logs_pb2_grpc.LogServiceStub(self._at("logs"))

    @cached_property
    def models(self) -> registry_pb2_grpc.ModelServiceAsyncStub:
        return registry_pb2_grpc.ModelServiceStub(self._at("registry"))

    @cached_property
    def datasets(self) -> registry_pb2_grpc.DatasetServiceAsyncStub:
        return registry_pb2_grpc.DatasetServiceStub(self._at("registry"))

    @cached_property
    def _transfers(self) -> transfers.Transfers:
        return transfers.Transfers(self.config.ca)

    @property
    def _upload(self) -> Callable[..., Coroutine[Any, Any, None]]:
        return self._transfers.upload

    @property
    def download(self) -> Callable[..., Coroutine[Any, Any, None]]:
        return self._transfers.download

    @property
    def download_all(self) -> Callable[..., Coroutine[Any, Any, None]]:
        return self._transfers.download_all

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels.values():
            await channel.close()

    async def call(self, method: Any, request: Any, *, timeout: float = TIMEOUT) -> Any:
        """One unary call, repeated while the platform is unavailable: all requests of this client are idempotent.

        Raises:
            AlvearyError: it refused, or did not answer in time.
        """
        pause = 0.1
        for attempt in range(_TRIES):
            try:
                return await method(request, metadata=self.metadata, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                passing = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED) or _torn(error)
                if not passing or attempt == _TRIES - 1:
                    raise translate(error, self.config) from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 3.0)
        raise AssertionError("unreachable")

    # ---- runs -----------------------------------------------------------------------------------------------------

    async def submit(self, spec: c.RunSpec, source: Path | None, progress: Callable[[int, int], None] | None = None) -> pb.Run:
        """Upload a source directory where it is new, and submit a run of it."""
        if source is not None:
            spec.snapshot = await self.upload_snapshot(source, progress)
        # The key makes repeating the call harmless.
        request = pb.SubmitRunRequest(spec=spec, idempotency_key=new_id())
        return (await self.call(self.runs.SubmitRun, request)).run  # type: ignore[no-any-return]

    async def upload_snapshot(self, source: Path, progress: Callable[[int, int], None] | None = None) -> str:
        """Digest of a source directory, stored."""
        manifest, paths = await asyncio.to_thread(sources.manifest_of, source, True)

        async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
            reply = await self.call(self.runs.PrepareSnapshot, pb.PrepareSnapshotRequest(manifest=c.Manifest(files=files)))
            return reply.slots, reply.pending

        await self._upload(prepare, manifest, paths, progress)
        return str((await self.call(self.runs.CommitSnapshot, pb.CommitSnapshotRequest(manifest=manifest))).digest)

    async def get_run(self, run_id: str, metrics: Sequence[str] = ()) -> pb.Run:
        """A run, with the newest values of these `metrics`; of none: of those that were logged first."""
        return (await self.call(self.runs.GetRun, pb.GetRunRequest(run_id=run_id, metric_names=metrics))).run  # type: ignore[no-any-return]

    async def full_id(self, run_id: str) -> str:
        """The whole id of a run of which the first characters are given; a whole id as it is, without asking.

        Raises:
            AlvearyError: no run's id begins so, or several do (the text names them).
        """
        return run_id if is_id(run_id) else (await self.get_run(run_id)).id

    async def list_runs(self, filter: str = "", order_by: str = "", limit: int = 0, metrics: Sequence[str] = ()) -> list[pb.Run]:
        """Runs, newest first; limit 0: all. With the newest values of these `metrics`; of none: of those that were logged first."""
        found: list[pb.Run] = []
        token = ""
        while True:
            size = min(limit - len(found), 1000) if limit else 1000
            request = pb.ListRunsRequest(filter=filter, order_by=order_by, page_size=size, page_token=token, metric_names=metrics)
            reply = await self.call(self.runs.ListRuns, request)
            found += reply.runs
            token = reply.next_page_token
            if not token or (limit and len(found) >= limit):
                return found

    async def watch(self, run_id: str) -> AsyncIterator[pb.Run]:
        """The run now and whenever it changes, to its final state; reconnects as often as needed."""
        seen, again = 0, _Reconnect(self.config)
        while True:
            try:
                stream = self.runs.WatchRun(pb.WatchRunRequest(run_id=run_id, after_sequence=seen), metadata=self.metadata)
                async for reply in stream:
                    seen = reply.run.sequence
                    again.progress()
                    yield reply.run
                    if reply.run.state in FINAL:
                        return
                if (await self.get_run(run_id)).state in FINAL:
                    return
            except grpc.aio.AioRpcError as error:
                again.failed(error)
            await again.pause()

    async def wait(self, run_id: str) -> pb.Run:
        """The run in its final state."""
        async for run in self.watch(run_id):
            if run.state in FINAL:
                return run
        return await self.get_run(run_id)

    async def cancel_run(self, run_id: str, reason: str = "") -> pb.Run:
        """Ask for a run's end."""
        return (await self.call(self.runs.CancelRun, pb.CancelRunRequest(run_id=run_id, reason=reason))).run  # type: ignore[no-any-return]

    async def delete_run(self, run_id: str, reason: str = "") -> None:
        """Erase a final run and all that belongs to it alone."""
        await self.call(self.runs.DeleteRun, pb.DeleteRunRequest(run_id=run_id, reason=reason))

    async def tag_run(
        self, run_id: str, set: Mapping[str, str] | None = None, remove: Sequence[str] = (), properties: Mapping[str, str] | None = None
    ) -> None:
        """Change tags, add properties."""
        await self.call(self.runs.TagRun, pb.TagRunRequest(run_id=run_id, set=set, remove=remove, properties=properties))

    async def log_metric(self, run_id: str, name: str, value: float, step: int | None) -> None:
        """Log one number from outside."""
        point = pb.MetricPoint(name=name, scalar=value, step=step)
        point.time.GetCurrentTime()

        async def one() -> AsyncIterator[pb.LogMetricsRequest]:
            yield pb.LogMetricsRequest(run_id=run_id, points=[point])

        try:
            await self.runs.LogMetrics(one(), metadata=self.metadata, timeout=TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise translate(error, self.config) from error

    async def metric_pages(self, run_id: str, name: str = "", recursive: bool = False, **options: Any) -> AsyncIterator[pb.MetricSeries]:
        """Stretches of a run's metrics, page by page; `options`: max_points, attempt, columns of GetMetricsRequest."""
        request = pb.GetMetricsRequest(run_id=run_id, name=name, recursive=recursive, **options)
        while True:
            reply = await self.call(self.runs.GetMetrics, request)
            for series in reply.series:
                yield series
            request.page_token = reply.next_page_token
            if not request.page_token:
                return

    async def metric_series(
        self, run_id: str, name: str = "", recursive: bool = False, max_points: int = 0, attempt: int = 0
    ) -> list[pb.MetricSeries]:
        """A run's metrics, one element for each name and run. `max_points`: as many points draw what all would; 0: all.
        `attempt`: of one attempt alone; 0: what counts in the end."""
        found: dict[tuple[str, str], pb.MetricSeries] = {}
        async for part in self.metric_pages(run_id, name, recursive, max_points=max_points, attempt=attempt):
            key = (part.run_id, part.name)
            if key in found:
                found[key].points.extend(part.points)
                found[key].attempt, found[key].point_count = part.attempt, part.point_count
            else:
                found[key] = part
        return list(found.values())

    async def get_metrics(self, run_id: str, name: str = "", recursive: bool = False, max_points: int = 0) -> dict[str, Any]:
        """Values by name: one logged once is a value, one logged repeatedly a list."""
        every: dict[str, list[Any]] = {}
        tables: dict[str, dict[str, Any]] = {}
        async for series in self.metric_pages(run_id, name, recursive, max_points=max_points, columns=True):
            values = every.setdefault(series.name, [])
            values += series.columns.values
            for point in series.points:
                kind = point.WhichOneof("value")
                if kind == "list":
                    values += point.list.values
                elif kind in ("row_json", "table_json"):
                    columns = tables.setdefault(series.name, {})
                    for column, value in json.loads(getattr(point, kind)).items():
                        columns.setdefault(column, []).extend(value if kind == "table_json" and isinstance(value, list) else [value])
                elif kind is not None:
                    values.append(getattr(point, kind))
        found: dict[str, Any] = {}
        for one, values in every.items():
            if one in tables:
                found[one] = {k: v[0] if len(v) == 1 else v for k, v in tables[one].items()}
            elif values:
                found[one] = values[0] if len(values) == 1 else values
        return found

    async def _listing(self, method: Any, named: Callable[..., Any], linked: Callable[..., Any]) -> transfers.Listing:
        """All files that a paged method lists, `named` its request without links and `linked` the one with links."""
        found: list[c.FileEntry] = []
        token = ""
        while True:
            reply = await self.call(method, named(page_token=token))
            found += [link.file for link in reply.files]
            token = reply.next_page_token
            if not token:
                break

        async def after(path: str) -> Sequence[c.FileLink]:
            files: Sequence[c.FileLink] = (await self.call(method, linked(page_token=path, page_size=transfers.BATCH))).files
            return files

        return transfers.Listing(found, after)

    async def run_files(self, run_id: str, prefix: str = "") -> transfers.Listing:
        """Files that a run stored whose paths begin with `prefix`."""

        def request(**more: Any) -> pb.ListFilesRequest:
            return pb.ListFilesRequest(run_id=run_id, prefix=prefix, **more)

        return await self._listing(self.runs.ListFiles, request, partial(request, with_urls=True))

    async def list_run_files(self, run_id: str, prefix: str = "", with_urls: bool = False) -> list[c.FileLink]:
        """The same, each with its link or without."""
        found: list[c.FileLink] = []
        token = ""
        while True:
            request = pb.ListFilesRequest(run_id=run_id, prefix=prefix, with_urls=with_urls, page_token=token)
            reply = await self.call(self.runs.ListFiles, request)
            found += reply.files
            token = reply.next_page_token
            if not token:
                return found

    async def snapshot_files(self, digest: str) -> transfers.Listing:
        """Files of a snapshot."""

        async def after(path: str) -> Sequence[c.FileLink]:
            links = (await self.call(self.runs.GetSnapshot, pb.GetSnapshotRequest(digest=digest))).files
            return sorted((link for link in links if link.file.path > path), key=lambda link: link.file.path)

        return transfers.Listing([link.file for link in await after("")], after)

    # ---- logs -----------------------------------------------------------------------------------------------------

    async def tail(
        self, run_id: str, after: int = 0, follow: bool = True, streams: Sequence[str] = (), rank: int | None = None,
        provisional: bool = False,
    ) -> AsyncIterator[logs_pb2.TailLine]:  # fmt: skip
        """Log lines; reconnects behind the last line seen, so that none is missed or seen twice.

        `provisional`: also what unfinished lines show; the next line of the same stream, rank and attempt replaces it.
        """
        again = _Reconnect(self.config)
        while True:
            try:
                request = logs_pb2.TailRequest(
                    run_id=run_id, after=after, follow=follow, streams=streams, rank=rank, provisional=provisional
                )
                async for reply in self.logs.Tail(request, metadata=self.metadata):
                    again.progress()
                    for line in _current(reply.lines) if provisional else reply.lines:
                        after = line.cursor
                        yield line
                return
            except grpc.aio.AioRpcError as error:
                again.failed(error)
            await again.pause()

    async def read_logs(
        self, run_id: str, after: int = 0, limit: int = 0, newest: bool = False, streams: Sequence[str] = (), rank: int | None = None,
        *, before: int = 0, since: float | None = None, line: int = 0,
    ) -> logs_pb2.ReadResponse:  # fmt: skip
        """One page of log lines: `limit` (1,000) between the cursors `after` and `before`, or the newest ones of them.

        `since`: begin at the first line that was written then or later, seconds since the epoch; `line`: at this line of the log,
        counted from 1 over all streams and ranks.
        """
        request = logs_pb2.ReadRequest(
            run_id=run_id, after=after, limit=limit, newest=newest, streams=streams, rank=rank, before=before, line=line
        )
        if since is not None:
            request.since.FromMicroseconds(int(since * 1e6))
        return await self.call(self.logs.Read, request)  # type: ignore[no-any-return]

    async def search_logs(
        self, run_id: str, text: str, *, ignore_case: bool = False, after: int = 0, limit: int = 0, streams: Sequence[str] = (),
        rank: int | None = None,
    ) -> logs_pb2.SearchResponse:  # fmt: skip
        """Log lines that hold `text`, the first `limit` (1,000) behind the cursor `after`."""
        request = logs_pb2.SearchRequest(
            run_id=run_id, text=text, ignore_case=ignore_case, after=after, limit=limit, streams=streams, rank=rank
        )
        return await self.call(self.logs.Search, request)  # type: ignore[no-any-return]

    async def show(
        self, run_id: str, line: Callable[[logs_pb2.LogLine], None], state: Callable[[str, str], None], streams: Sequence[str] = ()
    ) -> None:
        """States and log lines of rank 0 as they come, provisional ones too, until the run is final and its log complete."""

        async def states() -> None:
            last = ("", "")
            async for run in self.watch(run_id):
                now = (state_name(run.state), run.reason)
                if now != last:
                    state(*now)
                last = now

        async def lines() -> None:
            async for one in self.tail(run_id, streams=streams, rank=0, provisional=True):
                line(one.line)

        await asyncio.gather(states(), lines())

    async def write_logs(self, run_id: str, folder: Path) -> list[Path]:
        """Each stream of a run's log as a file."""
        files: dict[Path, Any] = {}
        try:
            async for one in self.tail(run_id, follow=False):
                name = one.line.stream.replace("..", "_").strip("/")
                if name in ("stdout", "stderr", "launcher-stdout", "launcher-stderr") or (name.startswith("logs/") and one.line.rank):
                    name = f"{name}_{one.line.rank}"
                path = folder / (name if "." in name else f"{name}.txt")
                if path not in files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[path] = path.open("wb")
                files[path].write(one.line.data + (b"" if one.line.partial else b"\n"))
        finally:
            for file in files.values():
                file.close()
        return sorted(files)

    # ---- models and datasets --------------------------------------------------------------------------------------

    async def register_from_run(
        self, run_id: str, name: str, path: str, tags: Mapping[str, str], properties: Mapping[str, str], description: str,
        framework: str = "", framework_version: str = "", progress: Callable[[int, int], None] | None = None,
    ) -> reg.ModelVersion:  # fmt: skip
        """The next version of a model, from what a run stored; `progress` is called with files copied and files in all."""
        source = reg.RunOutput(run_id=run_id, path=path)
        left, stalls = -1, 0
        while left:  # each call copies for seconds, so that none takes long
            reply = await self.call(self.models.PrepareModel, reg.PrepareModelRequest(run_output=source))
            stalls = stalls + 1 if reply.pending == left else 0
            left = reply.pending
            if progress and reply.total:
                progress(reply.total - left, reply.total)
            if stalls == _TRIES:
                raise AlvearyError(f"{left} of {reply.total} files of run {run_id} could not be copied: try again later", "UNAVAILABLE")
        request = reg.RegisterModelRequest(
            name=name, run_output=source, tags=tags, properties=properties,
            description=description, framework=framework, framework_version=framework_version,
            idempotency_key=new_id(),
        )  # fmt: skip
        return await self._registered(request)

    async def _registered(self, request: reg.RegisterModelRequest) -> reg.ModelVersion:
        reply: reg.RegisterModelResponse = await self.call(self.models.RegisterModel, request, timeout=_LONG)
        for text in reply.warnings:
            sources.warn(text)
        return reply.model

    async def model_files(self, name: str, version: int, prefix: str = "") -> transfers.Listing:
        """Files of a model's version, its ONNX export among them."""

        def request(**more: Any) -> reg.ListModelFilesRequest:
            return reg.ListModelFilesRequest(name=name, version=version, prefix=prefix, **more)

        return await self._listing(self.models.ListModelFiles, partial(request, without_urls=True), request)

    async def dataset_files(self, name: str, version: int, prefix: str = "") -> transfers.Listing:
        """Files of a dataset's version."""

        def request(**more: Any) -> reg.ListDatasetFilesRequest:
            return reg.ListDatasetFilesRequest(name=name, version=version, prefix=prefix, **more)

        return await self._listing(self.datasets.ListDatasetFiles, partial(request, without_urls=True), request)

    async def register_local(
        self, path: Path, name: str, tags: Mapping[str, str], properties: Mapping[str, str], description: str,
        framework: str = "", environment: c.Environment | None = None, progress: Callable[[int, int], None] | None = None,
        *, verify: bool = False, follow_links: bool = False,
    ) -> reg.ModelVersion:  # fmt: skip
        """The next version of a model, from a file or folder here."""
        manifest, paths = await asyncio.to_thread(sources.manifest_of, path, False, follow_links=follow_links)
        await self._upload(self._preparing(self.models.PrepareModel, reg.PrepareModelRequest, verify), manifest, paths, progress)
        request = reg.RegisterModelRequest(
            name=name, manifest=manifest, tags=tags, properties=properties, description=description, framework=framework,
            environment=environment, idempotency_key=new_id(),
        )  # fmt: skip
        return await self._registered(request)

    def _preparing(self, method: Any, request: Callable[..., Any], verify: bool) -> transfers.Prepare:
        """What asks for slots; with `verify` the platform reads what it has first, once."""
        doubted: set[str] = set()

        async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
            new = {f.sha256 for f in files} - doubted if verify else set()
            doubted.update(new)
            reply = await self.call(method, request(manifest=c.Manifest(files=files), doubted=new))
            return reply.slots, reply.pending

        return prepare

    async def get_model(self, name: str, version: int = 0, alias: str = "") -> reg.ModelVersion:
        """A version of a model; 0: the latest."""
        request = reg.GetModelRequest(name=name, version=version, alias=alias)
        return (await self.call(self.models.GetModel, request)).model  # type: ignore[no-any-return]

    async def export_model(self, name: str, version: int, spec: ev.OnnxSpec) -> reg.ExportModelResponse:
        """Begin an ONNX export."""
        request = reg.ExportModelRequest(name=name, version=version, spec=spec)
        return await self.call(self.models.ExportModel, request)  # type: ignore[no-any-return]

    async def wait_for_export(self, name: str, version: int, export_id: str, timeout: float = 7200.0) -> reg.ModelVersion:
        """The version when its export is over, however it ended.

        Raises:
            TimeoutError: not within `timeout` seconds.
        """
        pause = 0.05
        async with asyncio.timeout(timeout):
            while (model := await self.get_model(name, version)).export_pending == export_id:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 1.0)
        return model

    async def upload_dataset(
        self, folder: Path, name: str, description: str = "", tags: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None, *, verify: bool = False, follow_links: bool = False,
    ) -> reg.DatasetVersion:  # fmt: skip
        """Register a folder; identical content answers with the version that has it."""
        manifest, paths = await asyncio.to_thread(sources.manifest_of, folder, False, follow_links=follow_links)
        await self._upload(self._preparing(self.datasets.PrepareDataset, reg.PrepareDatasetRequest, verify), manifest, paths, progress)
        request = reg.RegisterDatasetRequest(name=name, manifest=manifest, description=description, tags=tags)
        return (await self.call(self.datasets.RegisterDataset, request, timeout=_LONG)).dataset  # type: ignore[no-any-return]

    # ---- dead letters ---------------------------------------------------------------------------------------------

    async def dead_letters(self) -> list[c.DeadLetter]:
        """Events of the workspace that a service could not handle and set aside, oldest first; the caller must be an owner."""
        found: list[c.DeadLetter] = []
        token = ""
        while True:
            reply = await self.call(self.letters.ListDeadLetters, pb.ListDeadLettersRequest(page_size=1000, page_token=token))
            found += reply.letters
            token = reply.next_page_token
            if not token:
                return found

    async def retry_dead_letters(self, ids: Sequence[str]) -> list[pb.DeadLetterOutcome]:
        """Have up to 100 dead letters tried once more by the services that set them aside; what came of each."""
        reply = await self.call(self.letters.RetryDeadLetters, pb.RetryDeadLettersRequest(ids=ids), timeout=600)
        return list(reply.outcomes)

    async def drop_dead_letters(self, ids: Sequence[str]) -> None:
        """Forget up to 100 dead letters."""
        await self.call(self.letters.DropDeadLetters, pb.DropDeadLettersRequest(ids=ids))

    # ---- events ---------------------------------------------------------------------------------------------------

    async def subscribe(
        self, pattern: str, handler: Callable[[pb.Event], Awaitable[None]], *, durable: str = "",
        from_sequence: int | None = None, from_time: Any = None,
    ) -> None:  # fmt: skip
        """Hand events to `handler`, for ever; each is acknowledged when the handler returns, else it comes again."""
        start = pb.SubscribeStart(pattern=pattern, durable=durable, from_sequence=from_sequence)
        if from_time is not None:
            start.from_time.FromDatetime(from_time)
        again = _Reconnect(self.config)
        while True:
            stream = self.events.Subscribe(metadata=self.metadata)
            try:
                await stream.write(pb.SubscribeRequest(start=start))
                async for reply in stream:
                    again.progress()
                    await handler(reply.event)
                    await stream.write(pb.SubscribeRequest(ack=pb.SubscribeAck(sequences=[reply.event.sequence])))
                    if not durable:  # a new connection goes on behind what was seen
                        start.ClearField("from_time")
                        start.from_sequence = reply.event.sequence + 1
            except grpc.aio.AioRpcError as error:
                again.failed(error)
            finally:
                stream.cancel()  # else the platform would go on handing events to a stream that nobody reads
            await again.pause()


def _current(lines: Sequence[logs_pb2.TailLine]) -> list[logs_pb2.TailLine]:
    """Lines without the provisional ones that a later one of them replaces: what is long past need not be shown changing."""
    last = {(one.line.stream, one.line.rank, one.line.attempt): one.cursor for one in lines}
    return [one for one in lines if not one.line.provisional or last[one.line.stream, one.line.rank, one.line.attempt] == one.cursor]


class _Reconnect:
    """When a stream that broke is opened again, and when its error is the caller's.

    A platform that is down or being restarted (UNAVAILABLE) is waited for, `_PATIENCE` seconds at most. A connection that
    is torn down under a call also shows as INTERNAL, UNKNOWN or CANCELLED, but so does a fault of the platform that every
    repetition meets again: those are tried `_FAULTS` times, or for `_TORN_PATIENCE` seconds where the text says that a proxy
    tore the stream, which it does for as long as a service behind it restarts. Each reply starts all counts again.
    """

    _PATIENCE = 3600.0
    _TORN_PATIENCE = 60.0
    _FAULTS = 5
    _FAULTY = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)

    def __init__(self, config: Config) -> None:
        self._config = config
        self.progress()

    def progress(self) -> None:
        """A reply arrived."""
        self._pause, self._faults, self._since = 0.1, 0, time.monotonic()

    def failed(self, error: grpc.aio.AioRpcError) -> None:
        """The stream broke: returns where it is worth opening again.

        Raises:
            AlvearyError: it is not.
        """
        self._faults += error.code() in self._FAULTY
        waited = time.monotonic() - self._since
        unavailable = error.code() == grpc.StatusCode.UNAVAILABLE and waited < self._PATIENCE
        unavailable = unavailable or (_torn(error) and waited < self._TORN_PATIENCE)
        if not unavailable and not (error.code() in self._FAULTY and self._faults < self._FAULTS):
            raise translate(error, self._config) from error

    async def pause(self) -> None:
        """Wait before the next try, longer each time."""
        await asyncio.sleep(self._pause)
        self._pause = min(self._pause * 2, 3.0)


def _torn(error: grpc.aio.AioRpcError) -> bool:
    """Whether a connection or stream was torn on its way, as gRPC's own library words it."""
    details = error.details() or ""
    return error.code() in _Reconnect._FAULTY and any(text in details for text in ("Stream removed", "RST_STREAM", "Connection reset"))


def translate(error: grpc.aio.AioRpcError, config: Config) -> AlvearyError:
    """The platform's own words."""
    code = error.code()
    # What the platform itself says carries google.rpc.Status; the rest is of this side: no such name, nobody listening, no gRPC there.
    ours = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if code == grpc.StatusCode.UNAVAILABLE and not ours:
        # Which address failed how is not told where a name has several.
        stranger = ", or what answers has a certificate of another name, or of an authority other than `ca`'s" if config.tls else ""
        return NoPlatform(
            f"no platform answers at {config.endpoint} (from {config.source}): start it with `alveary up`{stranger}", code.name
        )
    return AlvearyError(error.details() or code.name, code.name)
