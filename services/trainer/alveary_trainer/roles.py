"""What a node is to an attempt: alone, the leader of a gang, or a follower. Everything that differs is chosen here."""

from __future__ import annotations

from dataclasses import dataclass

from alveary_trainer.assignment import Assignment
from alveary_trainer.attempt_events import AttemptEventWriter, EventWriter, NoEventWriter
from alveary_trainer.end_signal import EndSignal
from alveary_trainer.gang import Gang
from alveary_trainer.gang_channel import GangChannel
from alveary_trainer.gang_outputs import GangFiles
from alveary_trainer.member_outputs import FollowerOutputs, LeaderOutputs, MemberOutputs, SoloOutputs, Storing
from alveary_trainer.outputs import OutputStore
from alveary_trainer.rendezvous import Follower, Leader, Log, Solo, subject


@dataclass(frozen=True)
class Role:
    """The parts of an attempt that depend on its place in the gang."""

    channel: GangChannel
    events: EventWriter
    outputs: MemberOutputs


def role_of(assignment: Assignment, outputs: OutputStore, end: EndSignal, log: Log) -> Role:
    """The role of an assignment."""
    it, node, mine = assignment, assignment.node, assignment.allocation
    storing = Storing(outputs, node.disk_fault, log)
    files = GangFiles(node.store, outputs, it.index)
    where = subject(it.workspace, it.run_id, it.number)
    if it.index:
        follower = Follower(node.log.connection, where, it.index, mine.node, mine.incarnation, end)
        return Role(follower, NoEventWriter(), FollowerOutputs(storing, follower, files))
    gang, events = Gang(it.node_count, it.spec.launcher), AttemptEventWriter(node.log, it.key, end)
    if it.node_count == 1:
        return Role(Solo(gang, mine.node, mine.incarnation, end, log), events, SoloOutputs(storing))
    leader = Leader(node.log.connection, where, gang, mine.node, mine.incarnation, end, log)
    return Role(leader, events, LeaderOutputs(storing, leader, files))
