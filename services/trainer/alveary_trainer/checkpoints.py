"""Checkpoints of an attempt: copied away as they appear, found again by the attempts that follow.

Under runs/<run>/checkpoints/: <attempt>/<sha256> are files, <attempt>.json names those that belong together and is
replaced in one go. Each attempt writes its own, so that one which was fenced cannot touch what a later one wrote. Of a
run on several nodes each has its own, <attempt>.<share>; all nodes of the next attempt find what all of them wrote, so
that checkpoints in shards (torch.distributed.checkpoint) are whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from alveary_contracts.names import path_problem
from alveary_core.errors import NotFound
from alveary_core.objectstore import FileChanged, ObjectStore
from alveary_trainer.adapters.runtime import StagingFailed, opened

BUCKET = "runs"
_TRIES = 3
_Stamp = tuple[int, int, int]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """What one attempt writes into its folder."""

    def __init__(self, store: ObjectStore, run_id: str, attempt: int, folder: Path, keep: int, share: int = 0) -> None:
        """`keep`: how many of the newest entries of the folder (files, or folders with all that is in them) are kept.

        `share`: which of the run's nodes this is.
        """
        self._store, self._folder, self._keep = store, folder, keep
        self._prefix = f"{run_id}/checkpoints/{attempt}" + (f".{share}" if share else "")
        self._seen: dict[str, _Stamp] = {}
        self._sent: dict[str, tuple[_Stamp, str, int]] = {}
        self._named: dict[str, str] = {}

    def _scan(self) -> dict[str, dict[str, _Stamp]]:
        """Stamps (size, time of change, inode) of the files of the newest entries, by entry; hidden ones are being written."""
        entries: dict[str, dict[str, _Stamp]] = {}
        for root, folders, names in os.walk(self._folder):
            folders[:] = [f for f in folders if not f.startswith(".")]
            for name in names:
                path = Path(root, name)
                relative = path.relative_to(self._folder).as_posix()
                # torch.distributed.checkpoint calls the index of its shards .metadata, and renames it into place.
                if (name.startswith(".") and name != ".metadata") or path_problem(relative):
                    continue
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue
                entries.setdefault(relative.partition("/")[0], {})[relative] = (found.st_size, found.st_mtime_ns, found.st_ino)
        newest = sorted(entries, key=lambda e: (max(stamp[1] for stamp in entries[e].values()), e), reverse=True)
        return {e: entries[e] for e in newest[: self._keep]}

    async def sync(self, below: Path, *, last: bool = False) -> int:
        """Copy what is new and has stood still since the last call (`last`: whatever there is); returns files copied.

        An entry that changes meanwhile is left for the next time; what was copied of it before stays.
        """
        entries = await asyncio.to_thread(self._scan)
        copied, named = 0, dict[str, str]()
        for files in entries.values():
            whole: dict[str, str] = {}
            for relative, stamp in files.items():
                sent = self._sent.get(relative)
                if sent is not None and sent[0] == stamp:
                    whole[relative] = sent[1]
                elif last or self._seen.get(relative) == stamp:
                    digest = await self._copy(relative, stamp, below)
                    if digest is None:
                        break
                    whole[relative] = digest
                    copied += 1
                else:
                    break
            if len(whole) == len(files):
                named |= whole
            else:  # it is being written: as it was
                named |= {r: d for r, d in self._named.items() if r in files}
        self._seen = {r: s for files in entries.values() for r, s in files.items()}
        if named and named != self._named:
            listing = [{"path": r, "sha256": d} for r, d in sorted(named.items())]
            await self._store.put(BUCKET, f"{self._prefix}.json", json.dumps({"files": listing}).encode())
            gone = set(self._named.values()) - set(named.values())
            self._named = named
            await self._store.delete(BUCKET, [f"{self._prefix}/{d}" for d in sorted(gone)])
        return copied

    async def _copy(self, relative: str, stamp: _Stamp, below: Path) -> str | None:
        try:
            with opened(self._folder / relative, below) as readable:
                digest = await asyncio.to_thread(_digest, readable)
                if digest not in self._named.values():
                    await self._store.put_file(BUCKET, f"{self._prefix}/{digest}", readable, sha256=digest)
                found = readable.stat()
        except (FileNotFoundError, ValueError, FileChanged):
            return None
        if (found.st_size, found.st_mtime_ns, found.st_ino) != stamp:
            return None
        self._sent[relative] = (stamp, digest, found.st_size)
        return digest


async def fetch(store: ObjectStore, sources: Sequence[tuple[str, int]], into: Path) -> tuple[str, int, int] | None:
    """Put the checkpoints of the first of the (run, attempt) that has any into a folder; returns its run, attempt, files.

    Raises:
        StagingFailed: they are named, but not there.
        DigestMismatch: one is damaged.
    """
    for run_id, attempt in sources:
        prefix = f"{run_id}/checkpoints/{attempt}"
        for left in reversed(range(_TRIES)):
            found = await _named(store, prefix)
            if not found:
                break
            try:
                for relative, key, digest in found:
                    if problem := path_problem(relative):
                        raise StagingFailed(f"checkpoints of run {run_id}: {problem}")
                    path = into / relative
                    path.parent.mkdir(parents=True, exist_ok=True)
                    await store.get_file(BUCKET, key, path, digest)
                return run_id, attempt, len(found)
            except NotFound as error:  # the attempt still lives, and named newer ones meanwhile
                if not left:
                    raise StagingFailed(f"checkpoints of run {run_id}, attempt {attempt}: {error}") from error
                await asyncio.sleep(1.0)
    return None


async def _named(store: ObjectStore, prefix: str) -> list[tuple[str, str, str]]:
    """(path, object, digest) of what all shares of an attempt named; of one path, what the first of them did."""
    shares = {}
    for key in await store.keys(BUCKET, f"{prefix}."):
        name = key.removeprefix(f"{prefix}.")
        if name == "json":
            shares[0] = key
        elif name.endswith(".json") and name.removesuffix(".json").isdigit():
            shares[int(name.removesuffix(".json"))] = key
    found: dict[str, tuple[str, str, str]] = {}
    for _, key in sorted(shares.items()):
        try:
            listing = json.loads(await store.get(BUCKET, key))
        except NotFound:
            continue
        for file in listing["files"]:
            found.setdefault(file["path"], (file["path"], f"{key.removesuffix('.json')}/{file['sha256']}", file["sha256"]))
    return list(found.values())
