"""The protocol of a gang: how far each member may go, what ended the attempt, and under which names files are stored. Pure.

Each member of a gang has a trainer. The one of the placement's first node leads: it merges what the members report
(`merge_report`), and tells each how far it may go (`order`). All are launched together, once all are staged; when one fails, all are
ended; when all have ended, all store their files. A member's phases only advance, so that late and repeated reports change
nothing. An attempt on one node is a gang of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer.exit_status import was_requested

STAGING = pb.GANG_PHASE_STAGING
READY = pb.GANG_PHASE_READY
RUNNING = pb.GANG_PHASE_RUNNING
ENDED = pb.GANG_PHASE_ENDED
LISTED = pb.GANG_PHASE_LISTED
STORED = pb.GANG_PHASE_STORED
_BY_ITSELF = (c.EXIT_REASON_EXITED, c.EXIT_REASON_SIGNAL)
_MAX_RANKS = 1024
# Sorts members whose ranks are not known behind all others.
_NO_RANK = 10**9


@dataclass(frozen=True)
class GangEnd:
    """Why all that still runs has to end."""

    reason: c.ExitReason.ValueType
    message: str


@dataclass
class Gang:
    """What the leader knows."""

    count: int
    launcher: c.Launcher.ValueType = c.LAUNCHER_PLAIN
    # The newest report of each member, by index.
    reports: dict[int, pb.GangReport] = field(default_factory=dict)
    # A free port of the first node, known once it is ready; 0: not yet.
    port: int = 0
    # The end that was requested of the whole attempt.
    requested_end: GangEnd | None = None
    # Digest of the object that says under which names files are stored; empty: not decided.
    file_names_digest: str = ""
    # LAUNCHER_MPI: what mpirun wants started on each other node.
    commands: dict[int, list[str]] = field(default_factory=dict)

    def merge_report(self, report: pb.GangReport) -> bool:
        """Take a report, unless the member has reported a later phase before; True: it says something new."""
        present = self.reports.get(report.index)
        if not 0 <= report.index < self.count or (present is not None and report.phase < present.phase):
            return False
        news = pb.GangReport()
        news.CopyFrom(report)
        news.last_order_version = 0
        self.reports[report.index] = news
        return news != present

    def request_end(self, reason: c.ExitReason.ValueType, message: str = "") -> None:
        """End the whole attempt; the first request decides, and one that comes after all have ended changes nothing."""
        if self.requested_end is None and not self.all_at(ENDED):
            self.requested_end = GangEnd(reason, message)

    def all_at(self, phase: int) -> bool:
        """Whether every member is in a phase, or beyond it."""
        return len(self.reports) == self.count and all(r.phase >= phase for r in self.reports.values())

    def behind(self, phase: int) -> list[str]:
        """Nodes that have reported, but not that they have reached a phase."""
        return [r.node for _, r in sorted(self.reports.items()) if r.phase < phase]

    def failed(self, report: pb.GangReport) -> bool:
        """Whether a member has ended in a way that ends the others."""
        if report.phase < ENDED or report.exit.reason == c.EXIT_REASON_PEER_FAILURE:
            return False
        if self.launcher == c.LAUNCHER_MPI and report.index and report.exit.reason in _BY_ITSELF:
            return False  # mpirun's daemon: what its end means for the run, mpirun knows
        return report.exit.reason != c.EXIT_REASON_EXITED or report.exit.exit_code != 0

    def end(self) -> GangEnd | None:
        """Why all that still runs has to end; None: it need not."""
        if self.requested_end is not None:
            return self.requested_end
        failures = [r for _, r in sorted(self.reports.items()) if self.failed(r)]
        if failures:
            first = failures[0]
            why = first.exit.message or exit_reasons.word(first.exit.reason)
            return GangEnd(c.EXIT_REASON_PEER_FAILURE, f"node {first.node} failed: {why}")
        leader = self.reports.get(0)
        if self.launcher == c.LAUNCHER_MPI and leader is not None and leader.phase >= ENDED:
            return GangEnd(c.EXIT_REASON_PEER_FAILURE, "mpirun has ended")
        return None

    def order(self, index: int) -> pb.GangOrder:
        """How far a member may go; the caller sets the version."""
        if self.file_names_digest:
            return pb.GangOrder(phase=STORED, file_names_digest=self.file_names_digest)
        if (end := self.end()) is not None:
            return pb.GangOrder(phase=ENDED, end_reason=end.reason, message=end.message)
        if not self.all_at(READY) or not self.port:
            return pb.GangOrder(phase=READY)
        hosts = [self.reports[i].host for i in range(self.count)]
        return pb.GangOrder(phase=RUNNING, hosts=hosts, port=self.port, command=self.commands.get(index, []))

    def network_scopes(self) -> set[str]:
        """Where the members' addresses are valid; with more than one scope they cannot reach each other."""
        return {r.network_scope for r in self.reports.values()}

    def exit_status(self) -> c.ExitStatus:
        """How the attempt ended, once all members have."""
        reports = [r for _, r in sorted(self.reports.items())]
        status = c.ExitStatus()
        failures = [r for r in reports if self.failed(r)]
        # Of the ranks that failed, the first: the others may have failed because of it.
        ranked = sorted((r.failed_at, r.index) for r in reports if r.failed_at and r.exit.HasField("rank"))
        requested = self.requested_end is not None and was_requested(self.requested_end.reason)
        if self.requested_end is not None and requested:
            status.CopyFrom(reports[0].exit)
            status.reason = self.requested_end.reason
            status.message = self.requested_end.message or exit_reasons.word(status.reason)
            status.ClearField("rank")
            status.node = ""
        elif failures and ranked and all(r.exit.reason in _BY_ITSELF for r in failures):
            status.CopyFrom(self.reports[ranked[0][1]].exit)
        elif failures:
            # What a trainer did or saw (no memory, no image) explains what processes on other nodes died of.
            cause = min(failures, key=lambda r: (r.exit.reason in _BY_ITSELF, r.index))
            status.CopyFrom(cause.exit)
            status.node = status.node or (cause.node if self.count > 1 else "")
        else:
            # The last lines of rank 0 stand for those of all.
            status.CopyFrom(min(reports, key=lambda r: (min(r.ranks, default=_NO_RANK), r.index)).exit)
            if reports[0].exit.reason == c.EXIT_REASON_EXITED:
                status.exit_code = reports[0].exit.exit_code
        for report in reports:
            if report.error and not failures and not requested:
                status = c.ExitStatus(reason=c.EXIT_REASON_UPLOAD_FAILED, message=report.error, node=report.node)
        del status.ranks[:]
        status.ranks.extend(ranks_of([one for r in reports for one in r.exit.ranks]))
        return status


def ranks_of(ends: Sequence[c.RankExit]) -> list[c.RankExit]:
    """The ends of ranks in order, at most _MAX_RANKS of them: those that failed go first."""
    bad = sorted(ends, key=lambda e: (not (e.signal or e.exit_code), e.rank))[:_MAX_RANKS]
    return sorted(bad, key=lambda e: e.rank)


@dataclass(frozen=True)
class File:
    """A file of a member."""

    path: str
    size: int
    sha256: str
    executable: bool = False


def name_files(listings: Mapping[int, Sequence[File]], order: Sequence[int]) -> dict[int, dict[str, str]]:
    """Under which name each member stores each of its files, by its own name; "": not at all, the same file is stored already.

    Members are named in `order`, and the first with a path keeps it. A file of another member with the same path and another
    content is stored as <top>/node-<index>/<rest>.
    """
    taken: dict[str, str] = {}
    names: dict[int, dict[str, str]] = {}
    for index in order:
        mine = names.setdefault(index, {})
        for file in listings[index]:
            name = file.path
            if taken.get(name) == file.sha256:
                mine[file.path] = ""
                continue
            top, slash, rest = file.path.partition("/")
            tries = 0
            while name in taken:
                tries += 1
                folder = f"node-{index}" + (f"-{tries}" if tries > 1 else "")
                name = f"{top}/{folder}/{rest}" if slash else f"{folder}/{top}"
            taken[name] = file.sha256
            mine[file.path] = name
    return names
