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

    def reserve(self, run: str, nodes: frozenset[str]) -> None:
        """Keep nodes for a run, and for no other; no nodes end the reservation."""
        self.current = Reservation(run, nodes) if nodes else None

    def drop_run(self, run: str) -> None:
        """The run no longer waits."""
        if self.current is not None and self.current.run == run:
            self.current = None

    def drop_node(self, node: str) -> None:
        """A node is gone or takes nothing more: a reservation that includes it is void."""
        if self.current is not None and node in self.current.nodes:
            self.current = None
