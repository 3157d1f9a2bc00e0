"""How values look in tables and sheets: times, durations, sizes, numbers, ids."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

# A run's id begins with its millisecond; two more characters part those of one millisecond, mostly.
_SHORTEST_ID = 12


class Cell:
    """A value that people see one way (`str`) and programs, in a pipe, another (`piped`)."""

    def __init__(self, text: str, piped: Any) -> None:
        self.text, self.piped = text, "" if piped is None else str(piped)

    def __str__(self) -> str:
        return self.text


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """First characters of each id: at least twelve, and as many as part it from the others."""
    size = _SHORTEST_ID
    wanted = set(ids)
    while len({i[:size] for i in wanted}) < len(wanted):
        size += 1
    return {i: i[:size] for i in wanted}


def seconds_of(stamp: Any) -> float:
    """Seconds since 1970 of a protobuf Timestamp; 0 where it is unset."""
    return float(stamp.seconds + stamp.nanos / 1e9)


def moment(stamp: Any) -> Cell:
    """How long ago a protobuf Timestamp is; in a pipe its time, as ISO 8601 in UTC."""
    if not stamp.seconds:
        return Cell("", None)
    return Cell(ago(stamp), stamp.ToDatetime().isoformat(timespec="milliseconds") + "Z")


def ago(stamp: Any) -> str:
    """How long ago a protobuf Timestamp is, in the largest unit of which it has one."""
    seconds = int(time.time() - stamp.seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{max(seconds, 0)} s ago"


def when(stamp: Any) -> str:
    """A protobuf Timestamp in this machine's time zone, and how long ago that is; empty where it is unset."""
    if not stamp.seconds:
        return ""
    return f"{datetime.fromtimestamp(seconds_of(stamp)).astimezone():%Y-%m-%d %H:%M:%S %z} ({ago(stamp)})"


def duration(seconds: float) -> str:
    """Like 0.4s, 12s, 3m20s, 2h05m, 3d04h."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def took(run: Any) -> Cell:
    """How long a run ran, or runs; in a pipe in seconds."""
    began, ended = seconds_of(run.started_at), seconds_of(run.ended_at)
    if not began:
        return Cell("", None)
    seconds = max((ended or time.time()) - began, 0.0)
    return Cell(duration(seconds), f"{seconds:.3f}")


def number(value: float | None) -> Cell:
    """A metric: four digits for people, all of them in a pipe; empty where there is none."""
    if value is None:
        return Cell("", None)
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return Cell(f"{value:.0f}", repr(value))
    return Cell(f"{value:.4g}", repr(value))


def plural(count: float, what: str) -> str:
    """Like "1 file", "3 files", "0.5 GPUs"."""
    return f"{count:g} {what}{'' if count == 1 else 's'}"


def size(count: int) -> Cell:
    """Bytes: in the unit that fits; in a pipe as they are."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return Cell(f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}", count)
        amount /= 1000
    return Cell(f"{amount:.1f} TB", count)
