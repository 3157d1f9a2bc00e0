"""Logs of runs: tail, read a page, search, store as files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import grpc.aio

from alveary.client.connection import Connection
from alveary_contracts.logs.v1 import logs_pb2

# Streams of which each rank has its own.
_PER_RANK = ("stdout", "stderr", "launcher-stdout", "launcher-stderr")


class Logs:
    """`client.logs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.logs

    async def tail(
        self,
        run_id: str,
        after: int = 0,
        follow: bool = True,
        streams: Sequence[str] = (),
        rank: int | None = None,
        provisional: bool = False,
    ) -> AsyncIterator[logs_pb2.TailLine]:
        """Log lines; reconnects after the last line seen, so that none is missed or seen twice.

        Args:
            after: cursor of the last line that is known already.
            follow: go on until the run is final; else end with the last line there is.
            rank: None: all.
            provisional: also what unfinished lines show; the next line of the same stream, rank and attempt replaces it.
        """
        reconnect = self._connection.reconnect()
        while True:
            try:
                request = logs_pb2.TailRequest(
                    run_id=run_id, after=after, follow=follow, streams=streams, rank=rank, provisional=provisional
                )
                async for reply in self._connection.open_stream(self._stub.Tail, request):
                    reconnect.progress()
                    for line in _without_replaced(reply.lines) if provisional else reply.lines:
                        after = line.cursor
                        yield line
                return
            except grpc.aio.AioRpcError as error:
                await reconnect.failed(error)

    async def read(
        self,
        run_id: str,
        after: int = 0,
        limit: int = 0,
        newest: bool = False,
        streams: Sequence[str] = (),
        rank: int | None = None,
        *,
        before: int = 0,
        since: float | None = None,
        line: int = 0,
    ) -> logs_pb2.ReadResponse:
        """One page of log lines: `limit` (0: 1,000) between the cursors `after` and `before`, or the newest ones of them.

        Args:
            since: begin at the first line that was written then or later, seconds since the epoch.
            line: begin at this line of the log, counted from 1 over all streams and ranks.
        """
        request = logs_pb2.ReadRequest(
            run_id=run_id, after=after, limit=limit, newest=newest, streams=streams, rank=rank, before=before, line=line
        )
        if since is not None:
            request.since.FromMicroseconds(int(since * 1e6))
        reply: logs_pb2.ReadResponse = await self._connection.call(self._stub.Read, request)
        return reply

    async def search(
        self,
        run_id: str,
        text: str,
        *,
        ignore_case: bool = False,
        after: int = 0,
        limit: int = 0,
        streams: Sequence[str] = (),
        rank: int | None = None,
    ) -> logs_pb2.SearchResponse:
        """Log lines that hold `text`, the first `limit` (0: 1,000) after the cursor `after`."""
        request = logs_pb2.SearchRequest(
            run_id=run_id, text=text, ignore_case=ignore_case, after=after, limit=limit, streams=streams, rank=rank
        )
        reply: logs_pb2.SearchResponse = await self._connection.call(self._stub.Search, request)
        return reply

    async def write_files(self, run_id: str, folder: Path) -> list[Path]:
        """The files below `folder` that each stream of a run's log was written to."""
        files: dict[Path, BinaryIO] = {}
        with ExitStack() as opened:
            async for one in self.tail(run_id, follow=False):
                path = folder / _file_name(one.line.stream, one.line.rank)
                if path not in files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[path] = opened.enter_context(path.open("wb"))
                files[path].write(one.line.data + (b"" if one.line.partial else b"\n"))
        return sorted(files)


def _file_name(stream: str, rank: int) -> str:
    name = stream.replace("..", "_").strip("/")
    if name in _PER_RANK or (name.startswith("logs/") and rank):
        name = f"{name}_{rank}"
    return name if "." in name else f"{name}.txt"


def _without_replaced(lines: Sequence[logs_pb2.TailLine]) -> list[logs_pb2.TailLine]:
    """Lines without the provisional ones that a later one of them replaces: nobody needs to see them change."""
    last = {(one.line.stream, one.line.rank, one.line.attempt): one.cursor for one in lines}
    return [one for one in lines if not one.line.provisional or last[one.line.stream, one.line.rank, one.line.attempt] == one.cursor]
