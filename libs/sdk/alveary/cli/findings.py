"""What `alveary doctor` finds, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OK, NOTE, WARNING, BROKEN = "ok", "note", "warning", "broken"


@dataclass(frozen=True)
class Finding:
    """One thing about this machine. `advice` says what to do, where there is something to do."""

    check: str
    state: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Patient:
    """What is looked at."""

    state_dir: Path


Check = Callable[[Patient], Iterator[Finding]]
