"""Snapshots of source directories: manifests and blobs, content-addressed."""

from __future__ import annotations

from collections import OrderedDict

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_digest, manifest_from_json, manifest_json
from alveary_core.errors import NotFound
from alveary_core.manifests import check_manifest
from alveary_core.objectstore import ObjectStore, missing_blobs, require_blobs

BUCKET = "snapshots"
MAX_FILES, MAX_BYTES = 2000, 300 * 1000 * 1000
_HINT = "Exclude what the script does not need in .alvearyignore, and upload data as a dataset."


class Snapshots:
    """Snapshots in the object store. Those used lately are remembered: they never change."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: OrderedDict[str, c.Manifest] = OrderedDict()

    async def prepare(self, manifest: c.Manifest) -> tuple[str, list[c.UploadSlot]]:
        """Digest of a manifest and where to PUT what is missing.

        Raises:
            InvalidArgument, ResourceExhausted: see check_manifest.
        """
        check_manifest(manifest, max_files=MAX_FILES, max_bytes=MAX_BYTES, hint=_HINT)
        digest = manifest_digest(manifest)
        if await self.find(digest) is not None:
            return digest, []
        missing = await missing_blobs(self._store, BUCKET, manifest.files)
        return digest, [c.UploadSlot(sha256=m, url=self._store.put_url(BUCKET, f"blobs/{m}")) for m in missing]

    async def commit(self, manifest: c.Manifest) -> str:
        """Store a manifest whose blobs are all there; returns its digest.

        Raises:
            FailedPrecondition: some are not.
        """
        check_manifest(manifest, max_files=MAX_FILES, max_bytes=MAX_BYTES, hint=_HINT)
        digest = manifest_digest(manifest)
        if await self.find(digest) is None:
            await require_blobs(self._store, BUCKET, manifest.files)
            await self._store.put(BUCKET, f"manifests/{digest}.json", manifest_json(manifest))
        self._remember(digest, manifest)
        return digest

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
