"""How far the services of a starting stack have read the event log."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def positions(folder: Path) -> dict[str, int]:
    """By read model of the services in `folder`: the sequence of the event log that it includes. One that cannot be read is left out."""
    found = {}
    for file in sorted(folder.glob("*.sqlite")):
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=0.5)) as db:
            row = db.execute("SELECT sequence FROM position").fetchone()
            found[file.stem] = int(row[0]) if row else 0
    return found


def slowest(known: dict[str, int]) -> str:
    """A clause for people: which read model is furthest behind."""
    if not known:
        return "no read model exists yet"
    name = min(known, key=lambda n: known[n])
    return f"the read model of {name} is at event {known[name]}" + (f", the furthest at {max(known.values())}" if len(known) > 1 else "")
