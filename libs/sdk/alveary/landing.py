"""Where downloads land: in a folder beside their places, until all of them are whole; then each takes its place, or none does."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from alveary.errors import AlvearyError
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import path_problem

_CHUNK = 1 << 20
_SHOWN = 5


@dataclass(frozen=True)
class Wanted:
    """A file, and its place below the folder."""

    file: c.FileEntry
    place: str


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Piece:
    """A file as it comes; what came of it before is gone on with."""

    def __init__(self, path: Path, file: c.FileEntry) -> None:
        self.path, self._file, self.size = path, file, 0
        self._sha256 = hashlib.sha256()
        self._opened: BinaryIO | None = None
        if path.exists():
            with path.open("rb") as before:
                while chunk := before.read(_CHUNK):
                    self._sha256.update(chunk)
                    self.size += len(chunk)
            if self.size > file.size or not file.sha256:
                self.restart()

    def write(self, data: bytes) -> None:
        """Append."""
        if self._opened is None:
            self._opened = self.path.open("ab")
        try:
            self._opened.write(data)
        except OSError as error:
            raise _failed(self.path.parent.parent, error) from error
        self._sha256.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        """Of what came."""
        return self._sha256.hexdigest()

    def restart(self) -> None:
        """Start again with an empty file."""
        self._close()
        self.path.unlink(missing_ok=True)
        self._sha256, self.size = hashlib.sha256(), 0

    def _close(self) -> None:
        if self._opened is not None:
            opened, self._opened = self._opened, None
            try:
                opened.close()
            except OSError as error:
                raise _failed(self.path.parent.parent, error) from error

    def whole(self) -> bool:
        """Close it; whether it is what it should be."""
        self._close()
        self.path.touch()
        return not self._file.sha256 or self.digest == self._file.sha256


class Landing:
    """The place of one download. `open`, write the pieces, `settle`; always `close`."""

    def __init__(self, folder: Path, wanted: Sequence[Wanted], overwrite: bool) -> None:
        self._folder, self._wanted, self._overwrite = folder, wanted, overwrite
        names = hashlib.sha256("\n".join(f"{w.file.sha256} {w.place}" for w in wanted).encode())
        self._staging = folder / f".alveary-{names.hexdigest()[:16]}.part"
        self._lock: int | None = None
        self._made: list[Path] = []
        self._missing: list[Wanted] = []
        self._settled = False

    def open(self) -> list[Wanted]:
        """Look at what is there; returns what is not.

        Raises:
            AlvearyError: a name leads elsewhere, something is in the way, or there is no space.
        """
        for one in self._wanted:
            if problem := path_problem(one.file.path):
                raise AlvearyError(f"nothing was downloaded: {problem}", "DATA_LOSS")
        try:
            self._missing = self._look()
            if not self._missing:
                return []
            self._make(self._folder)
            self._make(self._staging)
            self._lock = _locked(self._staging)
        except OSError as error:
            raise _failed(self._folder, error) from error
        if self._lock is None:
            raise AlvearyError(f"another download of the same files into {self._folder} is under way: wait for it", "ABORTED")
        self._check_case()
        there = sum(f.stat().st_size for f in self._staging.iterdir())
        needed = sum(w.file.size for w in self._missing) - there
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise AlvearyError(
                f"{self._folder} has {free / 1e6:.0f} MB of space left, and {needed / 1e6:.0f} MB are to be downloaded",
                "RESOURCE_EXHAUSTED",
            )
        return self._missing

    def _look(self) -> list[Wanted]:
        missing, taken = [], []
        for one in self._wanted:
            place = self._folder / one.place
            for parent in (p for p in [*place.parents][::-1] if p.is_relative_to(self._folder)):
                if parent.exists() and not parent.is_dir():
                    raise AlvearyError(f"nothing was downloaded: {parent} is a file, where a folder is needed", "ALREADY_EXISTS")
            if place.is_dir():
                raise AlvearyError(f"nothing was downloaded: {place} is a folder, where a file is needed", "ALREADY_EXISTS")
            if not place.exists() and not place.is_symlink():
                missing.append(one)
            elif not (one.file.sha256 and place.is_file() and place.stat().st_size == one.file.size and _digest(place) == one.file.sha256):
                missing.append(one)
                taken.append(place)
        if taken and not self._overwrite:
            names = ", ".join(str(p) for p in taken[:_SHOWN]) + (f" and {len(taken) - _SHOWN} more" if len(taken) > _SHOWN else "")
            raise AlvearyError(
                f"nothing was downloaded: other files are there already: {names}. Choose another folder, or say overwrite=True (--overwrite)",
                "ALREADY_EXISTS",
            )
        return missing

    def _check_case(self) -> None:
        """On file systems that do not tell them apart, names that differ in case alone would be one file."""
        probe = self._staging / "Case"
        probe.touch()
        alike = (self._staging / "cASE").exists()
        probe.unlink()
        if alike:
            seen: dict[str, str] = {}
            for one in self._wanted:
                other = seen.setdefault(one.place.casefold(), one.place)
                if other != one.place:
                    raise AlvearyError(
                        f"nothing was downloaded: {other!r} and {one.place!r} are the same file on the file system of {self._folder}",
                        "FAILED_PRECONDITION",
                    )

    def _make(self, folder: Path) -> None:
        for parent in [*[*folder.parents][::-1], folder]:
            if not parent.is_dir():
                parent.mkdir(exist_ok=True)
                self._made.append(parent)

    def piece(self, file: c.FileEntry) -> Piece:
        """Where a file is written, and what is there of it."""
        name = hashlib.sha256(file.path.encode()).hexdigest()[:32]
        return Piece(self._staging / f"{name}-{file.sha256[:16]}", file)

    def settle(self) -> None:
        """Move everything to its place. A failure moves back what was moved."""
        done: list[tuple[Path, Path]] = []
        try:
            for one in self._missing:
                self._make((self._folder / one.place).parent)
            for index, one in enumerate(self._missing):
                piece, place = self.piece_path(one.file), self._folder / one.place
                if one.file.executable:
                    piece.chmod(piece.stat().st_mode | 0o111)
                if place.exists() or place.is_symlink():
                    if not self._overwrite:
                        raise AlvearyError(f"nothing was downloaded: {place} came into being meanwhile", "ALREADY_EXISTS")
                    old = self._staging / f"old-{index}"
                    place.rename(old)
                    done.append((old, place))
                piece.rename(place)
                done.append((place, piece))
        except BaseException as error:
            for now, before in reversed(done):
                now.rename(before)
            if isinstance(error, OSError):
                raise _failed(self._folder, error) from error
            raise
        self._settled = True

    def piece_path(self, file: c.FileEntry) -> Path:
        """Where a file is written."""
        return self._staging / f"{hashlib.sha256(file.path.encode()).hexdigest()[:32]}-{file.sha256[:16]}"

    def close(self) -> None:
        """Take away what is of no use. What came of a download that failed stays, for the next one."""
        if self._lock is not None:
            if self._settled or not any(f.stat().st_size for f in self._staging.iterdir()):
                shutil.rmtree(self._staging)
            os.close(self._lock)
        if not self._settled:
            for folder in reversed(self._made):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _locked(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed; None: another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl
    except ImportError:  # a system without: two downloads of the same into the same folder are the user's to avoid
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _failed(folder: Path, error: OSError) -> AlvearyError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return AlvearyError(f"{folder} has no space left: what came is kept, and the same call goes on with it", "RESOURCE_EXHAUSTED")
    return AlvearyError(
        f"files cannot be stored in {folder}: {error.strerror or error}: {error.filename or ''}".rstrip(": "), "FAILED_PRECONDITION"
    )
