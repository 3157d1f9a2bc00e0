"""alveary.logs.v1.LogService: tail, pages, search, links."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import nats.errors
from nats.js.errors import NotFoundError

from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM, Key
from alveary_core.objectstore import ObjectStore
from alveary_logs.projection import LogsProjection
from alveary_logs.reader import BUCKET, LogReader, Where
from alveary_logs.wire import LAST_CURSOR, Filter

PAGE, MAX_PAGE = 1000, 10_000
# A search that takes longer returns what it has, seconds.
SEARCH_SECONDS = 10.0


class LogService(rpc.LogServiceServicer):
    """alveary.logs.v1.LogService. Tail yields serialized messages: see `add`."""

    def __init__(self, log: EventLog, store: ObjectStore, view: LogsProjection, reader: LogReader) -> None:
        self._log, self._store, self._view, self._reader = log, store, view, reader

    async def _key(self, run_id: str) -> Key:
        """The log of a run of the caller's workspace."""
        who = auth.require("reader")
        known = await self._view.workspace_of(run_id)
        if known is None:
            # A run that was submitted a moment ago may not be in the view yet.
            try:
                await self._log.js.get_last_msg(STREAM, Key(who.workspace, "run", run_id).subject())
            except NotFoundError as error:
                raise NotFound("run", run_id) from error
            except (nats.errors.Error, TimeoutError, OSError) as error:
                raise Unavailable(f"the event log does not answer: {error or type(error).__name__}; try again") from error
        elif known != who.workspace:
            raise NotFound("run", run_id)
        return Key(who.workspace, "log", run_id)

    async def Tail(self, request: pb.TailRequest, context: Any) -> AsyncIterator[bytes]:  # type: ignore[override]
        where = _between(request.after)
        key = await self._key(request.run_id)
        wanted = replace(_wanted(request), provisional=request.provisional)
        async with contextlib.aclosing(self._reader.blocks(key, wanted, where, request.follow)) as blocks:
            async for block in blocks:
                if block.payload:
                    yield block.payload

    async def Read(self, request: pb.ReadRequest, context: Any) -> pb.ReadResponse:
        limit, where, wanted = _limit(request.limit), _between(request.after, request.before), _wanted(request)
        if request.line < 0 or (request.line and request.HasField("since")):
            raise InvalidArgument(("line", "the number of a line, from 1, and not together with `since`"))
        if request.newest and (request.line or request.HasField("since")):
            raise InvalidArgument(("newest", "not together with `line` or `since`"))
        key = await self._key(request.run_id)
        if request.newest:
            return pb.ReadResponse(lines=await self._reader.newest(key, wanted, where, limit))
        if request.HasField("since"):
            since_us = request.since.seconds * 1_000_000 + request.since.nanos // 1000
            where = Where(await self._reader.ahead_of_time(key, where.after, since_us), where.before)
        elif request.line:
            where = Where(max(await self._reader.ahead_of_line(key, request.line), where.after), where.before)
        lines, following = await self._reader.read(key, wanted, where, limit)
        return pb.ReadResponse(lines=lines, next=following)

    async def Search(self, request: pb.SearchRequest, context: Any) -> pb.SearchResponse:
        if not 1 <= len(request.text) <= 1000:
            raise InvalidArgument(("text", f"{len(request.text)} characters: 1 to 1,000 are looked for"))
        limit, where, wanted = _limit(request.limit), _between(request.after), _wanted(request)
        key = await self._key(request.run_id)
        text = request.text.encode()
        lines, following = await self._reader.search(key, text, request.ignore_case, wanted, where.after, limit, SEARCH_SECONDS)
        return pb.SearchResponse(lines=lines, next=following)

    async def Download(self, request: pb.DownloadRequest, context: Any) -> pb.DownloadResponse:
        key = await self._key(request.run_id)
        state = await self._view.state(key.id)
        if not state.complete:
            raise FailedPrecondition(f"run {request.run_id} is not final yet: its log is not archived; use Tail", f"run/{request.run_id}")
        parts = [
            pb.DownloadPart(
                url=self._store.get_url(BUCKET, part.key), lines=part.lines, size=part.size, sha256=part.sha256,
                framed=bool(part.index_size),
            )
            for part in state.parts if part.lines or len(state.parts) == 1
        ]  # fmt: skip
        return pb.DownloadResponse(url=parts[0].url, lines=sum(p.lines for p in parts), sha256=parts[0].sha256, parts=parts)


def add(service: LogService, server: grpc.aio.Server) -> None:
    """Add the service to a server. What Tail yields is sent as it is."""
    rpc.add_LogServiceServicer_to_server(service, server)
    tail = grpc.unary_stream_rpc_method_handler(service.Tail, request_deserializer=pb.TailRequest.FromString, response_serializer=_as_it_is)
    name = pb.DESCRIPTOR.services_by_name["LogService"].full_name
    server.add_registered_method_handlers(name, {"Tail": tail})


def _as_it_is(message: bytes) -> bytes:
    return message


def _limit(asked: int) -> int:
    if not 0 <= asked <= MAX_PAGE:
        raise InvalidArgument(("limit", f"{asked}: 1 to {MAX_PAGE}"))
    return asked or PAGE


def _between(after: int, before: int = 0) -> Where:
    for name, cursor in (("after", after), ("before", before)):
        if cursor < 0:
            raise InvalidArgument((name, f"{cursor}: a cursor that the service gave, or 0"))
    return Where(after, before or LAST_CURSOR)


def _wanted(request: pb.TailRequest | pb.ReadRequest | pb.SearchRequest) -> Filter:
    return Filter(tuple(sorted(set(request.streams))), request.rank if request.HasField("rank") else None)
