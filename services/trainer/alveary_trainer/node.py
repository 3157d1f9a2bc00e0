"""Connections, caches and folders of a node, and what scripts ask of the platform through it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import stamina

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.proxies import DIRECT
from alveary_contracts.registry.v1 import registry_pb2, registry_pb2_grpc
from alveary_contracts.runs.v1 import runs_pb2, runs_pb2_grpc
from alveary_core.claims import Claims
from alveary_core.eventlog import EventLog
from alveary_core.objectstore import FileChanged, ObjectStore
from alveary_trainer.adapters.runtime import Runtime, open_beneath
from alveary_trainer.content_cache import ContentCache
from alveary_trainer.file_walk import FoundFile, walk
from alveary_trainer.outputs import each
from alveary_trainer.settings import TrainerSettings

T = TypeVar("T")
# How long what a script asks of the platform is repeated, and one try of it may take, seconds.
_CALL_SECONDS, _TRY_SECONDS = 60.0, 30.0
# What a service that is being restarted, or a proxy before it, answers. All that is asked may be repeated.
_PASSING = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED,
)  # fmt: skip
_WORKERS = 8


class Refused(Exception):
    """The platform said no to what a script asked, or did not answer in time; the text is for the script's author."""


def _passing(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in _PASSING


@dataclass
class NodeContext:
    """Connections, caches and folders of a node."""

    settings: TrainerSettings
    incarnation: str
    log: EventLog
    store: ObjectStore
    runtime: Runtime
    snapshots: ContentCache
    datasets: ContentCache
    models: ContentCache
    runs_dir: Path
    # Holds the sockets of attempts: their paths must be short for the kernel.
    sockets_dir: Path
    # Holds the `alveary` package for training processes.
    runtime_dir: Path
    # A sentence while the node's disk is full, for attempts that fail meanwhile; else empty.
    disk_fault: Callable[[], str] = str
    # By endpoint; they reconnect by themselves.
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._claims = Claims(self.store, "models")

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if not endpoint:
            raise ValueError("this node was started without ALVEARY_ENDPOINT: tags and models need it")
        if endpoint not in self._channels:
            options = [
                ("grpc.max_reconnect_backoff_ms", 1000), ("grpc.max_receive_message_length", 64 << 20),
                ("grpc.max_send_message_length", 64 << 20), *DIRECT,
            ]  # fmt: skip
            if self.settings.endpoint_tls:
                trusted = grpc.ssl_channel_credentials(self.settings.ca.read_bytes() if self.settings.ca else None)
                self._channels[endpoint] = grpc.aio.secure_channel(endpoint, trusted, options=options)
            else:
                self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options=options)
        return self._channels[endpoint]

    async def close(self) -> None:
        """Close the connections that scripts' requests use."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def _call(self, what: str, method: Callable[..., Awaitable[T]], request: object) -> T:
        """One idempotent call, repeated with backoff while the service is away.

        Raises:
            Refused: it said no, or for _CALL_SECONDS seconds nothing.
        """
        metadata = (("authorization", f"Bearer {self.settings.node_token.get_secret_value()}"),)
        try:
            async for attempt in stamina.retry_context(on=_passing, attempts=None, timeout=_CALL_SECONDS, wait_initial=0.1, wait_max=3.0):
                with attempt:
                    return await method(request, metadata=metadata, timeout=_TRY_SECONDS)
        except grpc.aio.AioRpcError as error:
            tried = f" (tried again for {_CALL_SECONDS:.0f} s)" if _passing(error) else ""
            raise Refused(f"{what}: {error.details() or error.code().name}{tried}") from error
        raise AssertionError("unreachable")

    async def tag(self, run_id: str, message: dict[str, Any]) -> None:
        """TagRun on behalf of a script.

        Raises:
            Refused: the platform said no, or did not answer in time.
        """
        request = runs_pb2.TagRunRequest(
            run_id=run_id, set=message.get("set", {}), remove=message.get("remove", []),
            properties=message.get("properties", {}),
        )  # fmt: skip
        await self._call("the run's tags", runs_pb2_grpc.RunServiceStub(self._channel(self.settings.endpoint)).TagRun, request)

    async def register(
        self, run_id: str, path: Path, message: dict[str, Any], own: Path, below: Path, log: Callable[[str], None] = lambda _: None
    ) -> dict[str, Any]:
        """RegisterModel on behalf of a script, with files as they are now; they must lie below `below`.

        Links are followed within `own`. The same content under the same name is one version of a run, however often it is asked
        for. `log` is told what is left out.

        Raises:
            Refused: the platform said no, or did not answer in time.
            ValueError: a file changed meanwhile, or there is none.
        """
        single = path.is_file()
        found = await asyncio.to_thread(walk, path.parent if single else path, (path.name if single else ".",), own, below)
        for text in found.remarks[:20]:
            log(f"model {message['name']}: {text}")
        if not found.files:
            raise ValueError(f"{path.name} has no file that could be stored")
        digested: list[tuple[FoundFile, c.FileEntry]] = []

        async def look(file: FoundFile) -> None:
            digest, size, executable = await asyncio.to_thread(_digested, file.path, below)
            digested.append((file, c.FileEntry(path=file.name, size=size, sha256=digest, executable=executable)))

        async def store(one: tuple[FoundFile, c.FileEntry]) -> None:
            file, entry = one
            key = f"blobs/{entry.sha256}"
            if await self.store.size("models", key) != entry.size:
                with open_beneath(file.path, below) as readable:
                    try:
                        await self.store.put_file("models", key, readable, sha256=entry.sha256)
                    except FileChanged as error:
                        raise ValueError(f"{file.name} changed while it was registered") from error

        await each(found.files, look, _WORKERS)
        # What is there already, and nothing refers to, stays from here on.
        await self._claims.hold([entry.sha256 for _, entry in digested])
        await each(digested, store, _WORKERS)
        manifest = c.Manifest(files=[entry for _, entry in digested])
        request = registry_pb2.RegisterModelRequest(
            name=str(message["name"]), manifest=manifest, description=str(message.get("description") or ""),
            framework=str(message.get("framework") or ""), framework_version=str(message.get("framework_version") or ""),
            tags=message.get("tags") or {}, properties=(message.get("properties") or {}) | {"run_id": run_id}, run_id=run_id,
        )  # fmt: skip
        channel = self._channel(self.settings.registry_endpoint or self.settings.endpoint)
        reply = await self._call(f"model {request.name}", registry_pb2_grpc.ModelServiceStub(channel).RegisterModel, request)
        return {"name": reply.model.name, "version": reply.model.version}


def _digested(path: Path, below: Path) -> tuple[str, int, bool]:
    """Digest and size of a file, and whether it is a program."""
    with open_beneath(path, below) as readable, readable.open("rb") as content:
        info = os.fstat(content.fileno())
        return hashlib.file_digest(content, "sha256").hexdigest(), info.st_size, bool(info.st_mode & 0o100)
