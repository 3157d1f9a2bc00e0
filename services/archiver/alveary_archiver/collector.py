"""Removes from the object store what nothing refers to: mark against the event log, then sweep.

Nothing is removed on incomplete knowledge: an event or manifest that cannot be read, a log that is not the one that was copied,
a server that does not answer end it. Before each batch the events and claims that came meanwhile are read; see
`alveary_core.claims` for why nothing that is about to be referred to can be removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from nats.js.errors import NotFoundError

from alveary_archiver.archiver import SUBJECTS, covered, same_stream
from alveary_archiver.garbage import Doomed, Incomplete, Object, References, digest_of, digests_of, mark, run_of, sweep, sweep_run
from alveary_core import claims, telemetry
from alveary_core.blobs import each
from alveary_core.errors import FailedPrecondition, NotFound, Unavailable
from alveary_core.eventlog import EventLog
from alveary_core.events import STREAM
from alveary_core.manifests import stored_manifest
from alveary_core.objectstore import ObjectStore, Upload

# Buckets of manifests and blobs.
BUCKETS = ("snapshots", "datasets", "models")
GRACE_DAYS, DAY = 7.0, 86400.0
# A claim counts for an hour in the service that made it, an upload may last as long as its link: far more than that.
LEAST_GRACE_DAYS = 2.0
# Objects that are removed at once, under one lock, and what of the lock's time must be left to begin with it, seconds.
_BATCH, _MARGIN = 1000, 300.0
# How long a message of the log is waited for, seconds.
_PATIENCE = 120.0
# Manifests that are read at once.
_READ = 8


@dataclass
class Tally:
    """Objects of one kind."""

    count: int = 0
    size: int = 0


class Collector:
    """One collection. What changed within `grace` seconds stays."""

    def __init__(self, log: EventLog, store: ObjectStore, grace: float) -> None:
        self._log, self._store = log, store
        self._oldest = time.time() - grace
        self._position = 0
        self._references = References()
        # What the claims of the bucket at hand name, which of them were read, and what the manifests that stay name.
        self._claimed: set[bytes] = set()
        self._claims_read: set[str] = set()
        self._named: set[bytes] = set()
        self._manifests_read: set[bytes] = set()
        # By bucket and kind.
        self.tallies: dict[tuple[str, str], Tally] = {}

    async def collect(self, dry_run: bool) -> None:
        """Remove what nothing refers to; with `dry_run` only count it, in `tallies`.

        Raises:
            Incomplete: it is not known what is referred to.
            FailedPrecondition: the log is not the one that was copied, a manifest is damaged, or another collection is under way.
            Unavailable: the log or the object store does not answer.
        """
        try:
            segments = await covered(self._store, STREAM)
            if not segments:
                raise FailedPrecondition("the event log has no second copy, which would tell that it is whole: is the archiver running?")
            await same_stream(self._log, STREAM, self._store, segments)
            await self._read_log()
        except NotFoundError as error:
            raise FailedPrecondition("there is no event log on this message bus") from error
        for bucket in BUCKETS:
            await self._bucket(bucket, dry_run)
        await self._runs(dry_run)

    async def _read_log(self) -> None:
        """Mark what the events refer to that came since it was last done."""
        if await self._log.last_sequence() <= self._position:
            return
        async with contextlib.aclosing(self._log.follow([SUBJECTS[STREAM]], self._position + 1)) as messages:
            while True:
                try:
                    async with asyncio.timeout(_PATIENCE):
                        item = await anext(messages)
                except TimeoutError as error:
                    raise Unavailable(f"the event log stopped at {self._position} and has sent nothing for {_PATIENCE:.0f} s") from error
                if item is None:
                    return
                message, sequence = item
                mark(self._references, message.subject, message.data)
                self._position = sequence

    async def _listing(self, bucket: str, prefix: str = "") -> AsyncIterator[Object]:
        after = ""
        while page := await self._store.page(bucket, prefix, after):
            after = page[-1][0]
            for one in page:
                yield Object(*one)

    def _count(self, bucket: str, doomed: Iterable[Doomed]) -> None:
        for one in doomed:
            tally = self.tallies.setdefault((bucket, one.kind), Tally())
            tally.count, tally.size = tally.count + 1, tally.size + one.size

    # ---- blobs and manifests --------------------------------------------------------------------------------------

    async def _bucket(self, bucket: str, dry_run: bool) -> None:
        self._claimed, self._claims_read, self._named, self._manifests_read = set(), set(), set(), set()
        await self._read_claims(bucket)
        # A manifest that is young may be about to be referred to, as its blobs, however old, are.
        there, young = set[str](), set[str]()
        async for key, _, changed in self._listing(bucket, "manifests/"):
            if digest := digest_of(key):
                there.add(digest)
                if changed >= self._oldest:
                    young.add(digest)
        for (of, digest), who in self._references.required().items():
            if of == bucket and digest not in there:
                raise Incomplete(
                    f"the manifest {digest} of {who} is not in bucket {bucket}, so its files are not known: register or submit the same "
                    "files again, which brings it back, or delete the run"
                )
        await self._read_manifests(bucket, [d for d in there if d in young or self._kept(d)])
        self._references.fresh.clear()
        doomed: list[Doomed] = []
        async for one in self._listing(bucket):
            doomed += sweep((one,), self._kept, self._is_claimed, self._oldest)
        # A manifest without its blobs would pass for a snapshot that is there: it goes before them.
        doomed.sort(key=lambda one: one.kind != "manifests")
        uploads = [u for u in await self._store.uploads(bucket, "") if self._is_over(u)]
        if dry_run:
            self._count(bucket, doomed)
            self._count(bucket, [Doomed(u.key, 0, "unfinished uploads") for u in uploads])
            return
        for begin in range(0, len(doomed), _BATCH):
            await self._remove(bucket, doomed[begin : begin + _BATCH], [])
        for begin in range(0, len(uploads), _BATCH):
            await self._remove(bucket, [], uploads[begin : begin + _BATCH])

    def _is_claimed(self, digest: str) -> bool:
        return bytes.fromhex(digest) in self._claimed

    def _kept(self, digest: str) -> bool:
        binary = bytes.fromhex(digest)
        return binary in self._named or binary in self._claimed or binary in self._references.digests

    def _is_over(self, upload: Upload) -> bool:
        digest = digest_of(upload.key)
        return upload.begun < self._oldest and not (digest and self._is_claimed(digest))

    async def _read_claims(self, bucket: str) -> None:
        """Claims that were not read yet: the content of one never changes; it is only renewed."""
        new = [o.key async for o in self._listing(bucket, claims.PREFIX) if o.changed >= self._oldest and o.key not in self._claims_read]

        async def read(key: str) -> None:
            new = set(digests_of(await self._store.get(bucket, key))) - self._claimed
            self._claimed |= new
            self._references.fresh |= new
            self._claims_read.add(key)

        await each(read, new, _READ)

    async def _read_manifests(self, bucket: str, digests: Iterable[str]) -> None:
        async def read(digest: str) -> None:
            manifest = await stored_manifest(self._store, bucket, digest)
            self._named.update(bytes.fromhex(f.sha256) for f in manifest.files)
            self._named.add(bytes.fromhex(digest))
            self._manifests_read.add(bytes.fromhex(digest))

        await each(read, digests, _READ)

    async def _remove(self, bucket: str, doomed: list[Doomed], uploads: list[Upload]) -> None:
        """Remove a batch but for what was referred to or claimed meanwhile."""
        until = await self._lock(bucket)
        try:
            await self._read_claims(bucket)
            await self._read_log()
            # Manifests that are referred to since keep their blobs. Other digests are no manifests, which is no fault.
            new = [d.hex() for d in self._references.fresh - self._manifests_read]
            there = {digest: await self._store.size(bucket, f"manifests/{digest}.json") for digest in new}
            await self._read_manifests(bucket, [digest for digest, size in there.items() if size is not None])
            self._references.fresh.clear()
            # Of claims themselves, it counts whether they were renewed.
            left = [one for one in doomed if self._goes(one)]
            uploads = [one for one in uploads if self._is_over(one)]
            if time.time() > until - _MARGIN:
                raise Unavailable("what came meanwhile took too long to read: collect again when less is going on")
            await self._store.delete(bucket, [one.key for one in left])
            for upload in uploads:
                await self._store.abort(bucket, upload.key, upload.id)
        finally:
            await self._store.delete(bucket, [claims.LOCK])
        self._count(bucket, left)
        self._count(bucket, [Doomed(u.key, 0, "unfinished uploads") for u in uploads])
        telemetry.logger().info("gc.removed", bucket=bucket, objects=len(left), uploads=len(uploads))

    def _goes(self, one: Doomed) -> bool:
        digest = digest_of(one.key)
        if not digest:
            return one.key not in self._claims_read
        return not (self._is_claimed(digest) if one.key.startswith("incoming/") else self._kept(digest))

    async def _lock(self, bucket: str) -> float:
        """Say that something is being removed; returns until when that counts, seconds since 1970."""
        for _ in range(2):
            until = time.time() + claims.LOCK_SECONDS
            if await self._store.put_new(bucket, claims.LOCK, str(until).encode()):
                return until
            with contextlib.suppress(NotFound):
                held = float(await self._store.get(bucket, claims.LOCK))
                if held > time.time():
                    raise FailedPrecondition(
                        f"another collection is under way in bucket {bucket}; one that was killed is forgotten in {held - time.time():.0f} s"
                    )
                await self._store.delete(bucket, [claims.LOCK])
        raise Unavailable(f"another collection is under way in bucket {bucket}: try again")

    # ---- runs -----------------------------------------------------------------------------------------------------

    async def _runs(self, dry_run: bool) -> None:
        """Objects of runs: named by run and attempt. What is over stays over, so no claims are needed."""
        batch: list[Doomed] = []
        of_run: list[Object] = []
        name = ""
        async for one in self._listing("runs"):
            if (run := run_of(one.key)) != name:
                batch += self._over(name, of_run)
                name, of_run = run, []
                if len(batch) >= _BATCH:
                    await self._remove_of_runs(batch, dry_run)
                    batch = []
            if run:
                of_run.append(one)
        await self._remove_of_runs(batch + self._over(name, of_run), dry_run)
        uploads = [u for u in await self._store.uploads("runs", "") if u.begun < self._oldest and self._ended(run_of(u.key))]
        if not dry_run:
            for upload in uploads:
                await self._store.abort("runs", upload.key, upload.id)
        self._count("runs", [Doomed(u.key, 0, "unfinished uploads") for u in uploads])

    def _over(self, name: str, objects: list[Object]) -> list[Doomed]:
        if not name:
            return []
        references = self._references
        return list(sweep_run(name, references.runs.get(name), name in references.resumed(), objects, self._oldest))

    def _ended(self, name: str) -> bool:
        run = self._references.runs.get(name)
        return run is None or run.final or run.deleted

    async def _remove_of_runs(self, doomed: list[Doomed], dry_run: bool) -> None:
        if dry_run or not doomed:
            self._count("runs", doomed)
            return
        await self._read_log()
        resumed = self._references.resumed()
        # A run that the log did not know, or that no run resumed from, may have come into it.
        left = [
            one for one in doomed
            if (run := run_of(one.key)) not in resumed and (one.kind != "of unknown runs" or run not in self._references.runs)
        ]  # fmt: skip
        await self._store.delete("runs", [one.key for one in left])
        self._count("runs", left)
        telemetry.logger().info("gc.removed", bucket="runs", objects=len(left))


async def collect(log: EventLog, store: ObjectStore, say: Callable[[str], None], *, grace_days: float, dry_run: bool) -> Collector:
    """Collect, and say what went, or would go. Raises what Collector.collect does."""
    collector = Collector(log, store, grace_days * DAY)
    try:
        await collector.collect(dry_run)
    finally:
        for (bucket, kind), tally in sorted(collector.tallies.items()):
            say(f"{bucket:<10} {kind:<32} {tally.count:>9} {tally.size:>16}")
    total = sum(t.count for t in collector.tallies.values()), sum(t.size for t in collector.tallies.values())
    say(f"{total[0]} objects of {total[1]} bytes {'would be' if dry_run else 'were'} removed: nothing refers to them")
    return collector
