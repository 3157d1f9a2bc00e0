"""The gRPC servicers: translate, call, translate back."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from typing import Any

from google.protobuf.message import Message
from nats.js.errors import NotFoundError

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import image_digest, manifest_from_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import id_from_key, is_id, new_id
from alveary_contracts.names import token
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound
from alveary_core.eventlog import METRICS, EventLog
from alveary_core.manifests import page_of
from alveary_core.objectstore import ObjectStore
from alveary_runs import domain, listing, query, series
from alveary_runs.metrics import batches
from alveary_runs.projection import RunsProjection, view
from alveary_runs.resolve import full_id
from alveary_runs.snapshots import Snapshots
from alveary_runs.validation import problems, with_defaults

VERSION = version("alveary-core")
Context = Any


class RunService(rpc.RunServiceServicer):
    """alveary.runs.v1.RunService."""

    def __init__(self, log: EventLog, store: ObjectStore, runs: Aggregates[domain.Run], projection: RunsProjection) -> None:
        self._log, self._store, self._runs, self._view = log, store, runs, projection
        self._metrics = projection.metrics
        self._snapshots = Snapshots(store)

    async def PrepareSnapshot(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        auth.require("writer")
        digest, found = await self._snapshots.prepare(request.manifest)
        return pb.PrepareSnapshotResponse(digest=digest, slots=found.slots, pending=found.pending)

    async def CommitSnapshot(self, request: pb.CommitSnapshotRequest, context: Context) -> pb.CommitSnapshotResponse:
        auth.require("writer")
        return pb.CommitSnapshotResponse(digest=await self._snapshots.commit(request.manifest))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Context) -> pb.GetSnapshotResponse:
        auth.require("reader")
        manifest = await self._snapshots.find(request.digest)
        if manifest is None:
            raise NotFound("snapshot", request.digest)
        return pb.GetSnapshotResponse(files=self._snapshots.links(manifest))

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Context) -> pb.SubmitRunResponse:
        who = auth.require("writer")
        key_text = request.idempotency_key
        if len(key_text) > 128:
            raise InvalidArgument(("idempotency_key", "at most 128 characters"))
        run_id = new_id()
        if key_text:
            # The id follows from the key, so that two submissions meet in one aggregate, on whichever replica.
            run_id = id_from_key(who.workspace, key_text)
            state, sequence = await self._runs.load(self._runs.key(who.workspace, run_id))
            if state.deleted_by:
                raise FailedPrecondition(
                    f"the run of this idempotency key was deleted by {state.deleted_by}: use another key", f"run/{run_id}"
                )
            if sequence:
                return pb.SubmitRunResponse(run=await self._shown(who.workspace, run_id, state), sequence=sequence)
        await self._view.ready()  # targets, datasets and the number are looked up in it
        spec = await self._checked(who.workspace, request.spec)
        digest = image_digest(spec.environment, run_id)
        number = await self._view.next_number(who.workspace, spec.experiment)
        submitted = ev.RunSubmitted(
            spec=spec, submitted_by=who.subject, image_digest=digest, idempotency_key=key_text,
            number=number,
        )  # fmt: skip
        ready = await self._view.image_state(who.workspace, digest) == "ready"

        def decide(run: domain.Run) -> list[Message]:
            events: list[Message] = list(domain.submit(run, submitted))
            if events and ready:
                events += domain.prepared(domain.evolve(run, submitted), digest, cached=True)
            return events

        state, sequence = await self._runs.execute(self._runs.key(who.workspace, run_id), decide, new=not key_text)
        return pb.SubmitRunResponse(run=view(run_id, state), sequence=sequence)

    async def _checked(self, workspace: str, asked: c.RunSpec) -> c.RunSpec:
        spec = with_defaults(asked)
        manifest = await self._snapshots.hold(spec.snapshot) if re.fullmatch(r"[0-9a-f]{64}", spec.snapshot) else None
        names = [r["name"] for r in await self._view.rows("SELECT name FROM targets WHERE workspace=?", (workspace,))]
        files = {f.path for f in manifest.files} if manifest else None
        found = problems(spec, await self._view.target(workspace, spec.compute_target), names, files, internal=False)
        for item in spec.inputs:
            row = await self._view.row(
                "SELECT max(version), digest FROM datasets WHERE workspace=? AND name=? AND (?=0 OR version=?)",
                (workspace, item.dataset, item.version, item.version),
            )
            if row is None or row[0] is None:
                which = item.dataset + (f":{item.version}" if item.version else "")
                found.append(("spec.inputs", f"there is no dataset {which!r}: register it first"))
            else:
                item.version, item.manifest_digest = row[0], row[1]
        spec.resume_attempt = 0
        if spec.resume_from:
            spec.resume_from = await full_id(self._view, workspace, spec.resume_from)
            earlier = await self._view.get(workspace, spec.resume_from)
            if earlier is None or not earlier.attempt:
                found.append(("spec.resume_from", f"there is no run {spec.resume_from!r} that has begun: nothing to resume from"))
            else:
                spec.resume_attempt = earlier.attempt
        if spec.parent_run_id:
            spec.parent_run_id = await full_id(self._view, workspace, spec.parent_run_id)
        if spec.parent_run_id and await self._view.get(workspace, spec.parent_run_id) is None:
            found.append(("spec.parent_run_id", f"there is no run {spec.parent_run_id!r}"))
        if found:
            raise InvalidArgument(*found)
        return spec

    async def _shown(self, workspace: str, run_id: str, state: domain.Run) -> pb.Run:
        return await self._view.get(workspace, run_id) or view(run_id, state)

    async def _get(self, run_id: str, min_sequence: int = 0, names: Sequence[str] = ()) -> tuple[str, pb.Run]:
        who = auth.require("reader")
        await self._view.wait_for(min_sequence)
        run_id = await full_id(self._view, who.workspace, run_id)
        run = await self._view.get(who.workspace, run_id, names)
        if run is None:  # submitted a moment ago, perhaps
            state, sequence = await self._runs.load(self._runs.key(who.workspace, run_id)) if is_id(run_id) else (None, 0)
            if state is not None and state.deleted_by:
                raise NotFound("run", run_id, f"{state.deleted_by} deleted it")
            if not sequence or state is None:
                raise NotFound("run", run_id, f"in workspace {who.workspace}; `alveary run list` shows those there are")
            if self._view.caught_up.is_set():  # else what the log says of it is what there is
                await self._view.wait_for(sequence)
            run = await self._view.get(who.workspace, run_id, names) or view(run_id, state)
        return who.workspace, run

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        _, run = await self._get(request.run_id, request.min_sequence, _names(request.metric_names))
        return pb.GetRunResponse(run=run)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        who = auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        conditions = query.conditions(request.filter)
        metric, direction = query.order(request.order_by)
        names = _names(request.metric_names)
        size = request.page_size or 100
        if not 1 <= size <= 1000:
            raise InvalidArgument(("page_size", f"{size}: 1 to 1000"))
        after = query.decode_token(request.page_token) if request.page_token else None
        ask = listing.Listing(who.workspace, conditions, metric, direction, request.include_archived, size, after)

        def page(db: sqlite3.Connection) -> pb.ListRunsResponse:
            found = listing.page(db, ask)
            last = found[size - 1] if len(found) > size else None
            token_text = query.encode_token([last.nan, last.rank, last.id]) if last else ""
            reply = pb.ListRunsResponse(next_page_token=token_text)
            for one in found[:size]:  # parsed in its place: a copy of all at the end would hold up the event loop
                self._view.complete(db, one.proto, names, reply.runs.add())
            return reply

        return await self._view.read(page, slow=True)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        workspace, run = await self._get(request.run_id)
        seen = request.after_sequence
        async for _ in self._view.changes(run.id, timeout=15):
            current = await self._view.get(workspace, run.id)
            if current is None:
                continue
            if current.sequence > seen:
                seen = current.sequence
                yield pb.WatchRunResponse(run=current)
            if current.state in domain.FINAL:
                return

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        who = auth.require("writer")
        run_id = (await self._get(request.run_id))[1].id
        key = self._runs.key(who.workspace, run_id)
        try:
            state, sequence = await self._runs.execute(key, lambda run: domain.cancel(run, who.subject, request.reason))
        except domain.Rejected as error:
            raise FailedPrecondition(f"run {run_id}: {error}", f"run/{run_id}") from error
        return pb.CancelRunResponse(run=view(run_id, state), sequence=sequence)

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Context) -> pb.DeleteRunResponse:
        who = auth.require("writer")
        run = (await self._get(request.run_id))[1]
        try:
            _, sequence = await self._runs.execute(
                self._runs.key(who.workspace, run.id), lambda state: domain.delete(state, who.subject, request.reason, run.submitted_at)
            )
        except domain.Rejected as error:
            raise FailedPrecondition(f"run {run.id}: {error}", f"run/{run.id}") from error
        await self._view.wait_for(sequence)
        return pb.DeleteRunResponse(sequence=sequence)

    async def TagRun(self, request: pb.TagRunRequest, context: Context) -> pb.TagRunResponse:
        who = auth.require("writer")
        run_id = (await self._get(request.run_id))[1].id
        for name in [*request.set, *request.properties]:
            if not name or len(name) > 256 or name.startswith("alveary."):
                raise InvalidArgument(("set", f"{name[:80]!r}: 1 to 256 characters, not beginning with 'alveary.'"))
        event = ev.RunTagged(set=request.set, removed=request.remove, properties=request.properties)
        if request.HasField("display_name"):
            event.display_name = request.display_name
        if request.HasField("description"):
            event.description = request.description
        key = self._runs.key(who.workspace, run_id)
        try:
            state, sequence = await self._runs.execute(key, lambda run: domain.tag(run, event))
        except domain.Rejected as error:
            raise FailedPrecondition(f"run {run_id}: {error}", f"run/{run_id}") from error
        await self._view.wait_for(sequence)
        return pb.TagRunResponse(run=await self._shown(who.workspace, run_id, state), sequence=sequence)

    async def LogMetrics(self, request_iterator: AsyncIterator[pb.LogMetricsRequest], context: Context) -> pb.LogMetricsResponse:
        who = auth.require("writer")
        accepted = 0
        async for request in request_iterator:
            _, run = await self._get(request.run_id)
            await self._metrics.admit(run.id, request.points)
            subject = f"alveary-metrics.{token(who.workspace)}.{token(run.id)}"
            for batch in batches(request.points, run.attempt):
                await self._log.js.publish(subject, batch.SerializeToString(), headers={"Nats-Msg-Id": new_id()})
                accepted += len(batch.points)
        return pb.LogMetricsResponse(accepted=accepted)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:
        asked = series.checked(request)
        begin = series.Token.decode(request.page_token) if request.page_token else series.Token()
        workspace, run = await self._get(request.run_id)
        try:
            subject = f"alveary-metrics.{token(workspace)}.{token(run.id)}"
            newest = await self._log.js.get_last_msg(METRICS, subject)
            await self._metrics.wait_for(newest.seq or 0)
        except NotFoundError:
            pass  # it logged none
        wanted = [run.id]
        if request.recursive:
            children = "SELECT id FROM runs WHERE parent=? ORDER BY id"
            wanted += [r["id"] for r in await self._view.rows(children, (run.id,), slow=True)]
        if begin.run:
            if begin.run not in wanted:
                raise InvalidArgument(("page_token", "a token of another run's metrics"))
            wanted = wanted[wanted.index(begin.run) :]
        found, following = await self._metrics.read(lambda db: series.page(db, wanted, asked, begin), slow=True)
        return pb.GetMetricsResponse(series=found, next_page_token=following.encode() if following else "")

    async def ListFiles(self, request: pb.ListFilesRequest, context: Context) -> pb.ListFilesResponse:
        _, run = await self._get(request.run_id)
        prefix = f"{run.id}/{run.attempt}/"
        if run.manifest_digest:
            data = await self._store.get("runs", f"{prefix}manifest.json")
            if hashlib.sha256(data).hexdigest() != run.manifest_digest:
                raise FailedPrecondition(f"the manifest of run {run.id} is damaged: its digest is not {run.manifest_digest}")
            files = list((await asyncio.to_thread(manifest_from_json, data)).files)
        else:  # not final: what was uploaded so far
            keys = await self._store.keys("runs", prefix)
            files = [c.FileEntry(path=k.removeprefix(prefix)) for k in keys]
        page, more = page_of(files, request.prefix, request.page_size, request.page_token)
        links = [c.FileLink(file=f, url=self._store.get_url("runs", prefix + f.path) if request.with_urls else "") for f in page]
        return pb.ListFilesResponse(files=links, next_page_token=more)


class ExperimentService(rpc.ExperimentServiceServicer):
    """alveary.runs.v1.ExperimentService."""

    def __init__(self, projection: RunsProjection) -> None:
        self._view = projection

    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Context) -> pb.ListExperimentsResponse:
        who = auth.require("reader")
        sql = "SELECT name, runs, newest FROM experiments WHERE workspace=? ORDER BY name"
        found = []
        for name, count, newest in await self._view.rows(sql, (who.workspace,), slow=True):
            one = pb.Experiment(name=name, run_count=count)
            one.last_submitted_at.FromNanoseconds(int(newest * 1e6) * 1000)
            found.append(one)
        return pb.ListExperimentsResponse(experiments=found)


class WorkspaceService(rpc.WorkspaceServiceServicer):
    """alveary.runs.v1.WorkspaceService."""

    async def GetWorkspace(self, request: pb.GetWorkspaceRequest, context: Context) -> pb.GetWorkspaceResponse:
        who = auth.require("reader")
        return pb.GetWorkspaceResponse(name=who.workspace, version=VERSION, subject=who.subject, role=who.role)


def _names(names: Sequence[str]) -> Sequence[str]:
    if len(names) > 1000:
        raise InvalidArgument(("metric_names", f"{len(names)} names: at most 1,000"))
    return names
