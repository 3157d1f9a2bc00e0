"""Checks of manifests that come from outside."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterable

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import manifest_from_json
from alveary_contracts.names import normal_prefix, path_problem
from alveary_core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from alveary_core.objectstore import ObjectStore

_HINT = "Pack small files into archives."
_SHA256 = re.compile(r"[0-9a-f]{64}")


# Of a dataset or model. Beyond that neither file systems nor requests cope well.
MAX_FILES = 250_000


def check_manifest(manifest: c.Manifest, *, max_files: int = MAX_FILES, max_bytes: int = 1 << 50, hint: str = "") -> None:
    """Refuse what could escape a folder, is ambiguous or too large.

    Raises:
        InvalidArgument: with a violation for each bad entry (the first 20).
        ResourceExhausted: too many files or bytes; names the largest.
    """
    violations: list[tuple[str, str]] = []
    paths: set[str] = set()
    for index, file in enumerate(manifest.files):
        field = f"manifest.files[{index}]"
        if problem := path_problem(file.path):
            violations.append((f"{field}.path", problem))
        if file.path in paths:
            violations.append((f"{field}.path", f"{file.path!r} stands twice"))
        paths.add(file.path)
        if not _SHA256.fullmatch(file.sha256):
            violations.append((f"{field}.sha256", "64 lower-case hex digits are needed"))
        if file.size < 0:
            violations.append((f"{field}.size", "cannot be negative"))
    folders = {"/".join(p.split("/")[:n]) for p in paths for n in range(1, p.count("/") + 1)}
    violations += [("manifest.files", f"{p!r} is both a file and a folder") for p in sorted(paths & folders)]
    if not manifest.files:
        violations.append(("manifest.files", "at least one file is needed"))
    if violations:
        raise InvalidArgument(*violations[:20])
    total = sum(f.size for f in manifest.files)
    if len(manifest.files) > max_files or total > max_bytes:
        largest = sorted(manifest.files, key=lambda f: -f.size)[:3]
        names = ", ".join(f"{f.path} ({f.size / 1e6:.1f} MB)" for f in largest)
        raise ResourceExhausted(
            f"{len(manifest.files)} files of {total / 1e6:.1f} MB are more than the limit of {max_files} files and "
            f"{max_bytes / 1e6:.0f} MB; the largest are {names}. {hint or _HINT}"
        )


# Files of one answer.
MAX_PAGE = 10_000


def page_of(files: Iterable[c.FileEntry], prefix: str, size: int, token: str) -> tuple[list[c.FileEntry], str]:
    """Files whose paths begin with `prefix`, `size` (0: MAX_PAGE) of them in order behind `token`; and the next token, empty at the end.

    Raises:
        InvalidArgument: no such size.
    """
    size = size or MAX_PAGE
    if not 1 <= size <= MAX_PAGE:
        raise InvalidArgument(("page_size", f"{size}: 1 to {MAX_PAGE}"))
    begins = normal_prefix(prefix)
    found = sorted((f for f in files if f.path.startswith(begins) and f.path > token), key=lambda f: f.path)
    return found[:size], found[size - 1].path if len(found) > size else ""


async def stored_manifest(store: ObjectStore, bucket: str, digest: str) -> c.Manifest:
    """A manifest of the object store.

    Raises:
        NotFound: there is none.
        FailedPrecondition: it is damaged.
    """
    data = await store.get(bucket, f"manifests/{digest}.json")
    if hashlib.sha256(data).hexdigest() != digest:
        raise FailedPrecondition(f"{bucket}: the manifest {digest} is damaged: its digest is another")
    return await asyncio.to_thread(manifest_from_json, data)
