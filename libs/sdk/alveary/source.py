"""Folders as manifests: what is in them, what is left out, what their digests are."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pathspec

from alveary.config import holds_secrets, holds_token
from alveary.errors import AlvearyError, AlvearyWarning
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import path_problem

# The first found decides; all have gitignore's syntax.
IGNORE_FILES = (".alvearyignore", ".amlignore", ".gitignore")
_ALWAYS = (".git/", "__pycache__/", ".ipynb_checkpoints/", ".DS_Store", ".alveary/")
# A run's own folders: of a source they would be stored as what the run made.
_RUNS_OWN = ("/outputs/", "/logs/")
MAX_FILES, MAX_BYTES = 2000, 300 * 1000 * 1000
# Files of a dataset or model.
MOST_FILES = 250_000
# Where counting ends: a source of so many files is too large, however many there are.
_COUNTED = 100_000
_KINDS = {
    stat.S_ISSOCK: "sockets",
    stat.S_ISFIFO: "pipes",
    stat.S_ISBLK: "devices",
    stat.S_ISCHR: "devices",
}


def warn(text: str) -> None:
    """Say something that is no error."""
    warnings.warn(AlvearyWarning(text), stacklevel=2)


def _ignored(folder: Path) -> pathspec.GitIgnoreSpec:
    for name in IGNORE_FILES:
        file = folder / name
        if file.exists():
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise AlvearyError(f"{file} cannot be read: {error}", "INVALID_ARGUMENT") from error
            return pathspec.GitIgnoreSpec.from_lines([*_ALWAYS, *lines])
    return pathspec.GitIgnoreSpec.from_lines(_ALWAYS)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # what is wrong with it is said by stat
        return False


class _Walk:
    """The files of a folder, links to folders followed."""

    def __init__(self, top: Path, snapshot: bool, follow_links: bool) -> None:
        self._top, self._snapshot, self._follow = top, snapshot, follow_links
        self._real = top.resolve()
        self._spec = _ignored(top) if snapshot else pathspec.GitIgnoreSpec.from_lines(())
        # By what was left out, examples of it: said in one sentence.
        self.left_out: dict[str, list[str]] = {}
        self.own: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Path, os.stat_result]]:
        return self._folder(self._top, "", (self._identity(self._top),))

    @staticmethod
    def _identity(folder: Path) -> tuple[int, int]:
        info = folder.stat()
        return info.st_dev, info.st_ino

    def _folder(self, folder: Path, base: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Path, os.stat_result]]:
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda e: e.name)
        except OSError as error:
            raise AlvearyError(
                f"{folder} cannot be read: {error.strerror}. Make it readable, or leave it out", "INVALID_ARGUMENT"
            ) from error
        for entry in entries:
            relative, full = base + entry.name, Path(entry.path)
            shown = relative.encode(errors="surrogateescape").decode(errors="backslashreplace")
            if self._spec.match_file(shown + "/" if _is_folder(entry) else shown):
                continue
            if problem := path_problem(relative):
                raise AlvearyError(f"{self._top}: {problem}", "INVALID_ARGUMENT")
            try:
                info = entry.stat()
            except FileNotFoundError:
                self._odd(relative, "links that lead nowhere" if entry.is_symlink() else "files that vanished")
                continue
            except OSError as error:  # among them links that lead to themselves
                self._odd(relative, f"links that lead nowhere ({error.strerror})")
                continue
            if stat.S_ISDIR(info.st_mode):
                if holds_secrets(full):
                    self._odd(relative, "state directories of a platform, which hold its secrets,")
                    continue
                if self._snapshot and f"/{relative}/" in _RUNS_OWN:
                    if any(full.iterdir()):
                        self.own.append(relative)
                    continue
                identity = (info.st_dev, info.st_ino)
                if entry.is_symlink():
                    self._check_link(full)
                if identity in above:
                    raise AlvearyError(
                        f"{full} leads back to a folder that it is in: remove that link, or leave it out", "INVALID_ARGUMENT"
                    )
                yield from self._folder(full, relative + "/", (*above, identity))
            elif stat.S_ISREG(info.st_mode):
                if holds_token(full):
                    self._odd(relative, "configs with a token of the platform")
                    continue
                yield relative, full, info
            else:
                self._odd(relative, next((kind for test, kind in _KINDS.items() if test(info.st_mode)), "things that are no files"))

    def _check_link(self, full: Path) -> None:
        if self._follow or full.resolve().is_relative_to(self._real):
            return
        how = (
            "Copy what is needed of it, or leave the link out in .alvearyignore" if self._snapshot else "Say follow_links=True to follow it"
        )
        raise AlvearyError(f"{full} is a link to {full.resolve()}, a folder outside of {self._top}. {how}", "INVALID_ARGUMENT")

    def _odd(self, relative: str, what: str) -> None:
        if not self._snapshot:
            raise AlvearyError(
                f"{self._top / relative}: {what} cannot be uploaded: remove it, or upload another folder", "INVALID_ARGUMENT"
            )
        self.left_out.setdefault(what, []).append(relative)


def manifest_of(
    path: Path, snapshot: bool, *, follow_links: bool = False, say: Callable[[str], None] = warn
) -> tuple[c.Manifest, dict[str, Path]]:
    """Manifest of a file or folder, and where each of its files is.

    A snapshot leaves out what the ignore file says, ./outputs and ./logs, and what holds secrets of a platform (state directories,
    configs with a token), and is limited to 300 MB and 2,000 files; secrets in other folders are refused. Links to files
    are followed; links to folders inside `path`, with `follow_links` also others.

    Raises:
        AlvearyError: nothing there, something that cannot be read or stored, or beyond the limits (names the largest files).
    """
    if not path.exists():
        raise AlvearyError(f"{path} does not exist", "NOT_FOUND")
    files: dict[str, Path] = {}
    sizes: dict[str, int] = {}
    if path.is_file():
        if problem := path_problem(path.name):
            raise AlvearyError(problem, "INVALID_ARGUMENT")
        if holds_token(path):
            raise AlvearyError(f"{path} is a config with a token of the platform: it is not uploaded", "INVALID_ARGUMENT")
        files, sizes = {path.name: path}, {path.name: path.stat().st_size}
    elif not path.is_dir():
        raise AlvearyError(f"{path} is neither a file nor a folder", "INVALID_ARGUMENT")
    elif holds_secrets(path):
        raise AlvearyError(f"{path} is the state directory of a platform, and holds its secrets: name another folder", "INVALID_ARGUMENT")
    else:
        walk = _Walk(path, snapshot, follow_links)
        for relative, full, info in walk:
            files[relative], sizes[relative] = full, info.st_size
            if len(files) > (_COUNTED if snapshot else MOST_FILES):
                break
        for name in walk.own:
            say(f"{path}: ./{name} is no part of the source: a run stores its own there")
        for what, names in walk.left_out.items():
            say(f"{path}: {what} are left out: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else ""))
    if not files:
        raise AlvearyError(f"{path} has no files" + (" that its ignore file lets through" if snapshot else ""), "INVALID_ARGUMENT")
    _check_limits(path, snapshot, sizes)
    return _digested(files), files


def _check_limits(path: Path, snapshot: bool, sizes: dict[str, int]) -> None:
    if not snapshot:
        if len(sizes) > MOST_FILES:
            raise AlvearyError(f"{path} has more than {MOST_FILES} files: pack small files into archives", "RESOURCE_EXHAUSTED")
        return
    if len(sizes) <= MAX_FILES and sum(sizes.values()) <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda n: -sizes[n])[:3]
    text = ", ".join(f"{n} ({sizes[n] / 1e6:.1f} MB)" for n in largest)
    count, size = Counter[str](), Counter[str]()
    for name in sizes:
        top = name.partition("/")[0] + "/" if "/" in name else ""
        count[top] += 1
        size[top] += sizes[name]
    folders = ", ".join(f"{t} ({count[t]} files, {size[t] / 1e6:.1f} MB)" for t, _ in count.most_common(3) if t)
    more = "more than " if len(sizes) > _COUNTED else ""
    raise AlvearyError(
        f"{path}: {more}{len(sizes)} files of {sum(sizes.values()) / 1e6:.1f} MB are more than a snapshot may have "
        f"({MAX_FILES} files, {MAX_BYTES / 1e6:.0f} MB); the largest are {text}"
        + (f"; most files are in {folders}" if folders else "")
        + ". Exclude what the script does not need in .alvearyignore, and upload data as a dataset",
        "RESOURCE_EXHAUSTED",
    )


def _digested(files: dict[str, Path]) -> c.Manifest:
    """Read all files, several at once."""

    def entry(item: tuple[str, Path]) -> c.FileEntry:
        name, full = item
        try:
            with full.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                # What was read; a file that changes later is found out when it is uploaded.
                info = os.fstat(file.fileno())
                size = file.tell()
        except OSError as error:
            raise AlvearyError(f"{full} cannot be read: {error.strerror}. Make it readable, or leave it out", "INVALID_ARGUMENT") from error
        return c.FileEntry(path=name, size=size, sha256=digest, executable=bool(info.st_mode & 0o111) and os.access(full, os.X_OK))

    if len(files) < 50:
        return c.Manifest(files=map(entry, files.items()))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="alveary-digest") as pool:
        return c.Manifest(files=pool.map(entry, files.items(), chunksize=1))
