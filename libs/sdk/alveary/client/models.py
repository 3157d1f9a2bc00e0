"""Models: register versions, find and change them, export them to ONNX."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from alveary import source as sources
from alveary.backoff import Backoff
from alveary.client.connection import CALL_TRIES, Connection
from alveary.client.listing import list_files, prepare_with
from alveary.errors import AlvearyError
from alveary.transfer import Listing, Progress
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import new_id
from alveary_contracts.registry.v1 import registry_pb2 as reg

if TYPE_CHECKING:
    from alveary_contracts.events.v1 import events_pb2 as ev

# Registering very many files takes a while.
REGISTER_TIMEOUT_SECONDS = 300.0
_PAGE_SIZE = 1000


@dataclass(frozen=True)
class ModelInfo:
    """What is said of a model's version when it is registered."""

    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
    framework: str = ""
    framework_version: str = ""
    # "name:version" of those it was made of, beside the inputs of its run.
    datasets: Sequence[str] = ()

    def request(self) -> reg.RegisterModelRequest:
        """The request that registers it, without its files."""
        return reg.RegisterModelRequest(
            name=self.name,
            tags=self.tags,
            properties=self.properties,
            description=self.description,
            framework=self.framework,
            framework_version=self.framework_version,
            datasets=self.datasets,
            idempotency_key=new_id(),
        )


class Models:
    """`client.models`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.models

    async def register_from_run(self, run_id: str, path: str, info: ModelInfo, progress: Progress | None = None) -> reg.ModelVersion:
        """The next version of a model, from `path` among the files that a run stored.

        Args:
            progress: called with files copied and files in all.

        Raises:
            AlvearyError: it is refused, or files could not be copied.
        """
        output = reg.RunOutput(run_id=run_id, path=path)
        left, stalls = -1, 0
        while left:  # each call copies for seconds, so that none takes long
            reply = await self._connection.call(self._stub.PrepareModel, reg.PrepareModelRequest(run_output=output))
            stalls = stalls + 1 if reply.pending == left else 0
            left = reply.pending
            if progress and reply.total:
                progress(reply.total - left, reply.total)
            if stalls == CALL_TRIES:
                raise AlvearyError(f"{left} of {reply.total} files of run {run_id} could not be copied: try again later", "UNAVAILABLE")
        request = info.request()
        request.run_output.CopyFrom(output)
        return await self._register(request)

    async def register_local(
        self,
        path: Path,
        info: ModelInfo,
        environment: c.Environment | None = None,
        progress: Progress | None = None,
        *,
        verify: bool = False,
        follow_links: bool = False,
    ) -> reg.ModelVersion:
        """The next version of a model, from a file or folder of this machine.

        Args:
            environment: in which it can be loaded and exported.
            verify: read again what the platform has of it already, and replace what is damaged.
            follow_links: also links to folders outside of `path`.
        """
        manifest, paths = await asyncio.to_thread(sources.manifest_of, path, False, follow_links=follow_links)
        prepare = prepare_with(self._connection, self._stub.PrepareModel, reg.PrepareModelRequest, verify=verify)
        await self._connection.transfers.upload(prepare, manifest, paths, progress)
        request = info.request()
        request.manifest.CopyFrom(manifest)
        if environment is not None:
            request.environment.CopyFrom(environment)
        return await self._register(request)

    async def _register(self, request: reg.RegisterModelRequest) -> reg.ModelVersion:
        reply: reg.RegisterModelResponse = await self._connection.call(self._stub.RegisterModel, request, timeout=REGISTER_TIMEOUT_SECONDS)
        for text in reply.warnings:
            sources.warn(text)
        return reply.model

    async def get(self, name: str, version: int = 0, alias: str = "") -> reg.ModelVersion:
        """A version of a model; 0: the latest."""
        request = reg.GetModelRequest(name=name, version=version, alias=alias)
        reply: reg.GetModelResponse = await self._connection.call(self._stub.GetModel, request)
        return reply.model

    async def list(
        self, name: str = "", run_id: str = "", tags: Mapping[str, str] | None = None, latest_only: bool = False
    ) -> builtins.list[reg.ModelVersion]:
        """Versions that have all of this, the newest of a name first."""
        request = reg.ListModelsRequest(name=name, run_id=run_id, tags=tags, latest_only=latest_only, page_size=_PAGE_SIZE)
        return [model async for page in self._connection.pages(self._stub.ListModels, request) for model in page.models]

    async def files(self, name: str, version: int, prefix: str = "") -> Listing:
        """Files of a version, its ONNX export among them."""
        request = partial(reg.ListModelFilesRequest, name=name, version=version, prefix=prefix)
        return await list_files(self._connection, self._stub.ListModelFiles, partial(request, without_urls=True), request)

    async def tag(
        self,
        name: str,
        version: int,
        *,
        set: Mapping[str, str] | None = None,
        remove: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> reg.ModelVersion:
        """The version, after its tags, properties and description were changed; properties that are there cannot change."""
        request = reg.TagModelRequest(name=name, version=version, set=set, remove=remove, properties=properties, description=description)
        reply: reg.TagModelResponse = await self._connection.call(self._stub.TagModel, request)
        return reply.model

    async def set_alias(self, name: str, version: int, alias: str) -> None:
        """Point an alias at a version."""
        await self._connection.call(self._stub.SetAlias, reg.SetAliasRequest(name=name, alias=alias, version=version))

    async def archive(self, name: str, version: int) -> None:
        """Hide a version from lists."""
        await self._connection.call(self._stub.ArchiveModel, reg.ArchiveModelRequest(name=name, version=version))

    async def export(self, name: str, version: int, spec: ev.OnnxSpec) -> reg.ExportModelResponse:
        """The id of an ONNX export that has begun."""
        request = reg.ExportModelRequest(name=name, version=version, spec=spec)
        reply: reg.ExportModelResponse = await self._connection.call(self._stub.ExportModel, request)
        return reply

    async def wait_for_export(self, name: str, version: int, export_id: str, timeout: float = 7200.0) -> reg.ModelVersion:
        """The version when its export is over, however it ended.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: not within the time.
        """
        backoff = Backoff(0.05, 1.0, factor=1.5)
        async with asyncio.timeout(timeout):
            while (model := await self.get(name, version)).export_pending == export_id:
                await backoff.pause()
        return model
