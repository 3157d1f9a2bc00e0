"""Where nodes come from: one port, an adapter for each kind of target."""

from __future__ import annotations

from collections.abc import Mapping

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_scheduler.core.resources import Shape
from alveary_scheduler.state import TargetKey


class NodeProvider:
    """Starts and ends the nodes of one kind of target. As it is, it does neither: machines join by themselves."""

    # Whether it has nodes of its own that a count scales, rather than groups for single runs or nodes that join.
    scales = False

    async def tend(self, targets: Mapping[TargetKey, ev.ComputeSpec], leaving: set[str]) -> None:
        """Keep alive what is wanted for these targets, which are all of the kind. Call it twice a second.

        Nodes that have ended and are `leaving` are taken out of it, and not started again.
        """

    def wanted(self, key: TargetKey) -> list[str]:
        """Nodes of a target that run or are being started."""
        return []

    def scale_up(self, key: TargetKey, spec: ev.ComputeSpec, count: int) -> None:
        """Start nodes until there are `count`."""

    def provision_group(self, key: TargetKey, run: str, shape: Shape, count: int, spread: bool) -> None:
        """Start a group of nodes for a run; asking twice is asking once."""

    def release_group(self, key: TargetKey, run: str) -> None:
        """Give up the group of a run."""

    def coming(self, key: TargetKey, joined: set[str]) -> Mapping[str, int]:
        """Runs whose groups are to bring nodes that have not joined, and how many."""
        return {}

    def trouble(self, key: TargetKey) -> str:
        """Why no nodes can be had for a target; empty: they can."""
        return ""

    def left(self, node: str) -> None:
        """A node has said that it ends."""

    def lost(self, node: str) -> None:
        """A node is silent: end what is left of it, so that it makes room."""

    async def close(self) -> None:
        """Release what the provider holds; nodes go on."""
