"""Runs: submit, find, watch, end, tag; and what they stored."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from alveary._lazy import LazyModule
from alveary.client.connection import Connection
from alveary.client.states import FINAL
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import is_id, new_id
from alveary_contracts.runs.v1 import runs_pb2 as pb

# A list of runs needs none of these.
if TYPE_CHECKING:
    from alveary import source as sources
    from alveary import transfer
    from alveary.client import listing
else:
    sources = LazyModule("alveary.source")
    transfer = LazyModule("alveary.transfer")
    listing = LazyModule("alveary.client.listing")

_PAGE_SIZE = 1000
Progress = Callable[[int, int], None]


class Runs:
    """`client.runs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.runs

    async def submit(self, spec: c.RunSpec, source: Path | None, progress: Progress | None = None) -> pb.Run:
        """The run of `spec`, after its source directory was uploaded as far as the platform lacks it.

        Ids of other runs in `spec` may be unique prefixes: the service completes them.

        Args:
            source: None: `spec` names a snapshot, or needs none.
            progress: called with bytes done and bytes in all.

        Raises:
            AlvearyError: the source cannot be uploaded, or the platform refuses the run.
        """
        if source is not None:
            spec.snapshot = await self.upload_snapshot(source, progress)
        # The key makes repeating the call harmless.
        request = pb.SubmitRunRequest(spec=spec, idempotency_key=new_id())
        reply: pb.SubmitRunResponse = await self._connection.call(self._stub.SubmitRun, request)
        return reply.run

    async def upload_snapshot(self, source: Path, progress: Progress | None = None) -> str:
        """Digest of a source directory, after it was stored."""
        manifest, paths = await asyncio.to_thread(sources.manifest_of, source, True)

        async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
            request = pb.PrepareSnapshotRequest(manifest=c.Manifest(files=files))
            reply = await self._connection.call(self._stub.PrepareSnapshot, request)
            return reply.slots, reply.pending

        await self._connection.transfers.upload(prepare, manifest, paths, progress)
        reply = await self._connection.call(self._stub.CommitSnapshot, pb.CommitSnapshotRequest(manifest=manifest))
        return str(reply.digest)

    async def get(self, run_id: str, metrics: Sequence[str] = ()) -> pb.Run:
        """A run, by its id or a unique prefix of it, with the newest values of `metrics`; of none: of those that were logged first."""
        request = pb.GetRunRequest(run_id=run_id, metric_names=metrics)
        reply: pb.GetRunResponse = await self._connection.call(self._stub.GetRun, request)
        return reply.run

    async def full_id(self, run_id: str) -> str:
        """The whole id of a run of which a unique prefix is given; a whole id as it is, without asking.

        Raises:
            AlvearyError: no run's id begins so, or several do (the text names them).
        """
        return run_id if is_id(run_id) else (await self.get(run_id)).id

    async def list(self, filter: str = "", order_by: str = "", limit: int = 0, metrics: Sequence[str] = ()) -> builtins.list[pb.Run]:
        """Runs, newest first, with the newest values of `metrics` (of none: of those that were logged first).

        Args:
            filter: as docs/runs.md describes it; empty: all runs.
            order_by: like "metrics.loss desc".
            limit: 0: all.
        """
        found: list[pb.Run] = []
        token = ""
        while True:
            size = min(limit - len(found), _PAGE_SIZE) if limit else _PAGE_SIZE
            request = pb.ListRunsRequest(filter=filter, order_by=order_by, page_size=size, page_token=token, metric_names=metrics)
            reply = await self._connection.call(self._stub.ListRuns, request)
            found += reply.runs
            token = reply.next_page_token
            if not token or (limit and len(found) >= limit):
                return found

    async def watch(self, run_id: str) -> AsyncIterator[pb.Run]:
        """The run now and whenever it changes, to its final state; reconnects as often as needed."""
        seen = 0
        reconnect = self._connection.reconnect()
        while True:
            try:
                stream = self._connection.open_stream(self._stub.WatchRun, pb.WatchRunRequest(run_id=run_id, after_sequence=seen))
                async for reply in stream:
                    seen = reply.run.sequence
                    reconnect.progress()
                    yield reply.run
                    if reply.run.state in FINAL:
                        return
                if (await self.get(run_id)).state in FINAL:
                    return
                await reconnect.pause()
            except grpc.aio.AioRpcError as error:
                await reconnect.failed(error)

    async def wait(self, run_id: str) -> pb.Run:
        """The run in its final state."""
        async for run in self.watch(run_id):
            if run.state in FINAL:
                return run
        return await self.get(run_id)

    async def cancel(self, run_id: str, reason: str = "") -> pb.Run:
        """The run, after its end was requested; it may still be running."""
        reply: pb.CancelRunResponse = await self._connection.call(self._stub.CancelRun, pb.CancelRunRequest(run_id=run_id, reason=reason))
        return reply.run

    async def delete(self, run_id: str, reason: str = "") -> None:
        """Erase a final run and all that belongs to it alone."""
        await self._connection.call(self._stub.DeleteRun, pb.DeleteRunRequest(run_id=run_id, reason=reason))

    async def tag(
        self,
        run_id: str,
        *,
        set: Mapping[str, str] | None = None,
        remove: Sequence[str] = (),
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """Set and remove tags, add properties: those that are there already cannot change."""
        request = pb.TagRunRequest(run_id=run_id, set=set, remove=remove, properties=properties)
        await self._connection.call(self._stub.TagRun, request)

    async def files(self, run_id: str, prefix: str = "") -> transfer.Listing:
        """Files that a run stored whose paths begin with `prefix`."""
        request = partial(pb.ListFilesRequest, run_id=run_id, prefix=prefix)
        return await listing.list_files(self._connection, self._stub.ListFiles, request, partial(request, with_urls=True))

    async def file_links(self, run_id: str, prefix: str = "", with_urls: bool = False) -> Sequence[c.FileLink]:
        """The same files, each with its size and digest; `with_urls`: with a link that is valid for an hour."""
        request = pb.ListFilesRequest(run_id=run_id, prefix=prefix, with_urls=with_urls)
        return [link async for page in self._connection.pages(self._stub.ListFiles, request) for link in page.files]

    async def snapshot_files(self, digest: str) -> transfer.Listing:
        """Files of a snapshot."""

        async def links_after(path: str) -> Sequence[c.FileLink]:
            reply = await self._connection.call(self._stub.GetSnapshot, pb.GetSnapshotRequest(digest=digest))
            return sorted((link for link in reply.files if link.file.path > path), key=lambda link: link.file.path)

        return transfer.Listing([link.file for link in await links_after("")], links_after)
