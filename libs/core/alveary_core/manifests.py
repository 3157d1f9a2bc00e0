"""Checks of manifests that come from outside."""

from __future__ import annotations

import re

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import path_problem
from alveary_core.errors import InvalidArgument, ResourceExhausted

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_manifest(manifest: c.Manifest, *, max_files: int = 1_000_000, max_bytes: int = 1 << 50, hint: str = "") -> None:
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
            f"{max_bytes / 1e6:.0f} MB; the largest are {names}. {hint}".strip()
        )
