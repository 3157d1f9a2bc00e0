"""Who runs where. Pure: state in, decisions out, the same for the same input.

The state is a fold of events (`evolve`); `plan` looks at it and says what to do next: place, wait (and why), start or
stop nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event

_EPSILON = 1e-9


@dataclass(frozen=True)
class Need:
    """What a run takes of a node: cores, bytes, whole GPUs."""

    cpus: float = 1.0
    memory: int = 0
    gpus: int = 0

    @classmethod
    def of(cls, resources: c.Resources) -> Need:
        """From a specification."""
        return cls(resources.cpus, resources.memory_bytes, resources.gpus)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        if self.memory:
            parts.append(f"{self.memory / 2**30:.1f} GiB")
        if self.gpus:
            parts.append(f"{self.gpus} GPU")
        return " + ".join(parts)


@dataclass(frozen=True)
class Target:
    """A compute target."""

    workspace: str
    name: str
    spec: ev.ComputeSpec


@dataclass(frozen=True)
class Node:
    """A node that joined and was not lost."""

    id: str
    target: str
    workspace: str
    incarnation: str
    total: Need
    draining: bool = False


@dataclass(frozen=True)
class Waiting:
    """A run in the queue. `sequence` is that of the event that put it there: the order of arrival."""

    run: str
    workspace: str
    target: str
    need: Need
    priority: int
    sequence: int
    attempt: int
    reason: str = ""
    provisioning: bool = False


@dataclass(frozen=True)
class Placed:
    """An attempt that holds a part of a node."""

    run: str
    workspace: str
    node: str
    incarnation: str
    attempt: int
    need: Need
    gpu_indexes: tuple[int, ...]


@dataclass
class State:
    """All that is live; keyed by id, targets by (workspace, name)."""

    targets: dict[tuple[str, str], Target] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    queue: dict[str, Waiting] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    # Runs that were cancelled while they held no place, with their workspaces.
    canceled: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Give a run its node."""

    run: str
    node: str
    gpu_indexes: tuple[int, ...]


@dataclass(frozen=True)
class Wait:
    """Say why a run waits."""

    run: str
    reason: str
    provisioning: bool


@dataclass(frozen=True)
class Scale:
    """Have this many nodes of a target."""

    workspace: str
    target: str
    nodes: int
    reason: str


Decision = Place | Wait | Scale


def evolve(state: State, event: Event) -> None:
    """Fold one event into `state`, in place: this is the one mutable state, owned by the projection."""
    key, message = event.key, event.message
    match message:
        case ev.TargetCreated():
            state.targets[key.workspace, key.id] = Target(key.workspace, key.id, message.spec)
        case ev.TargetDeleted():
            state.targets.pop((key.workspace, key.id), None)
        case ev.NodeJoined():
            state.nodes[key.id] = Node(key.id, message.target, key.workspace, message.incarnation, Need.of(message.resources))
        case ev.NodeDraining():
            if key.id in state.nodes:
                state.nodes[key.id] = replace(state.nodes[key.id], draining=True)
        case ev.NodeLost() | ev.NodeLeft():
            if key.id in state.nodes and state.nodes[key.id].incarnation == message.incarnation:
                del state.nodes[key.id]
        case ev.RunPrepared():
            _enqueue(state, event, message.spec, message.attempts_used + 1)
        case ev.RunRetrying():
            _enqueue(state, event, message.spec, message.attempt)
        case ev.RunCancelRequested():
            state.queue.pop(key.id, None)
            if key.id not in state.placed:
                state.canceled[key.id] = key.workspace
        case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
            state.queue.pop(key.id, None)
            state.placed.pop(key.id, None)
            state.canceled.pop(key.id, None)
        case ev.PlacementWaiting():
            _reason(state, key.id, message.reason, provisioning=False)
        case ev.PlacementProvisioning():
            _reason(state, key.id, message.reason, provisioning=True)
        case ev.PlacementMade():
            share = message.nodes[0]
            state.queue.pop(key.id, None)
            state.placed[key.id] = Placed(
                key.id, key.workspace, share.node, share.incarnation, message.attempt,
                Need.of(message.spec.resources), tuple(share.gpu_indexes),
            )  # fmt: skip
        case ev.PlacementRevoked() | ev.PlacementReleased():
            held = state.placed.get(key.id)
            if held and held.attempt == message.attempt:
                del state.placed[key.id]


def _enqueue(state: State, event: Event, spec: c.RunSpec, attempt: int) -> None:
    if event.key.id in state.canceled:
        return
    state.queue[event.key.id] = Waiting(
        event.key.id, event.key.workspace, spec.compute_target, Need.of(spec.resources), spec.priority, event.sequence, attempt
    )


def _reason(state: State, run: str, reason: str, *, provisioning: bool) -> None:
    if run in state.queue:
        state.queue[run] = replace(state.queue[run], reason=reason, provisioning=provisioning)


@dataclass
class _Room:
    """What is free on a node, or on one that is still to come (`node` empty)."""

    node: str
    cpus: float
    memory: int
    gpus: list[int]

    def fits(self, need: Need) -> bool:
        return need.cpus <= self.cpus + _EPSILON and need.memory <= self.memory and need.gpus <= len(self.gpus)

    def take(self, need: Need) -> tuple[int, ...]:
        self.cpus -= need.cpus
        self.memory -= need.memory
        taken, self.gpus = tuple(self.gpus[: need.gpus]), self.gpus[need.gpus :]
        return taken


def rooms(state: State, target: Target) -> list[_Room]:
    """What is free on the target's nodes."""
    found = []
    for node in sorted(state.nodes.values(), key=lambda n: n.id):
        if (node.workspace, node.target) != (target.workspace, target.name) or node.draining:
            continue
        used = [p for p in state.placed.values() if p.node == node.id]
        taken = {index for p in used for index in p.gpu_indexes}
        found.append(
            _Room(
                node.id, node.total.cpus - sum(p.need.cpus for p in used),
                node.total.memory - sum(p.need.memory for p in used),
                [g for g in range(node.total.gpus) if g not in taken],
            )
        )  # fmt: skip
    return found


def order(queue: Iterable[Waiting]) -> list[Waiting]:
    """By priority, then by arrival."""
    return sorted(queue, key=lambda w: (-w.priority, w.sequence))


def plan(state: State, starting: Mapping[tuple[str, str], int], idle: Mapping[tuple[str, str], int]) -> list[Decision]:
    """What to do now.

    `starting` is how many nodes of a target are on their way, `idle` how many have been idle for as long as the
    target allows. Nobody is placed before one that waits for the same target longer or with more priority.
    """
    decisions: list[Decision] = []
    by_target: dict[tuple[str, str], list[Waiting]] = {}
    for waiting in order(state.queue.values()):
        by_target.setdefault((waiting.workspace, waiting.target), []).append(waiting)
    for key in by_target.keys() - state.targets.keys():
        decisions += [
            _wait(w, f"its compute target {key[1]!r} was deleted: cancel the run, or create the target again", False)
            for w in by_target[key]
        ]
    for key in sorted(state.targets):
        decisions += _plan_target(state, state.targets[key], by_target.get(key, []), starting.get(key, 0), idle.get(key, 0))
    return [d for d in decisions if not (isinstance(d, Wait) and _said(state, d))]


def _said(state: State, decision: Wait) -> bool:
    waiting = state.queue[decision.run]
    return waiting.reason == decision.reason and waiting.provisioning == decision.provisioning


def _plan_target(state: State, target: Target, queue: list[Waiting], starting: int, idle: int) -> list[Decision]:
    decisions: list[Decision] = []
    spec = target.spec
    free = rooms(state, target)
    joined = len(free)
    fresh = Need.of(spec.node_resources)
    coming = [_Room("", fresh.cpus, fresh.memory, list(range(fresh.gpus))) for _ in range(starting)]
    wanted = joined + starting
    blocked = False
    for waiting in queue:
        fitting = [] if blocked else [r for r in free if r.fits(waiting.need)]
        if fitting:
            room = min(fitting, key=lambda r: (r.cpus - waiting.need.cpus, len(r.gpus), r.node))
            decisions.append(Place(waiting.run, room.node, room.take(waiting.need)))
            continue
        blocked = True
        if spec.kind == "nodes":
            text = f"waits for {waiting.need}: " + (
                f"the {joined} nodes of {target.name} are in use by earlier runs, or too small; start another trainer for it, or wait"
                if joined
                else f"no node has joined {target.name}: start a trainer for it"
            )
            decisions.append(_wait(waiting, text, False))
            continue
        room_to_come = next((r for r in coming if r.fits(waiting.need)), None)
        if room_to_come is None and wanted < spec.max_nodes:
            wanted += 1
            room_to_come = _Room("", fresh.cpus, fresh.memory, list(range(fresh.gpus)))
            coming.append(room_to_come)
        if room_to_come is not None and room_to_come.fits(waiting.need):
            room_to_come.take(waiting.need)
            decisions.append(_wait(waiting, f"{target.name} is starting a node for it ({waiting.need})", True))
        else:
            text = (
                f"waits for {waiting.need}: the nodes of {target.name} are in use by earlier runs, and it has its "
                f"maximum of {spec.max_nodes}; raise max_nodes, use another target, or wait"
            )
            decisions.append(_wait(waiting, text, False))
    if spec.kind == "nodes":
        return decisions  # they come and go as whoever runs them says
    if wanted == joined + starting and not queue:
        wanted = max(wanted - idle, spec.min_nodes)
    wanted = min(max(wanted, spec.min_nodes), spec.max_nodes)
    if wanted != joined + starting:
        reason = f"{len(queue)} runs wait" if wanted > joined + starting else "idle nodes"
        decisions.append(Scale(target.workspace, target.name, wanted, reason))
    return decisions


def _wait(waiting: Waiting, reason: str, provisioning: bool) -> Wait:
    return Wait(waiting.run, reason, provisioning)
