"""The trainers' folder on a host, as the user that they run as needs it: `python -m alveary_trainer.folders PATH`, as root."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# deploy/Dockerfile's user.
USER = 10001


def prepare(folder: Path) -> None:
    """Make PATH, PATH/trainer (state) and PATH/s (sockets): passable for all, listed by their owner alone."""
    for path in (folder, folder / "trainer", folder / "s"):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, USER, USER)
        path.chmod(0o711)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
