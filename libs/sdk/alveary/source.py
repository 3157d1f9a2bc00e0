"""Folders as manifests: what is in them, what is left out, what their digests are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pathspec

from alveary.errors import AlvearyError
from alveary_contracts.common.v1 import common_pb2 as c

# The first found decides; all have gitignore's syntax.
IGNORE_FILES = (".alvearyignore", ".amlignore", ".gitignore")
_ALWAYS = (".git/", "__pycache__/", ".ipynb_checkpoints/", ".DS_Store")
MAX_FILES, MAX_BYTES = 2000, 300 * 1000 * 1000


def _ignored(folder: Path) -> pathspec.GitIgnoreSpec:
    for name in IGNORE_FILES:
        file = folder / name
        if file.exists():
            return pathspec.GitIgnoreSpec.from_lines([*_ALWAYS, *file.read_text().splitlines()])
    return pathspec.GitIgnoreSpec.from_lines(_ALWAYS)


def manifest_of(path: Path, snapshot: bool) -> tuple[c.Manifest, dict[str, Path]]:
    """Manifest of a file or folder, and where each of its files is.

    A snapshot leaves out what the ignore file says, and is limited to 300 MB and 2,000 files.

    Raises:
        AlvearyError: nothing there, or beyond the limits (names the largest files).
    """
    if not path.exists():
        raise AlvearyError(f"{path} does not exist", "NOT_FOUND")
    if path.is_file():
        files = {path.name: path}
    else:
        spec = _ignored(path) if snapshot else pathspec.GitIgnoreSpec.from_lines(())
        files = {}
        for root, folders, names in os.walk(path):
            base = Path(root).relative_to(path)
            folders[:] = sorted(f for f in folders if not spec.match_file((base / f).as_posix() + "/"))
            for name in sorted(names):
                relative = (base / name).as_posix()
                full = Path(root, name)
                if not spec.match_file(relative) and full.is_file():
                    files[relative] = full
    if not files:
        raise AlvearyError(f"{path} has no files" + (" that its ignore file lets through" if snapshot else ""), "INVALID_ARGUMENT")
    sizes = {name: full.stat().st_size for name, full in files.items()}
    if snapshot and (len(files) > MAX_FILES or sum(sizes.values()) > MAX_BYTES):
        largest = sorted(sizes, key=lambda n: -sizes[n])[:3]
        text = ", ".join(f"{n} ({sizes[n] / 1e6:.1f} MB)" for n in largest)
        raise AlvearyError(
            f"{path}: {len(files)} files of {sum(sizes.values()) / 1e6:.1f} MB are more than a snapshot may have "
            f"({MAX_FILES} files, {MAX_BYTES / 1e6:.0f} MB); the largest are {text}. Exclude what the script does not need in "
            ".alvearyignore, and upload data as a dataset", "RESOURCE_EXHAUSTED",
        )  # fmt: skip
    manifest = c.Manifest()
    for name, full in files.items():
        with full.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest.files.append(c.FileEntry(path=name, size=sizes[name], sha256=digest, executable=os.access(full, os.X_OK)))
    return manifest, files
