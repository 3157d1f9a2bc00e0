"""The gRPC servicers: translate, call, translate back."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_from_json, manifest_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import name_problem, normal_path
from alveary_contracts.registry.v1 import registry_pb2 as pb
from alveary_contracts.registry.v1 import registry_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.blobs import Blobs
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from alveary_core.manifests import check_manifest, page_of, stored_manifest
from alveary_core.objectstore import ObjectStore
from alveary_registry import domain, export
from alveary_registry.projection import RegistryProjection

# A manifest of no more files stands in the event too.
_INLINE = 200
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Of ListModels: how many versions come before; as many as SQLite can count.
_PAGE = re.compile(r"[0-9]{1,18}")


def _check_name(name: str) -> None:
    if problem := name_problem(name):
        raise InvalidArgument(("name", problem))


class ModelService(rpc.ModelServiceServicer):
    """alveary.registry.v1.ModelService."""

    def __init__(self, store: ObjectStore, models: Aggregates[domain.Model], projection: RegistryProjection) -> None:
        self._store, self._models, self._view = store, models, projection
        self._blobs = Blobs(store, "models")

    async def _execute(self, name: str, decide: Callable[[domain.Model], Sequence[Message]]) -> tuple[domain.Model, int]:
        who = auth.require("writer")
        try:
            state, sequence = await self._models.execute(self._models.key(who.workspace, name), decide)
        except domain.Rejected as error:
            raise FailedPrecondition(f"model {name}: {error}", f"model/{name}") from error
        await self._view.wait_for(sequence)
        return state, sequence

    async def _model(self, name: str, version: int = 0) -> pb.ModelVersion:
        who = auth.require("reader")
        found = await self._view.model(who.workspace, name, version)
        if found is None:
            raise NotFound("model", name + (f":{version}" if version else ""), "`alveary model list` shows those there are")
        return found

    async def PrepareModel(self, request: pb.PrepareModelRequest, context: Any) -> pb.PrepareModelResponse:
        auth.require("writer")
        if request.HasField("run_output"):
            files, prefix = await self._outputs(request.run_output, await self._run(request.run_output.run_id))
            left = await self._blobs.take(files, "runs", {f.sha256: prefix + f.path for f in files})
            return pb.PrepareModelResponse(pending=left, total=len(files))
        check_manifest(request.manifest)
        found = await self._blobs.prepare(request.manifest.files, request.doubted)
        return pb.PrepareModelResponse(slots=found.slots, pending=found.pending)

    async def RegisterModel(self, request: pb.RegisterModelRequest, context: Any) -> pb.RegisterModelResponse:
        who = auth.require("writer")
        _check_name(request.name)
        digest = manifest_digest(request.manifest) if request.HasField("manifest") else ""
        # A script's registration is repeated by its trainer, and made again by the next attempt: content decides, not the caller's key.
        key_text = f"{request.run_id}/{digest}" if request.run_id and digest else request.idempotency_key
        if key_text:
            state, sequence = await self._models.load(self._models.key(who.workspace, request.name))
            if number := domain.by_key(state, key_text):
                model = await self._model(request.name, number)
                return pb.RegisterModelResponse(model=model, sequence=sequence, warnings=_warnings(model.lineage))
        event = ev.ModelRegistered(
            description=request.description, tags=request.tags, properties=request.properties,
            framework=request.framework, framework_version=request.framework_version, registered_by=who.subject,
            idempotency_key=key_text, environment=request.environment if request.HasField("environment") else None,
        )  # fmt: skip
        if request.WhichOneof("source") == "run_output":
            manifest = await self._from_run(request.run_output, event)
        else:
            check_manifest(request.manifest)
            await self._blobs.require(request.manifest.files)
            manifest = request.manifest
            if request.run_id:
                self._trace(await self._run(request.run_id), event)
        event.lineage.datasets.extend(d for d in request.datasets if d not in event.lineage.datasets)
        event.lineage.parent = request.parent
        data = await asyncio.to_thread(manifest_json, manifest)
        event.manifest_digest, event.file_count = hashlib.sha256(data).hexdigest(), len(manifest.files)
        event.total_size = sum(f.size for f in manifest.files)
        if event.file_count <= _INLINE:  # a large one would not fit into an event
            event.manifest.CopyFrom(manifest)
        await self._blobs.claims.hold([event.manifest_digest])
        await self._store.put("models", f"manifests/{event.manifest_digest}.json", data)
        state, sequence = await self._execute(request.name, lambda model: domain.register(model, event))
        number = domain.by_key(state, key_text) if key_text else event.version
        return pb.RegisterModelResponse(model=await self._model(request.name, number), sequence=sequence, warnings=_warnings(event.lineage))

    async def _outputs(self, source: pb.RunOutput, row: sqlite3.Row) -> tuple[list[c.FileEntry], str]:
        """The files of a run that were chosen, by the paths they have in it; and what precedes these in the object store.

        Raises:
            FailedPrecondition: the run is not final, or its manifest is damaged.
            InvalidArgument: it stored no such file.
        """
        if not row["manifest"]:
            raise FailedPrecondition(f"run {source.run_id} is not final or stored nothing: wait for its completion", f"run/{source.run_id}")
        prefix = f"{source.run_id}/{row['attempt']}/"
        data = await self._store.get("runs", f"{prefix}manifest.json")
        if hashlib.sha256(data).hexdigest() != row["manifest"]:
            raise FailedPrecondition(f"the manifest of run {source.run_id} is damaged: its digest is another")
        path = normal_path(source.path)
        every = (await asyncio.to_thread(manifest_from_json, data)).files
        chosen = [f for f in every if f.path == path or f.path.startswith(path + "/")] if path else list(every)
        if not chosen:
            known = ", ".join(f.path for f in every[:10]) or "no files"
            raise InvalidArgument(("run_output.path", f"run {source.run_id} stored no {source.path!r}; it has {known}"))
        return chosen, prefix

    async def _from_run(self, source: pb.RunOutput, event: ev.ModelRegistered) -> c.Manifest:
        """Copy files of a run inside the store, and fill in where they come from; returns the model's files.

        Raises:
            Unavailable: there are too many for one call; the next one goes on with them.
        """
        row = await self._run(source.run_id)
        chosen, prefix = await self._outputs(source, row)
        if left := await self._blobs.take(chosen, "runs", {f.sha256: prefix + f.path for f in chosen}):
            raise Unavailable(f"{left} of {len(chosen)} files of run {source.run_id} are still to be copied: call again")
        path = normal_path(source.path)
        manifest = c.Manifest()
        for file in chosen:
            name = file.path.rpartition("/")[2] if file.path == path else file.path.removeprefix(path + "/")
            manifest.files.append(c.FileEntry(path=name, size=file.size, sha256=file.sha256, executable=file.executable))
        check_manifest(manifest)
        self._trace(row, event)
        return manifest

    async def _manifest(self, manifest: c.Manifest, digest: str) -> c.Manifest:
        """The files of a version, which stand in its event where they are few.

        Raises:
            FailedPrecondition: what the object store has of it is damaged.
        """
        return manifest if manifest.files or not digest else await stored_manifest(self._store, "models", digest)

    async def _run(self, run_id: str) -> sqlite3.Row:
        """What is known of a run of the caller's workspace. One that was submitted a moment ago may not be in the view yet.

        Raises:
            NotFound: there is none.
        """
        who = auth.require("writer")
        for pause in (0.02, 0.1, 0.5, 2.0, 0.0):
            row = await self._view.row("SELECT * FROM runs WHERE run=? AND workspace=?", (run_id, who.workspace))
            if row is not None and row["submitted"] is not None:
                return row
            await asyncio.sleep(pause)
        raise NotFound("run", run_id)

    @staticmethod
    def _trace(row: sqlite3.Row, event: ev.ModelRegistered) -> None:
        """Fill in what of its run a version is remembered by."""
        submitted = ev.RunSubmitted.FromString(row["submitted"])
        spec = submitted.spec
        state = f"RUN_STATE_{(row['state'] or '').upper()}"
        event.lineage.CopyFrom(
            ev.Lineage(
                run_id=row["run"], snapshot=spec.snapshot, image_digest=submitted.image_digest, experiment=spec.experiment,
                datasets=[f"{i.dataset}:{i.version}" for i in spec.inputs], compute_target=spec.compute_target,
                run_state=c.RunState.Value(state) if state in c.RunState.keys() else c.RUN_STATE_UNSPECIFIED,  # noqa: SIM118
            )
        )  # fmt: skip
        if not event.HasField("environment"):
            event.environment.CopyFrom(spec.environment)
        event.entry_script = spec.entry_script

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        if request.alias:
            found = [m for m in await self._view.versions(auth.require("reader").workspace, request.name) if request.alias in m.aliases]
            if not found:
                raise NotFound("model", f"{request.name}@{request.alias}")
            return pb.GetModelResponse(model=found[0])
        return pb.GetModelResponse(model=await self._model(request.name, request.version))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        who = auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        size = request.page_size or 100
        if not 1 <= size <= 1000:
            raise InvalidArgument(("page_size", f"{size}: 1 to 1000"))
        if request.page_token and not _PAGE.fullmatch(request.page_token):
            raise InvalidArgument(("page_token", "not a token that ListModels gave"))
        offset = int(request.page_token or 0)
        sql = "SELECT proto FROM models m WHERE workspace=? AND archived=0"
        values: list[Any] = [who.workspace]
        if request.name:
            sql, values = sql + " AND name=?", [*values, request.name]
        if request.run_id:
            sql, values = sql + " AND run=?", [*values, request.run_id]
        for key, value in request.tags.items():
            sql += (
                " AND EXISTS (SELECT 1 FROM model_tags t WHERE t.workspace=m.workspace AND t.name=m.name"
                " AND t.version=m.version AND t.key=? AND t.value=?)"
            )
            values += [key, value]
        if request.latest_only:
            sql += " AND version=(SELECT max(version) FROM models x WHERE x.workspace=m.workspace AND x.name=m.name)"
        rows = await self._view.rows(sql + " ORDER BY name, version DESC LIMIT ? OFFSET ?", [*values, size + 1, offset], slow=True)
        more = str(offset + size) if len(rows) > size else ""
        return pb.ListModelsResponse(models=[pb.ModelVersion.FromString(r["proto"]) for r in rows[:size]], next_page_token=more)

    async def TagModel(self, request: pb.TagModelRequest, context: Any) -> pb.TagModelResponse:
        version = (await self._model(request.name, request.version)).version
        event = ev.ModelTagged(version=version, set=request.set, removed=request.remove, properties=request.properties)
        if request.HasField("description"):
            event.description = request.description
        _, sequence = await self._execute(request.name, lambda model: domain.tag(model, event))
        return pb.TagModelResponse(model=await self._model(request.name, version), sequence=sequence)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Any) -> pb.SetAliasResponse:
        await self._model(request.name)
        if not _ALIAS.fullmatch(request.alias):
            raise InvalidArgument(("alias", f"{request.alias[:80]!r}: a letter, then up to 63 letters, digits, '_' or '-'"))
        _, sequence = await self._execute(request.name, lambda m: domain.set_alias(m, request.alias, request.version))
        return pb.SetAliasResponse(sequence=sequence)

    async def ArchiveModel(self, request: pb.ArchiveModelRequest, context: Any) -> pb.ArchiveModelResponse:
        version = (await self._model(request.name, request.version)).version
        _, sequence = await self._execute(request.name, lambda model: domain.archive(model, version))
        return pb.ArchiveModelResponse(sequence=sequence)

    async def ListModelFiles(self, request: pb.ListModelFilesRequest, context: Any) -> pb.ListModelFilesResponse:
        model = await self._model(request.name, request.version)
        files = list((await self._manifest(model.manifest, model.manifest_digest)).files)
        if model.HasField("export"):
            exported = c.FileEntry()
            exported.CopyFrom(model.export.file)
            exported.path = "onnx/model.onnx"
            files.append(exported)
        page, more = page_of(files, request.prefix, request.page_size, request.page_token)
        return pb.ListModelFilesResponse(
            files=_links(self._store, "models", page, request.without_urls), version=model.version, next_page_token=more
        )

    async def ExportModel(self, request: pb.ExportModelRequest, context: Any) -> pb.ExportModelResponse:
        who = auth.require("writer")
        model = await self._model(request.name, request.version)
        state, _ = await self._models.load(self._models.key(who.workspace, request.name))
        registered = ev.ModelRegistered()
        registered.CopyFrom(state.version(model.version).registered)
        registered.manifest.CopyFrom(await self._manifest(registered.manifest, registered.manifest_digest))
        event = export.request(request.name, registered, request.spec, who.subject)
        _, sequence = await self._execute(request.name, lambda m: domain.request_export(m, event))
        return pb.ExportModelResponse(export_id=event.export_id, version=model.version, sequence=sequence)


class DatasetService(rpc.DatasetServiceServicer):
    """alveary.registry.v1.DatasetService."""

    def __init__(self, store: ObjectStore, datasets: Aggregates[domain.Dataset], projection: RegistryProjection) -> None:
        self._store, self._datasets, self._view = store, datasets, projection
        self._blobs = Blobs(store, "datasets")

    async def PrepareDataset(self, request: pb.PrepareDatasetRequest, context: Any) -> pb.PrepareDatasetResponse:
        auth.require("writer")
        check_manifest(request.manifest)
        found = await self._blobs.prepare(request.manifest.files, request.doubted)
        return pb.PrepareDatasetResponse(slots=found.slots, pending=found.pending)

    async def RegisterDataset(self, request: pb.RegisterDatasetRequest, context: Any) -> pb.RegisterDatasetResponse:
        who = auth.require("writer")
        _check_name(request.name)
        check_manifest(request.manifest)
        await self._blobs.require(request.manifest.files)
        data = await asyncio.to_thread(manifest_json, request.manifest)
        digest = hashlib.sha256(data).hexdigest()
        await self._blobs.claims.hold([digest])
        await self._store.put("datasets", f"manifests/{digest}.json", data)
        # The manifest is in the object store: a large one would not fit into an event.
        event = ev.DatasetRegistered(
            manifest_digest=digest, description=request.description, tags=request.tags, registered_by=who.subject,
            total_size=sum(f.size for f in request.manifest.files),
        )  # fmt: skip
        event.file_count = len(request.manifest.files)
        key = self._datasets.key(who.workspace, request.name)
        state, sequence = await self._datasets.execute(key, lambda d: domain.register_dataset(d, event))
        await self._view.wait_for(sequence)
        number = next(v.version for v in state.versions if v.manifest_digest == digest)
        return pb.RegisterDatasetResponse(dataset=await self._shown(request.name, number), sequence=sequence)

    async def _shown(self, name: str, version: int) -> pb.DatasetVersion:
        who = auth.require("reader")
        found = await self._view.dataset(who.workspace, name, version)
        if found is None:
            raise NotFound("dataset", name + (f":{version}" if version else ""), "`alveary dataset list` shows those there are")
        return _view(name, *found)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.GetDatasetResponse:
        auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        return pb.GetDatasetResponse(dataset=await self._shown(request.name, request.version))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        who = auth.require("reader")
        rows = await self._view.rows(
            "SELECT name, proto, at FROM datasets WHERE workspace=? AND (?='' OR name=?) ORDER BY name, version DESC",
            (who.workspace, request.name, request.name),
            slow=True,
        )
        return pb.ListDatasetsResponse(datasets=[_view(r["name"], ev.DatasetRegistered.FromString(r["proto"]), r["at"]) for r in rows])

    async def ListDatasetFiles(self, request: pb.ListDatasetFilesRequest, context: Any) -> pb.ListDatasetFilesResponse:
        shown = await self._shown(request.name, request.version)
        manifest = await stored_manifest(self._store, "datasets", shown.manifest_digest)
        page, more = page_of(manifest.files, request.prefix, request.page_size, request.page_token)
        return pb.ListDatasetFilesResponse(files=_links(self._store, "datasets", page, request.without_urls), next_page_token=more)


def _links(store: ObjectStore, bucket: str, files: Sequence[c.FileEntry], bare: bool) -> list[c.FileLink]:
    return [c.FileLink(file=f, url="" if bare else store.get_url(bucket, f"blobs/{f.sha256}")) for f in files]


def _warnings(lineage: ev.Lineage) -> list[str]:
    if lineage.run_state not in (c.RUN_STATE_FAILED, c.RUN_STATE_CANCELED):
        return []
    state = c.RunState.Name(lineage.run_state).removeprefix("RUN_STATE_").capitalize()
    return [f"run {lineage.run_id} had {state}: the model may be what was there when it ended; its lineage says so"]


def _view(name: str, event: ev.DatasetRegistered, at: float) -> pb.DatasetVersion:
    shown = pb.DatasetVersion(
        name=name, version=event.version, description=event.description, tags=event.tags,
        manifest_digest=event.manifest_digest, total_size=event.total_size, registered_by=event.registered_by,
        file_count=event.file_count,
    )  # fmt: skip
    shown.registered_at.FromNanoseconds(int(at * 1e6) * 1000)
    return shown
