"""A node's part of one attempt: what was placed here, and what the heartbeat says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core.events import Key
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import Usage
from alveary_trainer.exit_status import MemberFacts
from alveary_trainer.node import NodeContext

_DEFAULT_NETWORK = "bridge"


@dataclass(frozen=True)
class Assignment:
    """One member's part of an attempt. It never changes."""

    node: NodeContext
    workspace: str
    run_id: str
    placement: ev.PlacementMade
    # Position in the placement's nodes; the member at 0 leads.
    index: int = 0

    @property
    def number(self) -> int:
        """The attempt's number, from 1."""
        return self.placement.attempt

    @property
    def spec(self) -> c.RunSpec:
        """What is run."""
        return self.placement.spec

    @property
    def allocation(self) -> ev.AllocatedNode:
        """What the placement gives of this node."""
        return self.placement.nodes[self.index]

    @property
    def node_count(self) -> int:
        """Members of the gang."""
        return len(self.placement.nodes)

    @property
    def attempt_id(self) -> str:
        """Id of the attempt's aggregate, which all members share."""
        return f"{self.run_id}-{self.number}"

    @property
    def key(self) -> Key:
        """The attempt's aggregate."""
        return Key(self.workspace, "attempt", self.attempt_id)

    @property
    def name(self) -> str:
        """Distinguishes the parts that several members of one attempt have on the same node."""
        return self.attempt_id + (f".{self.index}" if self.index else "")

    @property
    def gang_name(self) -> str:
        """What the runtime calls the gang; empty where the attempt has one node."""
        return self.attempt_id if self.node_count > 1 else ""

    @property
    def needs_host(self) -> bool:
        """Whether processes connect to each other, so that each node needs an address."""
        return self.node_count > 1 or launch.has_ranks(self.spec)

    @property
    def is_mpi_daemon(self) -> bool:
        """Whether mpirun, on the leader's node, decides what is launched here."""
        return self.facts.is_mpi_daemon

    @property
    def network(self) -> str:
        """Network of the run's containers."""
        return self.placement.network or _DEFAULT_NETWORK

    @property
    def first_rank(self) -> int:
        """Number of the first rank on this node."""
        return self.index * launch.ranks_per_node(self.spec)

    @property
    def root(self) -> Path:
        """The folder of this part of the attempt."""
        return self.node.runs_dir / self.name

    @property
    def work(self) -> Path:
        """The working directory of the program."""
        return self.root / "work"

    @property
    def facts(self) -> MemberFacts:
        """What the exit status depends on."""
        return MemberFacts(self.allocation.node, self.index, self.node_count, self.spec.launcher, self.spec.resources.memory_bytes)


@dataclass
class Progress:
    """How far a part of an attempt is, for the heartbeat."""

    phase: pb.AttemptPhase.ValueType = pb.ATTEMPT_PHASE_STAGING
    usage: Usage = field(default_factory=Usage)
    # When it stored a checkpoint last, time.monotonic(); 0: never.
    checkpoint_at: float = 0.0
