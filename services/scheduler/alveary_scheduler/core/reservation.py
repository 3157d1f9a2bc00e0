"""Nodes kept for the first request that does not fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reservation:
    """Nodes that are kept for a run until it starts: what runs on them ends, so that its turn comes."""

    run: str
    nodes: frozenset[str]


class ReservationBook:
    """The one reservation of a target."""

    def __init__(self) -> None:
        self.current: Reservation | None = None
        # Whether it has changed since somebody cleared this.
        self.changed = False

    def set(self, reservation: Reservation | None) -> None:
        """Replace the reservation."""
        self.changed = self.changed or reservation != self.current
        self.current = reservation

    def restore(self, reservation: Reservation | None) -> None:
        """Set it as it was."""
        self.current = reservation
        self.changed = False

    def drop_run(self, run: str) -> None:
        """The run no longer waits."""
        if self.current is not None and self.current.run == run:
            self.set(None)

    def drop_node(self, node: str) -> None:
        """A node is gone or takes nothing more: a reservation that includes it is void."""
        if self.current is not None and node in self.current.nodes:
            self.set(None)
