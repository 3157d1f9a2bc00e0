"""The second copy on real servers: written behind, resumed, merged, verified, restored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alveary_archiver.archiver import Archiver, covered, records, restore, verify
from alveary_archiver.segments import Damaged
from support import servers

from alveary.local.layout import Layout
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core.errors import FailedPrecondition
from alveary_core.eventlog import METRICS, EventLog, connect, ensure_streams
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore


@contextlib.asynccontextmanager
async def opened(layout: Layout, user: str, streams: bool = True) -> AsyncIterator[EventLog]:
    connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", user, layout.secrets[user], user)
    if streams:
        await ensure_streams(connection)
    yield EventLog(connection, user)
    await connection.close()


async def store_of(layout: Layout) -> ObjectStore:
    store = ObjectStore(f"127.0.0.1:{layout.ports.s3}", layout.secrets["s3_access"], layout.secrets["s3_secret"])
    await store.ensure_buckets()
    return store


@contextlib.asynccontextmanager
async def archiving(log: EventLog, store: ObjectStore, stream: str = "ALVEARY", **options: object) -> AsyncIterator[Archiver]:
    archiver = Archiver(log, store, stream, linger=0.1, **options)  # type: ignore[arg-type]
    task = asyncio.create_task(archiver.run())
    yield archiver
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def reaches(archiver: Archiver, sequence: int) -> None:
    async with asyncio.timeout(60):
        while archiver.position < sequence:
            await asyncio.sleep(0.02)


async def test_a_destroyed_stream_is_restored_to_the_sequence(tmp_path: Path) -> None:
    said: list[str] = []
    with servers(tmp_path / "a") as layout:
        store = await store_of(layout)
        async with opened(layout, "runs") as log, opened(layout, "archiver") as copier:
            key, other = Key("w", "run", new_id()), Key("w", "run", new_id())
            first = await log.append(key, [ev.RunTagged(set={"n": str(n)}) for n in range(5)], 0)
            async with archiving(copier, store) as archiver:
                await reaches(archiver, first.sequence)
            # Stopped, and gone on with; an older part is purged meanwhile.
            second = await log.append(other, [ev.RunTagged(set={"ü": "☃"})], 0)
            third = await log.append(key, [ev.RunTagged(set={"n": "last"})], first.sequence)
            await log.purge(key, third.sequence)
            await log.js.publish("alveary-metrics.w.x", b"\x00\xff binary")
            async with archiving(copier, store) as archiver, archiving(copier, store, METRICS) as metrics:
                await reaches(archiver, third.sequence)
                await reaches(metrics, 1)
            await verify(copier, store, "ALVEARY", said.append)
            assert "2 messages are the same, 5 are in the copy alone, 0 are not copied yet" in said[-1]
            kept = [await log.js.get_msg("ALVEARY", seq=n) for n in (second.sequence, third.sequence)]
        with pytest.raises(FailedPrecondition, match="not empty"):
            async with opened(layout, "restore") as target:
                await restore(target, store, said.append)
        store.close()
    # The event log's disk is gone; the object store's is not.
    import shutil

    shutil.rmtree(tmp_path / "a" / "nats")
    with servers(tmp_path / "a") as layout:
        store = await store_of(layout)
        async with opened(layout, "archiver") as copier:
            with pytest.raises(FailedPrecondition, match="restore it"):
                await Archiver(copier, store, "ALVEARY").run()
        async with opened(layout, "restore", streams=False) as target:
            await restore(target, store, said.append)
        async with opened(layout, "runs") as log, opened(layout, "archiver") as copier:
            again = [await log.js.get_msg("ALVEARY", seq=m.seq) for m in kept]
            assert [(m.subject, m.data, m.headers["ce-id"]) for m in again] == [(m.subject, m.data, m.headers["ce-id"]) for m in kept]  # type: ignore[index]
            assert await log.last_sequence() == third.sequence
            point = await log.js.get_msg(METRICS, seq=1)
            assert point.data == b"\x00\xff binary"
            # It goes on: writers find the sequences they knew, and the copy continues where it was.
            fourth = await log.append(key, [ev.RunTagged(set={"n": "after"})], third.sequence)
            async with archiving(copier, store) as archiver:
                await reaches(archiver, fourth.sequence)
            await verify(copier, store, "ALVEARY", said.append)
        store.close()


async def test_small_segments_are_merged_and_damage_is_found(tmp_path: Path) -> None:
    with servers(tmp_path) as layout:
        store = await store_of(layout)
        async with opened(layout, "runs") as log, opened(layout, "archiver") as copier:
            key, last = Key("w", "run", new_id()), 0
            async with archiving(copier, store, merge=4, full=100) as archiver:
                for n in range(9):
                    last = (await log.append(key, [ev.RunTagged(set={"n": str(n)})], last)).sequence
                    await reaches(archiver, last)
            segments = await covered(store, "ALVEARY")
            assert len(segments) < 7 and segments[-1].last == last
            await verify(copier, store, "ALVEARY", lambda _: None)
            await store.put("archive", segments[0].key, b"other bytes")
            with pytest.raises(Damaged, match="not those that were written"):
                await verify(copier, store, "ALVEARY", lambda _: None)
            await store.delete("archive", [segments[0].key])
            if len(segments) > 1:
                with pytest.raises(Damaged, match="gap"):
                    await verify(copier, store, "ALVEARY", lambda _: None)
        store.close()


async def test_a_copy_of_another_format_is_refused(tmp_path: Path) -> None:
    with servers(tmp_path) as layout:
        store = await store_of(layout)
        async with opened(layout, "runs") as log, opened(layout, "archiver") as copier:
            async with archiving(copier, store) as archiver:
                appended = await log.append(Key("w", "run", new_id()), [ev.RunTagged()], 0)
                await reaches(archiver, appended.sequence)
            await verify(copier, store, "ALVEARY", lambda _: None)
            await store.delete("archive", ["format/ALVEARY/1"])
            with pytest.raises(FailedPrecondition, match="format 0, and this version of Alveary reads format 1"):
                await verify(copier, store, "ALVEARY", lambda _: None)
        store.close()


async def test_a_deleted_run_is_erased_from_the_copy_too(tmp_path: Path) -> None:
    with servers(tmp_path) as layout:
        store = await store_of(layout)
        async with opened(layout, "runs") as log, opened(layout, "archiver") as copier:
            gone, kept = Key("w", "run", new_id()), Key("w", "run", new_id())
            await log.append(gone, [ev.RunTagged(set={"secret": "1"})], 0)
            last = (await log.append(kept, [ev.RunTagged(set={"n": "1"})], 0)).sequence
            for key in (gone, kept):
                await log.js.publish(f"alveary-metrics.w.{key.id}", b"points of " + key.id.encode())
            async with archiving(copier, store) as archiver, archiving(copier, store, METRICS) as metrics:
                await reaches(archiver, last)
                await reaches(metrics, 2)
            # A process that begins anew erases what an earlier one copied; late points of the run are not copied any more.
            deleted = (await log.append(gone, [ev.RunDeleted(deleted_by="me")], 1)).sequence
            async with archiving(copier, store, METRICS) as metrics, archiving(copier, store) as archiver:
                archiver.others = [metrics]
                await reaches(archiver, deleted)
                await log.js.publish(f"alveary-metrics.w.{gone.id}", b"late")
                await reaches(metrics, 3)
            await log.purge(gone, deleted)
            found = {s: [r async for r in records(store, await covered(store, s))] for s in ("ALVEARY", METRICS)}
            assert [r.subject for r in found["ALVEARY"]] == [kept.subject("tagged"), gone.subject("deleted")]
            assert [r.data for r in found[METRICS]] == [b"points of " + kept.id.encode()]
            for stream in ("ALVEARY", METRICS):
                assert len(await store.keys("archive", f"{stream}/")) == len(await covered(store, stream))
            async with archiving(copier, store, METRICS) as metrics:  # whose newest segment has nothing left
                last = (await log.js.publish(f"alveary-metrics.w.{kept.id}", b"more")).seq
                await reaches(metrics, last)
            said: list[str] = []
            await verify(copier, store, "ALVEARY", said.append)
            assert "2 messages are the same, 0 are in the copy alone" in said[-1]
        store.close()
