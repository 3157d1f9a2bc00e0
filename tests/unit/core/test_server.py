"""What surrounds a call, on a server of its own without the rest of the platform."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc as rpc
from alveary_core import auth, server
from alveary_core.disk import Disk, DiskGuard
from alveary_core.errors import Unavailable

SECRET = "a secret of at least thirty-two bytes"


class Stuck(rpc.RunServiceServicer):
    """Writes nothing, as on a full disk: one call waits, one fails, and a third has links that lead nowhere."""

    async def PrepareSnapshot(self, request: pb.PrepareSnapshotRequest, context: Any) -> pb.PrepareSnapshotResponse:
        if request.manifest.files:
            return pb.PrepareSnapshotResponse(slots=[c.UploadSlot()])
        await asyncio.sleep(60)
        return pb.PrepareSnapshotResponse()

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        raise Unavailable("the object store does not answer")

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse()


@pytest.fixture
async def stuck(tmp_path: Path) -> AsyncIterator[tuple[rpc.RunServiceAsyncStub, server.Server]]:
    made = server.Server(SECRET)
    rpc.add_RunServiceServicer_to_server(Stuck(), made.server)
    port = await made.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.RunServiceStub(channel), made  # type: ignore[misc]
    await made.stop(0)


def metadata() -> tuple[tuple[str, str], ...]:
    return (("authorization", "Bearer " + auth.issue(SECRET, auth.Principal("me", "default", "owner"))),)


class Full(DiskGuard):
    """Of a disk with `free` bytes."""

    free = 0

    async def look(self) -> Disk:
        return Disk(self._path, 1000, self.free, self._bytes)


FILE = c.FileEntry(path="a", sha256="0" * 64, size=1)


async def test_calls_that_a_full_disk_holds_up_say_so_before_the_caller_stops_waiting(
    stuck: tuple[rpc.RunServiceAsyncStub, server.Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, made = stuck
    monkeypatch.setattr(server, "_PATIENCE_OF_UPLOADS", 0.1)
    made.interceptor.disk = Full(tmp_path, 100, 1.0)
    calls = (
        stub.PrepareSnapshot(pb.PrepareSnapshotRequest(), metadata=metadata()),
        stub.PrepareSnapshot(pb.PrepareSnapshotRequest(manifest=c.Manifest(files=[FILE])), metadata=metadata()),
        stub.CancelRun(pb.CancelRunRequest(run_id="a" * 12), metadata=metadata()),
    )
    for call, what in zip(calls, ("this upload is refused",) * 2 + ("CancelRun did not get done",), strict=True):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (caught.value.details() or "").startswith(f"{what}: less than ")
    # What writes nothing goes on.
    await stub.GetRun(pb.GetRunRequest(run_id="a" * 12), metadata=metadata())


async def test_what_is_worth_repeating_stays_so_while_there_is_some_space(
    stuck: tuple[rpc.RunServiceAsyncStub, server.Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub, made = stuck
    monkeypatch.setattr(Full, "free", 70)
    made.interceptor.disk = Full(tmp_path, 100, 1.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CancelRun(pb.CancelRunRequest(run_id="a" * 12), metadata=metadata())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_with_space_left_the_reason_is_another(stuck: tuple[rpc.RunServiceAsyncStub, server.Server], tmp_path: Path) -> None:
    stub, made = stuck
    made.interceptor.disk = DiskGuard(tmp_path, 1, 1.0)
    reply = await stub.PrepareSnapshot(pb.PrepareSnapshotRequest(manifest=c.Manifest(files=[FILE])), metadata=metadata())
    assert reply.slots
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CancelRun(pb.CancelRunRequest(run_id="a" * 12), metadata=metadata())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
