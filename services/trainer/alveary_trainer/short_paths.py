"""Short paths: that of a Unix socket may have 107 bytes (unix(7)), and state directories and node names have any length.

The platform's own sockets lie in a folder of the node, and the temporary folder of an attempt, in which programs make
sockets of their own, gets a short name: a symbolic link to a folder that stays on the disk of the state directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from alveary_contracts.ids import new_id

# Of sockaddr_un.sun_path, less the zero at its end.
LONGEST = 107
_PREFIX = "alv-"
# Clean-up jobs take what nobody touched for ten days (systemd-tmpfiles) for forgotten.
_TOUCH_SECONDS = 3600.0


def folders() -> Iterator[Path]:
    """Folders with short names for which this user may make files, shortest first."""
    found = [Path("/tmp"), Path("/dev/shm"), Path("/var/tmp")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.insert(1, Path(runtime))
    for folder in found:
        with contextlib.suppress(OSError):  # absent
            mode = folder.stat().st_mode
            if stat.S_ISDIR(mode) and os.access(folder, os.W_OK | os.X_OK) and (not mode & stat.S_IWOTH or mode & stat.S_ISVTX):
                yield folder


def sockets(runs_dir: Path, wanted: Path | None = None) -> Path:
    """A short folder that belongs to the node that holds `runs_dir`: what an earlier life left in it goes.

    `wanted`: the one to use; else the first of the usual ones that will do.

    Raises:
        RuntimeError: there is none; the text says why not.
    """
    name = f"alveary-{os.getuid()}"
    bases = [wanted] if wanted else list(dict.fromkeys([Path(tempfile.gettempdir(), name), *(f / name for f in folders())]))
    why = []
    for base in bases:
        folder = base / hashlib.sha256(str(runs_dir.resolve()).encode()).hexdigest()[:12]
        # <run>-<attempt>.<share>/ranks.sock goes below it.
        if len(str(folder)) > LONGEST - len(f"/{new_id()}-10.1023/ranks.sock"):
            why.append(f"{base} is too long a path for sockets")
            continue
        try:
            base.mkdir(mode=0o711, parents=True, exist_ok=True)
            if base.lstat().st_uid not in (os.getuid(), 0) or base.is_symlink():
                why.append(f"{base} belongs to another user")
                continue
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o711)
        except OSError as error:
            why.append(f"{base}: {error.strerror}")
            continue
        return folder
    raise RuntimeError(f"there is no folder for sockets: {'; '.join(why) or 'no temporary folder is writable'}; set ALVEARY_SOCKETS_DIR")


class ShortLinks:
    """Short names for folders, each until it is removed."""

    def __init__(self, runs_dir: Path) -> None:
        """`runs_dir` is held by this node alone, and holds all folders that get a name."""
        self.runs_dir = runs_dir.resolve()
        self._links: dict[Path, Path] = {}
        self._touched = time.monotonic()

    def make(self, folder: Path) -> Path:
        """A short path to a folder that exists; the folder itself where no short one can be made, or its own is as short."""
        if folder in self._links:
            return self._links[folder]
        for base in folders():
            for _ in range(10):
                link = base / f"{_PREFIX}{secrets.token_hex(4)}"
                if len(str(link)) >= len(str(folder)):
                    return folder
                try:
                    link.symlink_to(folder)
                except FileExistsError:
                    continue
                except OSError:
                    break  # no space or no inodes: the next one
                self._links[folder] = link
                return link
        return folder

    def remove(self, folder: Path) -> None:
        """Forget the name of a folder; nothing where it has none."""
        if (link := self._links.pop(folder, None)) is not None:
            link.unlink(missing_ok=True)

    def touch(self) -> None:
        """Keep the names from looking forgotten; cheap to call often."""
        if time.monotonic() - self._touched < _TOUCH_SECONDS:
            return
        self._touched = time.monotonic()
        for link in list(self._links.values()):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                os.utime(link, follow_symlinks=False)

    def sweep(self) -> None:
        """Remove names that an earlier life of this node left, and this user's that lead nowhere."""
        for base in folders():
            for entry in list(os.scandir(base)):
                if not entry.name.startswith(_PREFIX) or not entry.is_symlink():
                    continue
                with contextlib.suppress(OSError):  # another trainer was faster
                    if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                        continue
                    target = Path(entry.path).readlink()
                    # The folder is there before its name is, and goes before it.
                    if target.is_relative_to(self.runs_dir) or not target.exists():
                        os.unlink(entry.path)
