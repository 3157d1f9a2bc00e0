"""How an attempt ended on one node: this decides a run's exit code and reason. Pure.

In a gang the leader merges the members' exit statuses into that of the attempt, see gang.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer import launch
from alveary_trainer.adapters.runtime import Outcome
from alveary_trainer.end_signal import REQUESTED_ENDS, End, EndReason
from alveary_trainer.hints import lacked_shared_memory
from alveary_trainer.rank_state import Rank, first_failure, rank_exits, signal_name

_MIB = 2**20
_NODE_OUT_OF_MEMORY = "the kernel killed it because the node ran out of memory"
# Reasons of programs that ended by themselves.
_BY_ITSELF = (c.EXIT_REASON_EXITED, c.EXIT_REASON_SIGNAL)


@dataclass(frozen=True)
class MemberFacts:
    """What an exit status says about the node, and what it depends on beside the processes."""

    node: str
    index: int
    node_count: int
    launcher: c.Launcher.ValueType
    # What the run asked for; 0: no limit.
    memory_bytes: int

    @property
    def is_mpi_daemon(self) -> bool:
        """Whether what was launched here is mpirun's daemon, whose own end says nothing about the run."""
        return self.launcher == c.LAUNCHER_MPI and self.index > 0


def classify(outcome: Outcome, end: End | None, ranks: Mapping[int, Rank], member: MemberFacts) -> c.ExitStatus:
    """The exit status of one node's part of an attempt.

    `outcome` is how the launched process ended, `end` the end that was requested before, if any, and `ranks` the ranks of this
    node by number (empty where the program was started without a launcher). A requested end comes first, then what the kernel
    did, then how the process ended, and of failed ranks the one that failed first.
    """
    status = c.ExitStatus()
    if outcome.exit_code is not None:
        status.exit_code = outcome.exit_code
    if outcome.signal is not None:
        status.signal = outcome.signal
    if end is not None and end.reason.exit_reason:
        status.reason, status.message = end.reason.exit_reason, _sentence_of(end, member)
    else:
        status.reason, status.message = _reason_of(outcome, member)
    _attribute_failure(status, ranks, member)
    return status


def _sentence_of(end: End, member: MemberFacts) -> str:
    if end.reason is EndReason.OUT_OF_MEMORY and member.memory_bytes:
        return f"it used more than the {member.memory_bytes / _MIB:.0f} MiB of memory it asked for"
    if end.reason is EndReason.OUT_OF_MEMORY:
        return _NODE_OUT_OF_MEMORY
    if end.reason is EndReason.DISK_FULL:
        return f"{end.sentence}; its outputs are not stored, except for checkpoints that were copied before"
    return end.sentence


def _reason_of(outcome: Outcome, member: MemberFacts) -> tuple[c.ExitReason.ValueType, str]:
    """Reason and sentence for a process that nobody asked to end."""
    if outcome.out_of_memory:
        limit = member.memory_bytes
        needed = f"the kernel killed it because it needed more than its {limit / _MIB:.0f} MiB"
        return c.EXIT_REASON_OUT_OF_MEMORY, needed if limit else _NODE_OUT_OF_MEMORY
    if outcome.signal is not None:
        return c.EXIT_REASON_SIGNAL, f"it was ended by {signal_name(outcome.signal)}"
    if outcome.exit_code is not None:
        failed = outcome.problem or f"it ended with exit code {outcome.exit_code}"
        return c.EXIT_REASON_EXITED, "" if outcome.exit_code == 0 else failed
    return c.EXIT_REASON_LAUNCH_FAILED, outcome.problem or "its supervisor was killed"


def _attribute_failure(status: c.ExitStatus, ranks: Mapping[int, Rank], member: MemberFacts) -> None:
    """Add how each rank ended, and make a failure that of the rank that failed first."""
    status.ranks.extend(rank_exits(ranks, member.node))
    first = first_failure(ranks)
    failed = status.reason == c.EXIT_REASON_SIGNAL or (status.reason == c.EXIT_REASON_EXITED and status.exit_code != 0)
    if first is not None and (failed or member.is_mpi_daemon):
        status.ClearField("exit_code")
        status.ClearField("signal")
        status.reason = c.EXIT_REASON_EXITED if first.exit_code is not None else c.EXIT_REASON_SIGNAL
        if first.exit_code is not None:
            status.exit_code = first.exit_code
        if first.signal is not None:
            status.signal = first.signal
        status.rank, status.node = first.number, member.node
        where = f" on node {member.node}" if member.node_count > 1 else ""
        again = f", after {first.restarts} restarts" if first.restarts else ""
        status.message = f"rank {first.number}{where} {first.describe_end()}{again}"
        status.last_lines[:] = first.tail
    elif member.launcher == c.LAUNCHER_MPI and not member.index and status.exit_code == launch.NOT_FOUND and not ranks:
        status.reason, status.message = c.EXIT_REASON_LAUNCH_FAILED, launch.NO_MPIRUN
    elif not failed and ranks:
        status.last_lines[:] = ranks[min(ranks)].tail


def seems_to_lack_shared_memory(status: c.ExitStatus, outcome: Outcome, last_lines: Sequence[str]) -> bool:
    """Whether a program that ended so, with `last_lines` as its output, found no room in /dev/shm."""
    if status.reason not in _BY_ITSELF or outcome.problem:
        return False
    exit_code = status.exit_code if status.HasField("exit_code") else None
    number = status.signal if status.HasField("signal") else None
    return lacked_shared_memory(exit_code, number, status.last_lines or last_lines)


def add_disk_fault(status: c.ExitStatus, disk_fault: str) -> None:
    """Add that the node's disk was full (`disk_fault`, a sentence; empty: it was not) to a failure that it may explain."""
    by_itself = status.reason in (*_BY_ITSELF, c.EXIT_REASON_LAUNCH_FAILED)
    if disk_fault and by_itself and (status.exit_code or status.signal):
        status.message = f"{status.message or exit_reasons.word(status.reason)}, and {disk_fault}"


def was_requested(reason: c.ExitReason.ValueType) -> bool:
    """Whether the whole attempt was asked to end so."""
    return any(reason == end.exit_reason for end in REQUESTED_ENDS)
