"""Nodes on which different runs fail in a row take no runs for a while. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class _Record:
    # Runs that failed on the node in a row.
    runs: list[str] = field(default_factory=list)
    # The end of its quarantine; 0: it is in none.
    until: float = 0.0


class Quarantine:
    """Failures by node, and which nodes are in quarantine. Whether one still is depends on the time alone."""

    def __init__(self, max_failures: int = 3, seconds: float = 600.0) -> None:
        self.max_failures = max_failures
        self.seconds = seconds
        self._records: dict[str, _Record] = {}
        # Nodes whose record has changed since somebody cleared this.
        self.changed: set[str] = set()

    def record_node_failure(self, node: str, run: str, now: float) -> bool:
        """An attempt failed for a reason that may be its node's; True: the node is in quarantine from now on."""
        record = self._records.get(node)
        if record is None or 0 < record.until <= now:
            record = self._records[node] = _Record()
        self.changed.add(node)
        if run not in record.runs:
            record.runs.append(run)
        if len(record.runs) < self.max_failures or record.until:
            return False
        record.until = now + self.seconds
        return True

    def clear_failures(self, node: str, now: float) -> None:
        """An attempt on the node succeeded; a quarantine that has begun goes on."""
        record = self._records.get(node)
        if record is None:
            return
        self.changed.add(node)
        if record.until > now:
            record.runs.clear()
        else:
            del self._records[node]

    def forget(self, node: str) -> None:
        """The node is gone."""
        if self._records.pop(node, None) is not None:
            self.changed.add(node)

    def active(self, now: float) -> set[str]:
        """Nodes that are in quarantine at a time."""
        return {node for node, record in self._records.items() if record.until > now}

    def record(self, node: str) -> tuple[tuple[str, ...], float] | None:
        """(runs that failed in a row, end of the quarantine or 0) of a node; None: there is nothing against it."""
        found = self._records.get(node)
        return (tuple(found.runs), found.until) if found else None

    def restore(self, records: Mapping[str, tuple[Sequence[str], float]]) -> None:
        """Set the records of all nodes as `record` gave them."""
        self._records = {node: _Record(list(runs), until) for node, (runs, until) in records.items()}
        self.changed.clear()
