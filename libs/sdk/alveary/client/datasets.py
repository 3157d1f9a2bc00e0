"""Datasets: upload, find, list their files."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from alveary import source as sources
from alveary.client.connection import Connection
from alveary.client.listing import list_files, prepare_with
from alveary.transfer import Listing, Progress
from alveary_contracts.registry.v1 import registry_pb2 as reg

# Registering very many files takes a while.
REGISTER_TIMEOUT_SECONDS = 300.0


class Datasets:
    """`client.datasets`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.datasets

    async def upload(
        self,
        folder: Path,
        name: str,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        *,
        verify: bool = False,
        follow_links: bool = False,
    ) -> reg.DatasetVersion:
        """The version that has the content of `folder`: a new one, or the one that has it already.

        Args:
            verify: read again what the platform has of it already, and replace what is damaged.
            follow_links: also links to folders outside of `folder`.
        """
        manifest, paths = await asyncio.to_thread(sources.manifest_of, folder, False, follow_links=follow_links)
        prepare = prepare_with(self._connection, self._stub.PrepareDataset, reg.PrepareDatasetRequest, verify=verify)
        await self._connection.transfers.upload(prepare, manifest, paths, progress)
        request = reg.RegisterDatasetRequest(name=name, manifest=manifest, description=description, tags=tags)
        reply: reg.RegisterDatasetResponse = await self._connection.call(
            self._stub.RegisterDataset, request, timeout=REGISTER_TIMEOUT_SECONDS
        )
        return reply.dataset

    async def get(self, name: str, version: int = 0) -> reg.DatasetVersion:
        """A version of a dataset; 0: the latest."""
        reply: reg.GetDatasetResponse = await self._connection.call(
            self._stub.GetDataset, reg.GetDatasetRequest(name=name, version=version)
        )
        return reply.dataset

    async def list(self, name: str = "") -> builtins.list[reg.DatasetVersion]:
        """Versions of one dataset, or of all, the latest of a name first."""
        reply = await self._connection.call(self._stub.ListDatasets, reg.ListDatasetsRequest(name=name))
        return [*reply.datasets]

    async def files(self, name: str, version: int, prefix: str = "") -> Listing:
        """Files of a version."""
        request = partial(reg.ListDatasetFilesRequest, name=name, version=version, prefix=prefix)
        return await list_files(self._connection, self._stub.ListDatasetFiles, partial(request, without_urls=True), request)
