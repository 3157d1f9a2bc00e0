"""Files that are about to be referred to, against the removal of what nothing refers to.

A service that finds a file in the object store, and will append an event that refers to it, claims it first: an object
`claims/<sha256>` of the bucket holds the digests, and its age is the claim's. Then it looks whether something is being removed at
that moment (the object LOCK); if so it waits, and claims again. The collection does the reverse: it puts LOCK, then reads
claims and the newest events, then removes a batch of what none of them names, then takes LOCK away. Whichever came first, one of
the two sees the other, so nothing that was claimed is removed, whatever the clocks say and however long either of them takes. A
claim costs one small object, however many and large the files are.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable

from alveary_core.errors import NotFound, Unavailable
from alveary_core.objectstore import ObjectStore

PREFIX, LOCK = "claims/", "collecting"
# Seconds that LOCK holds after the process that put it was killed.
LOCK_SECONDS = 600.0
# A claim that is older than this many seconds is renewed; so the grace of a collection must be several times as long.
RENEW_SECONDS = 3600.0
_PATIENCE, _REMEMBERED = 20.0, 10_000


def _packed(digests: Iterable[str]) -> tuple[str, bytes]:
    body = "\n".join(sorted(set(digests))).encode()
    return hashlib.sha256(body).hexdigest(), body


class Claims:
    """The claims that one replica of a service makes in a bucket."""

    def __init__(self, store: ObjectStore, bucket: str) -> None:
        self._store, self._bucket = store, bucket
        # When each was made, seconds since 1970: a machine that slept knows that it did.
        self._made: OrderedDict[str, float] = OrderedDict()

    async def hold(self, digests: Iterable[str]) -> bool:
        """Keep the blobs and manifests of these digests for days. What was looked up before counts no more where this says True.

        Returns:
            Whether a claim had to be made; False: this very one was made within the hour.

        Raises:
            Unavailable: files are being removed right now, for longer than a call can wait.
        """
        name, body = await asyncio.to_thread(_packed, digests)
        if not body or 0 <= time.time() - self._made.get(name, 0.0) < RENEW_SECONDS:
            return False
        deadline = time.monotonic() + _PATIENCE
        while True:
            at = time.time()
            await self._store.put(self._bucket, PREFIX + name, body)
            if not await self._collecting():
                break
            while await self._collecting():
                if time.monotonic() > deadline:
                    raise Unavailable(f"unused files of {self._bucket} are being removed at this moment: try again in a few seconds")
                await asyncio.sleep(0.2)
        self._made[name] = at
        self._made.move_to_end(name)
        while len(self._made) > _REMEMBERED:
            self._made.popitem(last=False)
        return True

    async def _collecting(self) -> bool:
        try:
            return float(await self._store.get(self._bucket, LOCK)) > time.time()
        except NotFound:
            return False
