"""What a script registers: with the lineage of its run, and once however often it is asked."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.registry.v1 import registry_pb2 as pb
from alveary_core import auth
from alveary_core.aggregates import Aggregates
from alveary_core.errors import NotFound
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore
from alveary_registry import domain
from alveary_registry.api import ModelService
from alveary_registry.projection import RegistryProjection

WORKSPACE = "default"


class Registry:
    """The model service on real servers, and a run that it knows."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.view = RegistryProjection(str(folder / "view.sqlite"))
        self.store = ObjectStore(f"127.0.0.1:{layout.ports.s3}", layout.secrets["s3_access"], layout.secrets["s3_secret"])

    async def start(self, layout: Layout) -> None:
        where = f"nats://127.0.0.1:{layout.ports.nats}"
        self.runs = EventLog(await connect(where, "runs", layout.secrets["runs"], "test-runs"), "runs")
        self.log = EventLog(await connect(where, "registry", layout.secrets["registry"], "test-registry"), "registry")
        await ensure_streams(self.log.connection)
        await self.store.ensure_buckets()
        models = Aggregates(self.log, "model", domain.Model, lambda m, event: domain.evolve(m, event.message))
        self.models = ModelService(self.store, models, self.view)
        self.task = asyncio.create_task(self.view.run(self.log))

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        for log in (self.runs, self.log):
            await log.connection.close()
        self.store.close()

    async def blob(self, data: bytes) -> c.Manifest:
        digest = hashlib.sha256(data).hexdigest()
        await self.store.put("models", f"blobs/{digest}", data)
        return c.Manifest(files=[c.FileEntry(path="m.pt", size=len(data), sha256=digest)])


@pytest.fixture
async def registry(bare_servers: Layout, tmp_path: Path) -> AsyncIterator[Registry]:
    made = Registry(bare_servers, tmp_path)
    await made.start(bare_servers)
    token = auth.caller.set(auth.Principal("node", WORKSPACE, "writer"))
    yield made
    auth.caller.reset(token)
    await made.stop()


async def test_a_run_has_one_version_of_a_name_and_content_with_its_lineage(registry: Registry) -> None:
    auth.caller.set(auth.Principal("node", WORKSPACE, "writer"))
    run, name = new_id(), f"m-{new_id()}"
    spec = c.RunSpec(
        experiment="e", snapshot="s" * 64, entry_script="train.py", compute_target="local",
        environment=c.Environment(name="env", pip_packages=["numpy"]), inputs=[c.InputDataset(name="i", dataset="d", version=3)],
    )  # fmt: skip
    await registry.runs.append(Key(WORKSPACE, "run", run), [ev.RunSubmitted(spec=spec, image_digest="d" * 64)], 0)
    one, two = await registry.blob(b"weights"), await registry.blob(b"other weights")
    versions = []
    for manifest, key in ((one, "a"), (one, "b"), (two, "a"), (one, "")):
        request = pb.RegisterModelRequest(name=name, manifest=manifest, run_id=run, idempotency_key=key)
        versions.append((await registry.models.RegisterModel(request, None)).model)
    assert [v.version for v in versions] == [1, 1, 2, 1]
    lineage = versions[0].lineage
    assert (lineage.run_id, lineage.snapshot, lineage.image_digest, lineage.experiment) == (run, "s" * 64, "d" * 64, "e")
    assert list(lineage.datasets) == ["d:3"] and lineage.compute_target == "local"
    found = await registry.models.ListModels(pb.ListModelsRequest(run_id=run), None)
    assert [m.version for m in found.models] == [2, 1]
    (first, *_) = await registry.log.read(Key(WORKSPACE, "model", name))
    assert isinstance(first.message, ev.ModelRegistered)
    assert first.message.environment.pip_packages == ["numpy"] and first.message.entry_script == "train.py"
    # Another run's same content is a version of its own.
    other = new_id()
    await registry.runs.append(Key(WORKSPACE, "run", other), [ev.RunSubmitted(spec=spec)], 0)
    reply = await registry.models.RegisterModel(pb.RegisterModelRequest(name=name, manifest=one, run_id=other), None)
    assert reply.model.version == 3 and reply.model.lineage.run_id == other


async def test_a_run_that_nobody_knows_registers_nothing(registry: Registry) -> None:
    auth.caller.set(auth.Principal("node", WORKSPACE, "writer"))
    request = pb.RegisterModelRequest(name=f"m-{new_id()}", manifest=await registry.blob(b"w"), run_id=new_id())
    with pytest.raises(NotFound, match="run"):
        await registry.models.RegisterModel(request, None)
