"""What a script asks of the platform survives its restarts, and happens once."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest
from fakes import MemoryStore
from pydantic import SecretStr

from alveary_contracts.registry.v1 import registry_pb2 as reg
from alveary_contracts.registry.v1 import registry_pb2_grpc
from alveary_contracts.runs.v1 import runs_pb2 as runs
from alveary_contracts.runs.v1 import runs_pb2_grpc
from alveary_trainer import node as nodes
from alveary_trainer.node import NodeContext, Refused
from alveary_trainer.settings import TrainerSettings


class Platform(runs_pb2_grpc.RunServiceServicer, registry_pb2_grpc.ModelServiceServicer):
    """Answers with the given errors first."""

    def __init__(self) -> None:
        self.errors: list[grpc.StatusCode] = []
        self.seen: list[Any] = []

    async def _answer(self, request: Any, context: Any) -> None:
        self.seen.append(request)
        if self.errors:
            await context.abort(self.errors.pop(0), "not now")

    async def TagRun(self, request: Any, context: Any) -> Any:
        await self._answer(request, context)
        return runs.TagRunResponse()

    async def RegisterModel(self, request: Any, context: Any) -> Any:
        await self._answer(request, context)
        return reg.RegisterModelResponse(model=reg.ModelVersion(name=request.name, version=7))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def serve(platform: Platform, port: int) -> grpc.aio.Server:
    server = grpc.aio.server()
    runs_pb2_grpc.add_RunServiceServicer_to_server(platform, server)
    registry_pb2_grpc.add_ModelServiceServicer_to_server(platform, server)
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    await server.start()
    return server


@pytest.fixture
async def context(tmp_path: Path) -> AsyncIterator[NodeContext]:
    settings = TrainerSettings(endpoint=f"127.0.0.1:{free_port()}", node_token=SecretStr("t"))
    unused: Any = SimpleNamespace()
    made = NodeContext(settings, "i", unused, MemoryStore(), unused, unused, unused, unused, tmp_path, tmp_path, tmp_path)  # type: ignore[arg-type]
    yield made
    await made.close()


def port_of(context: NodeContext) -> int:
    return int(context.settings.endpoint.rpartition(":")[2])


async def test_a_service_that_is_away_or_refuses_for_a_moment_is_asked_again(context: NodeContext) -> None:
    platform = Platform()
    platform.errors = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED]
    asking = asyncio.create_task(context.tag("r", {"set": {"a": "b"}}))
    await asyncio.sleep(0.2)  # nobody listens yet
    server = await serve(platform, port_of(context))
    await asyncio.wait_for(asking, 60)
    assert len(platform.seen) == 4 and platform.seen[0].set == {"a": "b"}
    await server.stop(0)


async def test_what_is_refused_or_never_answered_is_said(context: NodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = Platform()
    platform.errors = [grpc.StatusCode.FAILED_PRECONDITION]
    server = await serve(platform, port_of(context))
    with pytest.raises(Refused, match="tags: not now$"):
        await context.tag("r", {"set": {"a": "b"}})
    assert len(platform.seen) == 1
    platform.errors = [grpc.StatusCode.UNAVAILABLE] * 10_000
    monkeypatch.setattr(nodes, "_CALL_SECONDS", 0.5)
    with pytest.raises(Refused, match="not now .tried again for"):
        await context.tag("r", {"set": {"a": "b"}})
    assert len(platform.seen) > 2
    await server.stop(0)


async def test_a_model_is_registered_under_its_run_with_blobs_that_are_stored_once(context: NodeContext, tmp_path: Path) -> None:
    platform, store = Platform(), context.store
    server = await serve(platform, port_of(context))
    folder = tmp_path / "m"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("same")
    (folder / "deep/b").write_text("same")
    (folder / "link").symlink_to("a")
    (folder / "out").symlink_to("/etc")
    remarks: list[str] = []
    for _ in range(2):
        done = await context.register("r", folder, {"name": "m"}, tmp_path, tmp_path, remarks.append)
        assert done == {"name": "m", "version": 7}
    single = await context.register("r", folder / "a", {"name": "m"}, tmp_path, tmp_path)
    assert single["version"] == 7
    digest = hashlib.sha256(b"same").hexdigest()
    blobs = {key: data for key, data in store.objects.items() if not key[1].startswith("claims/")}  # type: ignore[attr-defined]
    assert blobs == {("models", f"blobs/{digest}"): b"same"}
    first, second, third = platform.seen
    assert first.run_id == second.run_id == "r" and first.properties == {"run_id": "r"}
    assert sorted((f.path, f.sha256, f.size) for f in first.manifest.files) == [(p, digest, 4) for p in ("a", "deep/b", "link")]
    assert [f.path for f in third.manifest.files] == ["a"]
    assert any("out: not stored: it leads outside" in text for text in remarks)
    await server.stop(0)


async def test_a_blob_that_was_collected_while_it_was_claimed_is_stored_again(context: NodeContext, tmp_path: Path) -> None:
    store: Any = context.store
    (tmp_path / "m").write_text("weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    blob = ("models", f"blobs/{digest}")
    store.objects[blob] = b"weights"
    original, claimed = store.put, list[bytes]()

    async def put(bucket: str, key: str, data: bytes) -> None:
        await original(bucket, key, data)
        claimed.append(data)
        store.objects.pop(blob, None)

    store.put = put
    server = await serve(Platform(), port_of(context))
    await context.register("r", tmp_path / "m", {"name": "m"}, tmp_path, tmp_path)
    assert claimed == [digest.encode()] and store.objects[blob] == b"weights"
    await server.stop(0)


async def test_a_file_that_changes_while_it_is_registered_leaves_no_wrong_blob(context: NodeContext, tmp_path: Path) -> None:
    store: Any = context.store
    (tmp_path / "m").write_text("before")
    original = store.put_file

    async def put_file(bucket: str, key: str, path: Path, **options: Any) -> Any:
        (tmp_path / "m").write_text("AFTER!")
        return await original(bucket, key, path, **options)

    store.put_file = put_file
    with pytest.raises(ValueError, match="changed while it was registered"):
        await context.register("r", tmp_path / "m", {"name": "m"}, tmp_path, tmp_path)
    assert not [key for _, key in store.objects if key.startswith("blobs/")]
