"""Garbage collection on a real message bus and object store: what goes, what stays, and who may be in between."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alveary_archiver import collector as module
from alveary_archiver.archiver import Archiver
from alveary_archiver.collector import Collector, collect
from alveary_archiver.garbage import Incomplete
from alveary_archiver.segments import pack
from support import servers

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core import claims
from alveary_core.blobs import Blobs
from alveary_core.claims import Claims
from alveary_core.errors import FailedPrecondition, Unavailable
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore
from alveary_runs.snapshots import Snapshots

YEAR = 365 * 86400.0


class Aged(ObjectStore):
    """Shows blobs and manifests as if they were a year old."""

    async def page(self, bucket: str, prefix: str, after: str = "", limit: int = 1000) -> list[tuple[str, int, float]]:
        found = await super().page(bucket, prefix, after, limit)
        return [(k, size, at - YEAR if k.startswith(("blobs/", "manifests/")) else at) for k, size, at in found]


def store_of(layout: Layout, kind: type[ObjectStore] = ObjectStore) -> ObjectStore:
    return kind(f"127.0.0.1:{layout.ports.s3}", layout.secrets["s3_access"], layout.secrets["s3_secret"])


@contextlib.asynccontextmanager
async def logging_as(layout: Layout, user: str) -> AsyncIterator[EventLog]:
    connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", user, layout.secrets[user], user)
    await ensure_streams(connection)
    yield EventLog(connection, user)
    await connection.close()


async def copied(log: EventLog, store: ObjectStore) -> None:
    """Make the second copy of the log."""
    goal = await log.last_sequence()
    archiver = Archiver(log, store, "ALVEARY", linger=0.05)
    task = asyncio.create_task(archiver.run())
    async with asyncio.timeout(60):
        while archiver.position < goal:
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Layout]:
    """Servers of this file's own: a collection without grace must meet nobody else's files."""
    with servers(tmp_path_factory.mktemp("servers")) as found:
        yield found


@pytest.fixture
async def store(layout: Layout) -> AsyncIterator[ObjectStore]:
    opened = store_of(layout)
    await opened.ensure_buckets()
    yield opened
    opened.close()


@pytest.fixture
async def aged(layout: Layout) -> AsyncIterator[ObjectStore]:
    opened = store_of(layout, Aged)
    yield opened
    opened.close()


@pytest.fixture
async def runs(layout: Layout) -> AsyncIterator[EventLog]:
    async with logging_as(layout, "runs") as log:
        yield log


@pytest.fixture
async def log(layout: Layout, runs: EventLog, store: ObjectStore) -> AsyncIterator[EventLog]:
    """As the collection sees it: with a second copy."""
    await runs.append(Key("w", "run", new_id()), [ev.RunTagged(set={"a": "b"})], 0)
    async with logging_as(layout, "archiver") as found:
        await copied(found, store)
        yield found


def entry(text: str) -> c.FileEntry:
    return c.FileEntry(path="f", size=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())


async def stored(store: ObjectStore, bucket: str, *texts: str) -> str:
    """A manifest and its blobs; returns its digest."""
    manifest = c.Manifest(files=[entry(text) for text in texts])
    for number, file in enumerate(manifest.files):
        file.path = str(number)
    for text in texts:
        await store.put(bucket, f"blobs/{entry(text).sha256}", text.encode())
    await store.put(bucket, f"manifests/{manifest_digest(manifest)}.json", manifest_json(manifest))
    return manifest_digest(manifest)


async def everything(store: ObjectStore) -> set[str]:
    buckets = (*module.BUCKETS, "runs")
    return {f"{bucket}/{key}" for bucket in buckets for key in await store.keys(bucket, "")}


async def test_what_nothing_refers_to_goes_and_all_else_stays(layout: Layout, runs: EventLog, log: EventLog, store: ObjectStore) -> None:
    kept, doomed = set[str](), set[str]()

    async def put(where: set[str], bucket: str, key: str, text: str = "x") -> None:
        await store.put(bucket, key, text.encode())
        where.add(f"{bucket}/{key}")

    async def whole(where: set[str], bucket: str, *texts: str) -> str:
        digest = await stored(store, bucket, *texts)
        where.update([f"{bucket}/manifests/{digest}.json", *(f"{bucket}/blobs/{entry(t).sha256}" for t in texts)])
        return digest

    t = new_id()
    source, traced = await whole(kept, "snapshots", f"{t}train", f"{t}shared"), await whole(kept, "snapshots", f"{t}traced")
    await whole(doomed, "snapshots", f"{t}never submitted")
    part = c.Manifest(files=[entry(f"{t}shared")])
    await put(doomed, "snapshots", f"manifests/{manifest_digest(part)}.json", manifest_json(part).decode())
    gone_source = await whole(doomed, "snapshots", f"{t}of a deleted run")
    data = await whole(kept, "datasets", f"{t}row")
    await put(doomed, "datasets", f"blobs/{entry(f'{t}train').sha256}")  # named by a manifest of another bucket alone
    for key in (f"incoming/{entry(t).sha256}", f"damaged/{t}-1", f"probe/{t}"):
        await put(doomed, "datasets", key)
    many = await whole(kept, "models", f"{t}many")
    for name in ("few", "onnx"):
        await put(kept, "models", f"blobs/{entry(t + name).sha256}")
    over, live, deleted, unknown, later = (new_id() for _ in range(5))
    for key in ("2/outputs/m.pt", "2/manifest.json", "log-1-2.binpb.zst", "checkpoints/2.json", f"checkpoints/2/{entry('a').sha256}"):
        await put(kept, "runs", f"{over}/{key}")
    for key in ("1/outputs/m.pt", "1/.gang/0.json", "checkpoints/1.json", f"checkpoints/1/{entry('a').sha256}"):
        await put(doomed, "runs", f"{over}/{key}")
        await put(kept, "runs", f"{live}/{key}")
    for run in (deleted, unknown):
        for key in ("1/outputs/m.pt", "1/manifest.json", "log-1-2.binpb.zst", "checkpoints/1.json"):
            await put(doomed, "runs", f"{run}/{key}")
    await put(kept, "runs", "notes/not-of-a-run")
    uploads = [(bucket, key, await store.begin_upload(bucket, key)) for bucket, key in (
        ("datasets", f"incoming/{entry(t + 'u').sha256}"), ("models", f"blobs/{entry(t + 'u').sha256}"), ("runs", f"{over}/2/x"),
    )]  # fmt: skip
    still = await store.begin_upload("runs", f"{live}/1/x")

    spec = c.RunSpec(snapshot=source, inputs=[c.InputDataset(name="d", dataset="d", version=1, manifest_digest=data)])
    await runs.append(Key("w", "run", over), [ev.RunSubmitted(spec=spec), ev.RunCompleted(attempt=2, manifest_digest=entry(t).sha256)], 0)
    await runs.append(Key("w", "run", live), [ev.RunSubmitted(spec=spec), ev.RunStarted(attempt=1)], 0)
    ended = [ev.RunSubmitted(spec=c.RunSpec(snapshot=gone_source)), ev.RunCompleted(attempt=1), ev.RunDeleted(attempt=1)]
    last = await runs.append(Key("w", "run", deleted), ended, 0)
    await runs.purge(Key("w", "run", deleted), last.sequence)
    async with logging_as(layout, "registry") as registry:
        await registry.append(Key("w", "dataset", t), [ev.DatasetRegistered(version=1, manifest_digest=data)], 0)
        lineage = ev.Lineage(snapshot=traced)
        versions = [
            ev.ModelRegistered(version=1, manifest=c.Manifest(files=[entry(f"{t}few")]), manifest_digest=entry(t).sha256, lineage=lineage),
            ev.ModelExported(version=1, file=entry(f"{t}onnx")), ev.ModelRegistered(version=2, manifest_digest=many),
        ]  # fmt: skip
        await registry.append(Key("w", "model", t), versions, 0)
    before = await everything(store)
    assert kept | doomed <= before

    said: list[str] = []
    counted = await collect(log, store, said.append, grace_days=7, dry_run=True)
    assert not counted.tallies and said == ["0 objects of 0 bytes would be removed: nothing refers to them"]
    counted = await collect(log, store, said.append, grace_days=-1, dry_run=True)
    assert await everything(store) == before and "would be removed" in said[-1]
    removed = await collect(log, store, said.append, grace_days=-1, dry_run=False)
    after = await everything(store)
    assert after & (kept | doomed) == kept
    assert removed.tallies == counted.tallies and "were removed" in said[-1]
    assert removed.tallies["runs", "of unknown runs"].count == 4 and removed.tallies["runs", "outputs of lost attempts"].count == 2
    for bucket, key, upload in uploads:
        assert upload not in {u.id for u in await store.uploads(bucket, key)}
    assert still in {u.id for u in await store.uploads("runs", f"{live}/1/x")}
    # Now somebody begins with what an earlier attempt left.
    await runs.append(Key("w", "run", later), [ev.RunSubmitted(spec=c.RunSpec(snapshot=source, resume_from=live))], 0)
    await runs.append(Key("w", "run", live), [ev.RunFailed(attempt=2)], (await runs.read(Key("w", "run", live)))[-1].sequence)
    await put(kept, "runs", f"{live}/checkpoints/2.json")
    await collect(log, store, said.append, grace_days=-1, dry_run=False)
    assert {k for k in kept if "/checkpoints/" in k} <= await everything(store)
    for of in (Key("w", "run", live), Key("w", "run", later)):
        await runs.append(of, [ev.RunDeleted(attempt=1)], (await runs.read(of))[-1].sequence)
    await collect(log, store, said.append, grace_days=-1, dry_run=False)
    assert not await store.keys("runs", f"{live}/")


async def test_what_is_claimed_while_the_collection_looks_stays(
    log: EventLog, store: ObjectStore, aged: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = new_id()
    digest, unused = await stored(store, "snapshots", f"{t}a", f"{t}b"), await stored(store, "snapshots", f"{t}unused")
    blobs = [entry(f"{t}{n}") for n in ("blob", "other")]
    for n, file in zip(("blob", "other"), blobs, strict=True):
        await store.put("datasets", f"blobs/{file.sha256}", f"{t}{n}".encode())
    locked = Collector._lock

    async def claim_first(self: Collector, bucket: str) -> float:
        if bucket == "snapshots":
            assert await Snapshots(store).hold(digest) is not None
        elif bucket == "datasets":
            assert not (await Blobs(store, bucket).prepare(blobs[:1])).slots
        return await locked(self, bucket)

    monkeypatch.setattr(Collector, "_lock", claim_first)
    await Collector(log, aged, YEAR / 2).collect(False)
    snapshots = Snapshots(store)
    assert await snapshots.hold(digest) is not None and await snapshots.find(unused) is None
    assert [await store.size("datasets", f"blobs/{b.sha256}") for b in blobs] == [blobs[0].size, None]
    await Blobs(store, "snapshots").require([entry(f"{t}a"), entry(f"{t}b")])


async def test_a_remembered_snapshot_that_was_removed_is_stored_again(log: EventLog, store: ObjectStore, aged: ObjectStore) -> None:
    text = new_id()
    digest = await stored(store, "snapshots", text)
    snapshots = Snapshots(store)
    assert await snapshots.find(digest) is not None
    await Collector(log, aged, YEAR / 2).collect(False)
    assert await snapshots.hold(digest) is None
    manifest = c.Manifest(files=[entry(text)])
    manifest.files[0].path = "0"
    found, prepared = await snapshots.prepare(manifest)
    assert (found, [s.sha256 for s in prepared.slots]) == (digest, [entry(text).sha256])


async def test_submissions_beside_collections_lose_nothing(
    runs: EventLog, log: EventLog, store: ObjectStore, aged: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old snapshots are taken up again while they are removed, three objects at a time."""
    monkeypatch.setattr(module, "_BATCH", 3)
    t = new_id()
    texts = [[f"{t}{n}", f"{t}{n // 3} shared"] for n in range(24)]
    for both in texts:
        await stored(store, "snapshots", *both)
    used: list[tuple[str, list[str]]] = []

    async def submit(number: int) -> None:
        snapshots = Snapshots(store)
        both = texts[number]
        manifest = c.Manifest(files=[entry(text) for text in both])
        for index, file in enumerate(manifest.files):
            file.path = str(index)
        digest, prepared = await snapshots.prepare(manifest)
        for slot in prepared.slots:
            text = next(x for x in both if entry(x).sha256 == slot.sha256)
            await store.put("snapshots", f"blobs/{slot.sha256}", text.encode())
        assert await snapshots.commit(manifest) == digest
        assert await snapshots.hold(digest) is not None
        await runs.append(Key("w", "run", new_id()), [ev.RunSubmitted(spec=c.RunSpec(snapshot=digest))], 0)
        used.append((digest, both))

    async def submitting() -> None:
        for number in range(0, len(texts), 2):
            await submit(number)

    await asyncio.gather(Collector(log, aged, YEAR / 2).collect(False), submitting())
    await Collector(log, aged, YEAR / 2).collect(False)
    there = await everything(store)
    assert len(used) == 12
    for digest, both in used:
        assert {f"snapshots/manifests/{digest}.json", *(f"snapshots/blobs/{entry(x).sha256}" for x in both)} <= there
    # And what nobody took up again is gone.
    assert not {f"snapshots/blobs/{entry(both[0]).sha256}" for both in texts[1::2]} & there


async def test_a_claim_waits_while_files_are_removed_and_two_collections_never_meet(
    log: EventLog, store: ObjectStore, aged: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Claims(store, "datasets")
    text = new_id()
    await store.put("datasets", f"blobs/{entry(text).sha256}", text.encode())
    assert await store.put_new("datasets", claims.LOCK, str(time.time() + 500).encode())
    assert not await store.put_new("datasets", claims.LOCK, b"0")
    with pytest.raises(FailedPrecondition, match="another collection is under way"):
        await Collector(log, aged, YEAR / 2).collect(False)
    waiting = asyncio.create_task(mine.hold([text]))
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert not done
    await store.delete("datasets", [claims.LOCK])
    assert await waiting and not await mine.hold([text])
    await store.put("datasets", claims.LOCK, str(time.time() + 500).encode())
    monkeypatch.setattr(claims, "_PATIENCE", 0.0)
    with pytest.raises(Unavailable, match="try again"):
        await mine.hold([f"another {text}"])
    # One that was killed is forgotten.
    await store.put("datasets", claims.LOCK, str(time.time() - 1).encode())
    assert await mine.hold([f"another {text}"])
    await Collector(log, aged, YEAR / 2).collect(False)
    assert await store.size("datasets", claims.LOCK) is None
    assert await store.size("datasets", f"blobs/{entry(text).sha256}") is None


async def test_nothing_goes_where_not_everything_is_known(tmp_path: Path) -> None:
    with servers(tmp_path) as layout:
        store = store_of(layout)
        await store.ensure_buckets()
        text, key, data = new_id(), Key("w", "run", new_id()), Key("w", "dataset", "d")
        await store.put("datasets", f"blobs/{entry(text).sha256}", text.encode())

        async def refused(error: type[Exception], match: str) -> None:
            async with logging_as(layout, "archiver") as log:
                with pytest.raises(error, match=match):
                    await Collector(log, store, -1.0).collect(False)
            assert await store.size("datasets", f"blobs/{entry(text).sha256}") == len(text)

        async with logging_as(layout, "runs") as log, logging_as(layout, "archiver") as copier, logging_as(layout, "registry") as registry:
            await log.append(key, [ev.RunTagged(set={"a": "b"})], 0)
            await refused(FailedPrecondition, "no second copy")
            await copied(copier, store)
            lost = await registry.append(data, [ev.DatasetRegistered(version=1, manifest_digest=entry("lost").sha256)], 0)
            await refused(Incomplete, "of dataset d is not in bucket datasets, so its files are not known")
            await store.put("datasets", f"manifests/{entry('lost').sha256}.json", b"damaged")
            await refused(FailedPrecondition, "damaged")
            await log.purge(data, lost.sequence + 1)
            await log.js.publish("alveary.w.run.x.invented", b"{}")
            await refused(Incomplete, r"does not know the event alveary\.w\.run\.x\.invented")
            # Another log in the place of the one that was copied.
            await log.purge_subject("alveary.>", None)
            segment, packed = pack("ALVEARY", 0, 1000, [])
            await store.put("archive", segment.key, packed)
            await refused(FailedPrecondition, "is not the one that was copied")
        store.close()
