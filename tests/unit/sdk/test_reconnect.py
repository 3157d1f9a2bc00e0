"""A stream that breaks is opened again, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from alveary.aio import Client
from alveary.config import Config
from alveary.errors import AlvearyError
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc


class Breaks(runs_pb2_grpc.RunServiceServicer):
    """WatchRun that answers `replies` times and then ends with `code`, each time."""

    def __init__(self, code: grpc.StatusCode, replies: int = 0, text: str = "it broke", most: int = 0) -> None:
        self.code, self.replies, self.text, self.most, self.calls = code, replies, text, most, 0

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        self.calls += 1
        if self.calls == self.most:
            yield pb.WatchRunResponse(run=pb.Run(id="r", sequence=self.calls, state=c.RUN_STATE_COMPLETED))
            return
        if self.replies:
            self.replies -= 1
            yield pb.WatchRunResponse(run=pb.Run(id="r", sequence=self.calls))
        await context.abort(self.code, self.text)


async def watched(servicer: Breaks) -> list[int]:
    server = grpc.aio.server()
    runs_pb2_grpc.add_RunServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = Client(Config(endpoint=f"127.0.0.1:{port}", token="t", workspace="w"))
    try:
        return [run.sequence async for run in client.runs.watch("r")]
    finally:
        await client.close()
        await server.stop(0)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_a_fault_that_comes_each_time_is_the_callers_error(code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []
    real = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds: (slept.append(seconds), real(0))[1])
    servicer = Breaks(code)
    with pytest.raises(AlvearyError, match="it broke"):
        await watched(servicer)
    assert servicer.calls == 5 and slept == [0.1, 0.2, 0.4, 0.8]


async def test_replies_in_between_start_the_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds: real(0))
    servicer = Breaks(grpc.StatusCode.INTERNAL, replies=12)
    with pytest.raises(AlvearyError, match="it broke"):
        await watched(servicer)
    assert servicer.calls == 12 + 5 - 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
async def test_a_stream_that_a_proxy_tears_is_opened_again_until_the_service_is_back(
    code: grpc.StatusCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds: real(0))
    servicer = Breaks(code, text="Stream removed (Data frame with END_STREAM flag received)", most=20)
    assert await watched(servicer) == [20]
