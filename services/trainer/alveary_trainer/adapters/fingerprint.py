"""Whether a folder is still what was put into it, told by its files' sizes and times: without reading them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

# Named at most, of what has changed.
_NAMED = 3


@dataclass(frozen=True)
class Fingerprint:
    """Of all files below a folder, but the byte code that python puts beside a program's modules."""

    digest: str
    files: int
    # The latest time in it, nanoseconds of the epoch.
    newest: int

    @staticmethod
    def of(folder: Path, *, strict: bool) -> Fingerprint:
        """`strict`: with the times of inodes (ctime), which no program can set; not for files that are linked elsewhere too."""
        digest, files, newest = hashlib.sha256(), 0, 0
        for path, found in _walk(folder):
            files += 1
            times = (found.st_mtime_ns, found.st_ctime_ns if strict else 0)
            newest = max(newest, *times)
            digest.update(os.fsencode(f"{path}\0{stat.S_IFMT(found.st_mode)} {found.st_mode & 0o777} {found.st_size} {times}\n"))
        return Fingerprint(digest.hexdigest(), files, newest)

    def save(self, path: Path) -> None:
        """Into a small file."""
        path.write_text(json.dumps([self.digest, self.files, self.newest]))

    @staticmethod
    def load(path: Path) -> Fingerprint | None:
        """What `save` wrote; None: nothing, or only a part of it."""
        try:
            return Fingerprint(*json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Change:
    """What was found of a folder that is not what it was. Paths are relative to it, and the first few alone."""

    files: tuple[str, ...]
    # Whether one of the changed files has other names, under which it has changed too.
    linked: bool
    words: str


def change_of(folder: Path, before: Fingerprint | None, *, strict: bool) -> Change | None:
    """How `folder` differs from what it was; None: it does not."""
    if before is None:
        return Change((), False, "there is no record of what was put into it")
    now = Fingerprint.of(folder, strict=strict)
    if now.digest == before.digest:
        return None
    newer, linked = [], False
    for path, found in _walk(folder):
        if max(found.st_mtime_ns, found.st_ctime_ns if strict else 0) > before.newest:
            newer.append(path)
            linked = linked or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1)
    parts = []
    if newer:
        parts.append(f"{len(newer)} files changed ({', '.join(newer[:_NAMED])}{', ...' if len(newer) > _NAMED else ''})")
    if now.files < before.files:
        parts.append(f"{before.files - now.files} files are missing")
    return Change(tuple(newer[:_NAMED]), linked, " and ".join(parts) or "its files have other sizes, times or modes")


def _walk(folder: Path) -> list[tuple[str, os.stat_result]]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*files, *(f for f in folders if os.path.islink(os.path.join(root, f)))):
            path = os.path.join(root, name)
            found.append((os.path.relpath(path, folder), os.lstat(path)))
    return sorted(found, key=lambda one: one[0])
