"""How an attempt ended on one node, as a table: from the process's end, the requested end and the ranks to reason, code and sentence."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer.adapters.runtime import Outcome
from alveary_trainer.end_signal import REQUESTED_ENDS, End, EndReason, from_exit_reason
from alveary_trainer.exit_status import MemberFacts, add_disk_fault, classify, seems_to_lack_shared_memory
from alveary_trainer.launch import NO_MPIRUN, NOT_FOUND
from alveary_trainer.rank_state import Rank

MIB = 2**20
FAILED, KILLED = Outcome(exit_code=3), Outcome(signal=signal.SIGKILL)


def facts(**changed: Any) -> MemberFacts:
    return replace(MemberFacts("n", 0, 1, c.LAUNCHER_PLAIN, 0), **changed)


def rank(number: int, exit_code: int | None = None, at: float = 1.0, **more: Any) -> Rank:
    return Rank(number, more.pop("restarts", 0), deque([f"line of {number}"]), exit_code, ended_at=at, **more)


def ranks(*made: Rank) -> dict[int, Rank]:
    return {one.number: one for one in made}


TABLE = [
    # What the process did, where nobody asked for its end.
    ("success", Outcome(exit_code=0), None, {}, {}, ("exited", 0, None, "")),
    ("exit code", FAILED, None, {}, {}, ("exited", 3, None, "it ended with exit code 3")),
    ("problem", Outcome(exit_code=126, problem="no such file"), None, {}, {}, ("exited", 126, None, "no such file")),
    ("signal", Outcome(signal=signal.SIGSEGV), None, {}, {}, ("signal", None, 11, "it was ended by SIGSEGV")),
    ("unknown signal", Outcome(signal=99), None, {}, {}, ("signal", None, 99, "it was ended by 99")),
    ("no supervisor", Outcome(), None, {}, {}, ("launch_failed", None, None, "its supervisor was killed")),
    ("not started", Outcome(problem="no rights"), None, {}, {}, ("launch_failed", None, None, "no rights")),
    (
        "killed for want of memory", Outcome(signal=signal.SIGKILL, out_of_memory=True), None, {}, {"memory_bytes": 64 * MIB},
        ("out_of_memory", None, 9, "the kernel killed it because it needed more than its 64 MiB"),
    ),
    (
        "machine out of memory", Outcome(signal=signal.SIGKILL, out_of_memory=True), None, {}, {},
        ("out_of_memory", None, 9, "the kernel killed it because the node ran out of memory"),
    ),
    # An end that was requested comes first, and the code of the process stays.
    ("canceled", Outcome(exit_code=0), End(EndReason.CANCELED), {}, {}, ("canceled", 0, None, "canceled")),
    ("before launch", Outcome(), End(EndReason.CANCELED), {}, {}, ("canceled", None, None, "canceled")),
    ("timeout", KILLED, End(EndReason.TIMEOUT, "too long"), {}, {}, ("timeout", None, 9, "too long")),
    ("preempted", FAILED, End(EndReason.PREEMPTED), {}, {}, ("preempted", 3, None, "a run that comes first needs its place")),
    ("peer", KILLED, End(EndReason.PEER_FAILURE, "node m failed: x"), {}, {}, ("peer_failure", None, 9, "node m failed: x")),
    (
        "over its memory", KILLED, End(EndReason.OUT_OF_MEMORY), {}, {"memory_bytes": 64 * MIB},
        ("out_of_memory", None, 9, "it used more than the 64 MiB of memory it asked for"),
    ),
    (
        "machine out of memory, seen by the watch", KILLED, End(EndReason.OUT_OF_MEMORY), {}, {},
        ("out_of_memory", None, 9, "the kernel killed it because the node ran out of memory"),
    ),
    (
        "disk full", KILLED, End(EndReason.DISK_FULL, "it filled the disk"), {}, {},
        ("disk_full", None, 9, "it filled the disk; its outputs are not stored, except for checkpoints that were copied before"),
    ),
    ("processes", KILLED, End(EndReason.TOO_MANY_PROCESSES, "9000 processes"), {}, {}, ("signal", None, 9, "9000 processes")),
    # Of ranks that failed, the first.
    (
        "first rank", FAILED, None, ranks(rank(0, 1, at=5.0), rank(1, 7, at=2.0)), {"launcher": c.LAUNCHER_TORCHRUN},
        ("exited", 7, None, "rank 1 ended with exit code 7"),
    ),
    (
        "rank of a gang", FAILED, None, ranks(rank(2, 7)), {"launcher": c.LAUNCHER_TORCHRUN, "node_count": 2, "index": 1},
        ("exited", 7, None, "rank 2 on node n ended with exit code 7"),
    ),
    (
        "rank killed", FAILED, None, ranks(rank(0, signal=9)), {"launcher": c.LAUNCHER_TORCHRUN},
        ("signal", None, 9, "rank 0 was ended by SIGKILL"),
    ),
    (
        "restarted", FAILED, None, ranks(rank(0, 1, at=1.0), rank(1, 7, at=2.0, restarts=2)), {"launcher": c.LAUNCHER_TORCHRUN},
        ("exited", 7, None, "rank 1 ended with exit code 7, after 2 restarts"),
    ),
    (
        "rank not started", FAILED, None, ranks(rank(0, 127, problem="no file")), {"launcher": c.LAUNCHER_TORCHRUN},
        ("exited", 127, None, "rank 0 could not start: no file"),
    ),
    (
        "stopped ranks are not at fault", FAILED, None, ranks(rank(0, 1, stopped=True)), {"launcher": c.LAUNCHER_TORCHRUN},
        ("exited", 3, None, "it ended with exit code 3"),
    ),
    (
        "ranks of a canceled run", FAILED, End(EndReason.CANCELED), ranks(rank(0, 1)), {"launcher": c.LAUNCHER_TORCHRUN},
        ("canceled", 3, None, "canceled"),
    ),
    # mpirun.
    ("no mpirun", Outcome(exit_code=NOT_FOUND), None, {}, {"launcher": c.LAUNCHER_MPI}, ("launch_failed", NOT_FOUND, None, NO_MPIRUN)),
    (
        "daemon of mpirun", Outcome(exit_code=0), None, ranks(rank(1, 5)), {"launcher": c.LAUNCHER_MPI, "index": 1, "node_count": 2},
        ("exited", 5, None, "rank 1 on node n ended with exit code 5"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("outcome", "end", "made", "changed", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_the_table(
    outcome: Outcome, end: End | None, made: dict[int, Rank], changed: dict[str, Any], expected: tuple[str, int | None, int | None, str]
) -> None:
    status = classify(outcome, end, made, facts(**changed))
    code = status.exit_code if status.HasField("exit_code") else None
    number = status.signal if status.HasField("signal") else None
    assert (exit_reasons.word(status.reason), code, number, status.message) == expected
    assert [one.rank for one in status.ranks] == sorted(made)


def test_a_failed_rank_is_named_with_its_last_lines_and_of_a_success_the_first_rank_speaks() -> None:
    distributed = facts(launcher=c.LAUNCHER_TORCHRUN)
    failed = classify(FAILED, None, ranks(rank(0, 0), rank(1, 7)), distributed)
    assert (failed.rank, failed.node, list(failed.last_lines)) == (1, "n", ["line of 1"])
    succeeded = classify(Outcome(exit_code=0), None, ranks(rank(3, 0), rank(1, 0)), distributed)
    assert not succeeded.HasField("rank") and list(succeeded.last_lines) == ["line of 1"]


def test_hints_are_given_where_they_may_explain_a_failure() -> None:
    bus = Outcome(signal=signal.SIGBUS)
    assert seems_to_lack_shared_memory(classify(bus, None, {}, facts()), bus, [])
    canceled = classify(bus, End(EndReason.CANCELED), {}, facts())
    assert not seems_to_lack_shared_memory(canceled, bus, [])
    problem = Outcome(exit_code=135, problem="no file")
    assert not seems_to_lack_shared_memory(classify(problem, None, {}, facts()), problem, [])
    for outcome, end, told in ((FAILED, None, True), (Outcome(exit_code=0), None, False), (FAILED, End(EndReason.CANCELED), False)):
        status = classify(outcome, end, {}, facts())
        add_disk_fault(status, "the disk was full")
        assert status.message.endswith(", and the disk was full") == told


def test_every_end_but_a_fence_has_an_exit_reason_and_an_order_carries_it() -> None:
    for end in EndReason:
        assert bool(end.exit_reason) == (end is not EndReason.FENCED)
    for end in (*REQUESTED_ENDS, EndReason.PEER_FAILURE):
        assert from_exit_reason(end.exit_reason) is end and end.graceful
    with pytest.raises(ValueError, match="no attempt is ended"):
        from_exit_reason(c.EXIT_REASON_EXITED)
