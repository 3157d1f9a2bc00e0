"""The nodes of one target, what is free on them, and which runs are on them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from copy import deepcopy

from alveary_scheduler.core.cluster import Cluster
from alveary_scheduler.core.packing import Policy
from alveary_scheduler.core.requests import AllocatedNode, Kind, Request
from alveary_scheduler.core.resources import Machine, Shape

_NOBODY: Mapping[str, None] = {}


class NodeInventory:
    """What is so (`cluster`), and beside it a copy to plan on.

    A plan places runs on the copy; the next one begins by copying back the rows that either of the two has changed.
    The copy keeps its scores meanwhile: a plan that is carried out costs no second scoring.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cluster = Cluster(policy)
        self._scratch = Cluster(policy)
        # Nodes that the copy takes nothing on.
        self._closed: set[str] = set()
        self._possible: dict[Kind, bool] = {}
        self.drained: set[str] = set()
        self._runs: dict[str, dict[str, None]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> NodeInventory:
        """A copy without cached scores."""
        other = NodeInventory(self.policy)
        for machine in self.machines():
            other.add(machine)
        for node in self.drained:
            other.drain(node)
        for node, row in self.cluster.rows.items():
            other.cluster.copy_row(other.cluster.rows[node], self.cluster, row)
        other._runs = deepcopy(self._runs, memo)
        return other

    def __len__(self) -> int:
        return len(self.cluster.rows)

    def __contains__(self, node: object) -> bool:
        return node in self.cluster.rows

    def machines(self) -> Iterator[Machine]:
        """All nodes, in the order in which they joined."""
        return (machine for machine in self.cluster.machines if machine is not None)

    def runs_on(self, node: str) -> Mapping[str, None]:
        """Runs that hold a part of a node."""
        return self._runs.get(node, _NOBODY)

    # ---- changes --------------------------------------------------------------------------------------------------

    def add(self, machine: Machine) -> None:
        """A node joins, empty."""
        self.cluster.add(machine)
        self._scratch.add(machine)
        self._runs[machine.id] = {}
        self._possible.clear()

    def remove(self, node: str) -> Machine:
        """A node is gone; returns what it was."""
        machine = self.cluster.machines[self.cluster.rows[node]]
        assert machine is not None
        self._copy_back()  # rows may be numbered again
        self.cluster.remove(node)
        self._scratch.remove(node)
        del self._runs[node]
        self.drained.discard(node)
        self._closed.discard(node)
        self._possible.clear()
        return machine

    def drain(self, node: str) -> None:
        """Place nothing more on a node."""
        self.drained.add(node)
        self.cluster.close(node)

    def take(self, request: Request, allocation: Iterable[AllocatedNode]) -> None:
        """A run holds this allocation from now on."""
        for part in allocation:
            self.cluster.take(self.cluster.rows[part.node], request.shape, part.gpus)
            self._runs[part.node][request.run] = None

    def give(self, request: Request, allocation: Iterable[AllocatedNode]) -> None:
        """A run gives its allocation back."""
        for part in allocation:
            self.cluster.give(self.cluster.rows[part.node], request.shape, part.gpus)
            self._runs[part.node].pop(request.run, None)

    # ---- planning -------------------------------------------------------------------------------------------------

    def planning_copy(self, closed: Set[str]) -> Cluster:
        """A copy of the cluster to plan on, valid until the next one: drained and `closed` nodes take nothing there."""
        self._copy_back()
        wanted = (self.drained | closed) & self.cluster.rows.keys()
        for node in self._closed - wanted:
            self._scratch.close(node, False)
        for node in wanted - self._closed:
            self._scratch.close(node)
        if wanted != self._closed:
            self._closed = wanted
            self._possible.clear()
        if hasattr(self.policy, "restart"):  # scores that were drawn for an earlier plan
            self._scratch.forget()
        return self._scratch

    def _copy_back(self) -> None:
        for row in self.cluster.touched | self._scratch.touched:
            self._scratch.copy_row(row, self.cluster, row)
        self.cluster.touched.clear()
        self._scratch.touched.clear()

    def learn(self, mix: Iterable[tuple[Shape, float]]) -> None:
        """Another mix of requests for a policy that has one: all is scored again."""
        self.policy.learn(mix)  # type: ignore[attr-defined]
        self._scratch.forget()

    def is_closed(self, node: str) -> bool:
        """Whether the planning copy takes nothing on a node, or the node is gone."""
        return node in self._closed or node not in self.cluster.rows

    def possible(self, request: Request) -> bool:
        """Whether the nodes that the planning copy may use would have room for a request if nothing ran."""
        kind = request.kind
        found = self._possible.get(kind)
        if found is None:
            found = self._possible[kind] = fits_when_empty(self._scratch, request)
        return found


def fits_when_empty(cluster: Cluster, request: Request) -> bool:
    """Whether a cluster's open nodes would have room for a request if nothing ran."""
    shape: Shape = request.shape
    rows = cluster.capable(shape)
    if request.spread or len(rows) >= request.needed:
        return len(rows) >= request.needed
    return sum(cluster.times(shape, int(row)) for row in rows) >= request.needed
