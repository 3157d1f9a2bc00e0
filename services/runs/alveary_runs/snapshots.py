"""Snapshots of source directories: manifests and blobs, content-addressed."""

from __future__ import annotations

from collections import OrderedDict

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_from_json, manifest_json
from alveary_core.blobs import Blobs, Prepared
from alveary_core.errors import InvalidArgument, NotFound
from alveary_core.manifests import check_manifest
from alveary_core.objectstore import ObjectStore

BUCKET = "snapshots"
RUNS_OWN = ("outputs/", "logs/")
MAX_FILES, MAX_BYTES = 2000, 300 * 1000 * 1000
_HINT = "Exclude what the script does not need in .alvearyignore, and upload data as a dataset."


def _check(manifest: c.Manifest) -> None:
    check_manifest(manifest, max_files=MAX_FILES, max_bytes=MAX_BYTES, hint=_HINT)
    # They would be stored as what the run made.
    own = [f.path for f in manifest.files if f.path.startswith(RUNS_OWN)]
    if own:
        raise InvalidArgument(("manifest.files", f"{own[0]!r}: ./outputs and ./logs are a run's own folders: leave them out of its source"))


class Snapshots:
    """Snapshots in the object store. Those used lately are remembered: they never change."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._blobs = Blobs(store, BUCKET)
        self._known: OrderedDict[str, c.Manifest] = OrderedDict()

    async def prepare(self, manifest: c.Manifest) -> tuple[str, Prepared]:
        """Digest of a manifest and where to PUT what is missing.

        Raises:
            InvalidArgument, ResourceExhausted: see check_manifest.
        """
        _check(manifest)
        digest = manifest_digest(manifest)
        if await self.hold(digest) is not None:
            return digest, Prepared([], 0)
        return digest, await self._blobs.prepare(manifest.files)

    async def commit(self, manifest: c.Manifest) -> str:
        """Store a manifest whose blobs are all there; returns its digest.

        Raises:
            FailedPrecondition: some are not.
        """
        _check(manifest)
        digest = manifest_digest(manifest)
        if await self.hold(digest) is None:
            await self._blobs.require(manifest.files)
            await self._store.put(BUCKET, f"manifests/{digest}.json", manifest_json(manifest))
        self._remember(digest, manifest)
        return digest

    async def hold(self, digest: str) -> c.Manifest | None:
        """A committed manifest, which stays until an event refers to it; or None."""
        if await self._blobs.claims.hold([digest]):
            # It may have been removed since it was remembered, as long as it was not claimed.
            self._known.pop(digest, None)
        return await self.find(digest)

    async def find(self, digest: str) -> c.Manifest | None:
        """A committed manifest, or None."""
        if digest in self._known:
            self._known.move_to_end(digest)
            return self._known[digest]
        try:
            data = await self._store.get(BUCKET, f"manifests/{digest}.json")
        except NotFound:
            return None
        manifest = manifest_from_json(data)
        self._remember(digest, manifest)
        return manifest

    def _remember(self, digest: str, manifest: c.Manifest) -> None:
        self._known[digest] = manifest
        while len(self._known) > 256:
            self._known.popitem(last=False)

    def links(self, manifest: c.Manifest) -> list[c.FileLink]:
        """Its files with links to their blobs."""
        return [c.FileLink(file=f, url=self._store.get_url(BUCKET, f"blobs/{f.sha256}")) for f in manifest.files]
