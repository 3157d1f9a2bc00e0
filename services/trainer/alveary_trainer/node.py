"""What all attempts of a node share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.registry.v1 import registry_pb2, registry_pb2_grpc
from alveary_contracts.runs.v1 import runs_pb2, runs_pb2_grpc
from alveary_core.eventlog import EventLog
from alveary_core.objectstore import ObjectStore
from alveary_trainer.adapters.runtime import Runtime, opened
from alveary_trainer.settings import TrainerSettings
from alveary_trainer.staging import ContentCache


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
    # What to say of an attempt that failed by itself while the node's disk is full; empty: it is not.
    disk_fault: Callable[[], str] = str

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if not endpoint:
            raise ValueError("this node was started without ALVEARY_ENDPOINT: tags and models need it")
        if not self.settings.endpoint_tls:
            return grpc.aio.insecure_channel(endpoint)
        trusted = self.settings.ca.read_bytes() if self.settings.ca else None
        return grpc.aio.secure_channel(endpoint, grpc.ssl_channel_credentials(trusted))

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.settings.node_token.get_secret_value()}"),)

    async def tag(self, run_id: str, message: dict[str, Any]) -> None:
        """TagRun on behalf of a script."""
        request = runs_pb2.TagRunRequest(
            run_id=run_id, set=message.get("set", {}), remove=message.get("remove", []),
            properties=message.get("properties", {}),
        )  # fmt: skip
        async with self._channel(self.settings.endpoint) as channel:
            await runs_pb2_grpc.RunServiceStub(channel).TagRun(request, metadata=self._metadata(), timeout=30)

    async def register(self, run_id: str, path: Path, message: dict[str, Any], below: Path) -> dict[str, Any]:
        """RegisterModel on behalf of a script, with files as they are now; they must lie below `below`."""
        files = [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        manifest = c.Manifest()
        for file in files:
            with opened(file, below) as readable:
                with readable.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                entry = await self.store.put_file("models", f"blobs/{digest}", readable, sha256=digest)
            entry.path = file.relative_to(base).as_posix()
            manifest.files.append(entry)
        request = registry_pb2.RegisterModelRequest(
            name=str(message["name"]), manifest=manifest, description=str(message.get("description") or ""),
            tags=message.get("tags") or {}, properties=(message.get("properties") or {}) | {"run_id": run_id},
        )  # fmt: skip
        async with self._channel(self.settings.registry_endpoint or self.settings.endpoint) as channel:
            stub = registry_pb2_grpc.ModelServiceStub(channel)
            reply = await stub.RegisterModel(request, metadata=self._metadata(), timeout=60)
        return {"name": reply.model.name, "version": reply.model.version}
