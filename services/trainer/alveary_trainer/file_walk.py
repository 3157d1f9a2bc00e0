"""Files that a run leaves, found for storing: what links lead to, under which names, and what is left out. Blocks; runs on threads."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alveary_trainer.adapters.runtime import open_beneath
from alveary_trainer.file_names import shown, stored_name

# Files that are reached through symbolic links, in all.
_MAX_LINKED = 100_000
# Inode, size and times of a file: as long as they stay the same, so does its content.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class FoundFile:
    """A file of ./outputs or ./logs."""

    path: Path
    # Under which it is stored.
    name: str
    # Files that share device and inode are one file under several names.
    device: int
    inode: int
    size: int
    stamp: Stamp


@dataclass
class Walk:
    """The files to store, and a remark on each that is left out or renamed."""

    files: list[FoundFile] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def stamp_of(info: os.stat_result) -> Stamp:
    """What changes with a file's content."""
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def walk(folder: Path, tops: Sequence[str], own: Path, below: Path) -> Walk:
    """Files at or below `folder`/<tops>, named relative to `folder`. Blocks.

    Links are followed to files and folders within `own`. A link that leads elsewhere, a file outside `below`, and anything that
    is not a regular file is left out, with a remark.
    """
    found, names = Walk(), set[str]()
    inside = os.path.realpath(own)
    linked = 0

    def remark(path: str, text: str) -> None:
        found.remarks.append(f"{shown(os.fsencode(os.path.relpath(path, folder)))}: {text}")

    def add(path: str, info: os.stat_result) -> None:
        try:
            with open_beneath(Path(path), below):
                pass
            name, odd = stored_name(os.fsencode(os.path.relpath(path, folder)))
        except (ValueError, OSError) as error:
            remark(path, f"not stored: {getattr(error, 'strerror', None) or error}")
            return
        chosen, tries = name, 1
        while chosen in names:
            tries += 1
            chosen = f"{name}~{tries}"
        names.add(chosen)
        if odd:
            remark(path, f"its name {odd}: stored as {chosen}")
        found.files.append(FoundFile(Path(path), chosen, info.st_dev, info.st_ino, info.st_size, stamp_of(info)))

    todo: list[tuple[str, frozenset[tuple[int, int]], bool]] = [(str(folder / top), frozenset(), False) for top in reversed(tops)]
    while todo:
        where, ancestors, through = todo.pop()
        try:
            here = Path(where).stat()
            if stat.S_ISREG(here.st_mode):
                add(where, here)
                continue
            entries = sorted(os.scandir(where), key=lambda e: e.name)
        except OSError as error:
            if where not in {str(folder / top) for top in tops} or os.path.lexists(where):
                remark(where, f"not stored: {error.strerror}")
            continue
        line = ancestors | {(here.st_dev, here.st_ino)}
        deeper = []
        for entry in entries:
            link = entry.is_symlink()
            try:
                info = Path(entry.path).stat()
            except OSError as error:
                remark(entry.path, f"not stored: {'a link that leads nowhere' if link else error.strerror}")
                continue
            if link and not (real := os.path.realpath(entry.path)).startswith(f"{inside}{os.sep}"):
                remark(entry.path, f"not stored: it leads outside the run's own folders, to {shown(os.fsencode(real))}")
                continue
            if link or through:
                linked += 1
                if linked > _MAX_LINKED:
                    remark(entry.path, f"not stored: more than {_MAX_LINKED:,} files are reached through links")
                    return found
            if stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in line:
                    remark(entry.path, "not stored: it leads back to a folder that it is in")
                else:
                    deeper.append((entry.path, line, link or through))
            elif stat.S_ISREG(info.st_mode):
                add(entry.path, info)
            else:
                remark(entry.path, "not stored: it is no file")
        todo += reversed(deeper)
    return found
