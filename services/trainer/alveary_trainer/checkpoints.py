"""Checkpoints of an attempt: copied away as they appear, found again by the attempts that follow.

Under runs/<run>/checkpoints/: <attempt>/<sha256> are files, <attempt>.json names those that belong together and is
replaced in one go. Each attempt writes its own, so that one which was fenced cannot touch what a later one wrote. Of a
run on several nodes each has its own, <attempt>.<index>; all nodes of the next attempt find what all of them wrote, so
that checkpoints in shards (torch.distributed.checkpoint) are whole. A link from one entry to another (last.ckpt -> e1.ckpt)
is a link again for the next attempt, and keeps what it points at.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alveary_contracts.names import path_problem
from alveary_core.errors import NotFound
from alveary_core.objectstore import FileChanged, ObjectStore
from alveary_trainer.adapters.runtime import StagingFailed, open_beneath

BUCKET = "runs"
_TRIES = 3
_MAX_REMARKS = 20
# Size, time of change, inode.
_Stamp = tuple[int, int, int]


@dataclass
class _Scan:
    """What there is to keep."""

    # Stamps of files, by entry and path.
    entries: dict[str, dict[str, _Stamp]] = field(default_factory=dict)
    # What links point at, by path; both relative to the folder.
    links: dict[str, str] = field(default_factory=dict)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """What one attempt writes into its folder."""

    def __init__(
        self, store: ObjectStore, run_id: str, attempt: int, folder: Path, keep: int, index: int = 0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`keep`: how many of the newest entries of the folder (files, or folders with all that is in them) are kept.

        `index`: which of the run's nodes this is. `log` is told, once, what is not kept.
        """
        self._store, self._folder, self._keep, self._log = store, folder, keep, log
        self._prefix = f"{run_id}/checkpoints/{attempt}" + (f".{index}" if index else "")
        self._seen: dict[str, _Stamp] = {}
        self._sent: dict[str, tuple[_Stamp, str, int]] = {}
        self._named: dict[str, str] = {}
        self._links: dict[str, str] = {}
        self._told: set[str] = set()

    def _scan(self) -> tuple[_Scan, list[str]]:
        """Files of the newest entries and links to them; hidden ones are being written. And remarks on what is left out. Blocks."""
        entries: dict[str, dict[str, _Stamp]] = {}
        links: dict[str, tuple[int, str]] = {}
        remarks = []
        base = os.path.realpath(self._folder)
        for root, folders, names in os.walk(self._folder):
            folders[:] = [f for f in folders if not f.startswith(".")]
            for name in [*names, *(f for f in folders if os.path.islink(os.path.join(root, f)))]:
                path = Path(root, name)
                relative = path.relative_to(self._folder).as_posix()
                # torch.distributed.checkpoint calls the index of its shards .metadata, and renames it into place.
                if name.startswith(".") and name != ".metadata":
                    continue
                if problem := path_problem(relative):
                    remarks.append(f"checkpoint not kept: {problem}")
                    continue
                try:
                    if path.is_symlink():
                        real = os.path.realpath(path)
                        if real.startswith(f"{base}{os.sep}") and Path(real).exists():
                            links[relative] = (path.lstat().st_mtime_ns, os.path.relpath(real, base))
                            continue
                        if os.path.isdir(real):
                            remarks.append(f"checkpoint not kept: {relative} leads to a folder outside ./outputs/checkpoints")
                            continue
                    found = path.stat()
                except OSError:
                    continue  # it went, or leads nowhere yet
                entries.setdefault(relative.partition("/")[0], {})[relative] = (found.st_size, found.st_mtime_ns, found.st_ino)
        newest = sorted(entries, key=lambda e: (max(stamp[1] for stamp in entries[e].values()), e), reverse=True)
        kept: dict[str, set[int]] = {}
        distinct = 0
        for entry in newest:
            inodes = {stamp[2] for stamp in entries[entry].values()}
            # Another name of what is kept already (hard links) takes nobody's place.
            distinct += not any(inodes <= others for others in kept.values())
            if distinct > self._keep:
                break
            kept[entry] = inodes
        chosen: dict[str, str] = {}
        pointed: list[str] = []
        for relative, (_, target) in sorted(links.items(), key=lambda link: link[1], reverse=True):
            top, aim = relative.partition("/")[0], target.partition("/")[0]
            if top in entries and top not in kept:
                continue
            if aim not in kept and aim not in pointed:
                if aim not in entries or len(pointed) >= self._keep:
                    continue
                pointed.append(aim)
            chosen[relative] = target
        return _Scan({e: entries[e] for e in [*kept, *pointed]}, chosen), remarks

    async def sync(self, below: Path, *, last: bool = False) -> int:
        """Copy what is new and has stood still since the last call (`last`: whatever there is); returns files copied.

        An entry that changes meanwhile is left for the next time; what was copied of it before stays.
        """
        scan, remarks = await asyncio.to_thread(self._scan)
        for text in remarks:
            if text not in self._told and len(self._told) < _MAX_REMARKS:
                self._told.add(text)
                self._log(text)
        copied, named = 0, dict[str, str]()
        for files in scan.entries.values():
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
        self._seen = {r: s for files in scan.entries.values() for r, s in files.items()}
        links = self._sound(scan.links, named)
        if named and (named, links) != (self._named, self._links):
            listing = {
                "files": [{"path": r, "sha256": d} for r, d in sorted(named.items())],
                "links": [{"path": r, "target": t} for r, t in sorted(links.items())],
            }
            data = await asyncio.to_thread(lambda: json.dumps(listing).encode())
            await self._store.put(BUCKET, f"{self._prefix}.json", data)
            gone = set(self._named.values()) - set(named.values())
            self._named, self._links = named, links
            await self._store.delete(BUCKET, [f"{self._prefix}/{d}" for d in sorted(gone)])
        return copied

    def _sound(self, links: dict[str, str], named: dict[str, str]) -> dict[str, str]:
        """Links whose targets are stored; one that points at what is being written points where it did before."""
        folders = {parent for path in named for parent in _parents(path)}
        sound = {}
        for relative, target in links.items():
            for aim in (target, self._links.get(relative)):
                if aim is not None and (aim in named or aim in folders):
                    sound[relative] = aim
                    break
        return sound

    async def _copy(self, relative: str, stamp: _Stamp, below: Path) -> str | None:
        try:
            with open_beneath(self._folder / relative, below) as readable:
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
            found, links = await _named(store, prefix)
            if not found:
                break
            try:
                for relative, key, digest in found:
                    if problem := path_problem(relative):
                        raise StagingFailed(f"checkpoints of run {run_id}: {problem}")
                    path = into / relative
                    path.parent.mkdir(parents=True, exist_ok=True)
                    await store.get_file(BUCKET, key, path, digest)
                for relative, target in links.items():
                    _link(into, relative, target, run_id)
                return run_id, attempt, len(found)
            except NotFound as error:  # the attempt still lives, and named newer ones meanwhile
                if not left:
                    raise StagingFailed(f"checkpoints of run {run_id}, attempt {attempt}: {error}") from error
                await asyncio.sleep(1.0)
    return None


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _link(folder: Path, relative: str, target: str, run_id: str) -> None:
    """Make a link between two paths below a folder."""
    for one in (relative, target):
        if problem := path_problem(one):
            raise StagingFailed(f"checkpoints of run {run_id}: {problem}")
    path = folder / relative
    # Of several nodes another one may have stored a file of that name; and nothing is written through a link.
    if not os.path.lexists(path) and not any((folder / parent).is_symlink() for parent in _parents(relative)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(folder / target, path.parent))


async def _named(store: ObjectStore, prefix: str) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """(path, object, digest) of what all members of a gang named, and links; of one path, what the first of them did."""
    listings = {}
    for key in await store.keys(BUCKET, f"{prefix}."):
        name = key.removeprefix(f"{prefix}.")
        if name == "json":
            listings[0] = key
        elif name.endswith(".json") and name.removesuffix(".json").isdigit():
            listings[int(name.removesuffix(".json"))] = key
    found: dict[str, tuple[str, str, str]] = {}
    links: dict[str, str] = {}
    for _, key in sorted(listings.items()):
        try:
            data = await store.get(BUCKET, key)
        except NotFound:
            continue
        listing = await asyncio.to_thread(json.loads, data)
        for file in listing["files"]:
            found.setdefault(file["path"], (file["path"], f"{key.removesuffix('.json')}/{file['sha256']}", file["sha256"]))
        for link in listing.get("links", ()):
            links.setdefault(link["path"], link["target"])
    return list(found.values()), links
