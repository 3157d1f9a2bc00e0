"""An attempt on several nodes: how far each of them may go, what ended it, and under which names their files are stored. Pure.

Each share of the placement has a trainer. The one with the first share leads: it hears what the others say of themselves
(`take`), and tells each how far it may go (`order`). All are launched together, once all are staged; when one fails, all
are ended; when all have ended, all store. A share's phases only advance, so that late and repeated reports change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1 import trainer_pb2 as pb

STAGING, READY, RUNNING, ENDED, LISTED, STORED = (
    pb.GANG_PHASE_STAGING, pb.GANG_PHASE_READY, pb.GANG_PHASE_RUNNING, pb.GANG_PHASE_ENDED, pb.GANG_PHASE_LISTED,
    pb.GANG_PHASE_STORED,
)  # fmt: skip
# A share that ended because another one failed.
PEER = "peer"
# Ends that the whole attempt was asked for; they are its outcome whatever its processes say.
ASKED = ("canceled", "timeout", "preempted")
_MOST_RANKS = 1024


@dataclass
class Gang:
    """What the leading trainer knows."""

    count: int
    launcher: c.Launcher.ValueType = c.LAUNCHER_PLAIN
    reports: dict[int, pb.GangReport] = field(default_factory=dict)
    # A free port of the first share, known once it is ready.
    port: int = 0
    why: str = ""
    message: str = ""
    # Digest of the object that says under which names files are stored.
    names: str = ""
    commands: dict[int, list[str]] = field(default_factory=dict)

    def take(self, report: pb.GangReport) -> bool:
        """Believe a report, unless a later one came before it. True: it says something new."""
        present = self.reports.get(report.index)
        if not 0 <= report.index < self.count or (present is not None and report.phase < present.phase):
            return False
        news = pb.GangReport()
        news.CopyFrom(report)
        news.seen = 0
        self.reports[report.index] = news
        return news != present

    def end(self, why: str, message: str = "") -> None:
        """The whole attempt is to end; the first reason stays. One that has ended by itself is not ended again."""
        if not self.why and not self.all_at(ENDED):
            self.why, self.message = why, message

    def all_at(self, phase: int) -> bool:
        """Whether every share is in a phase, or beyond it."""
        return len(self.reports) == self.count and all(r.phase >= phase for r in self.reports.values())

    def behind(self, phase: int) -> list[str]:
        """Nodes that have not come so far."""
        return [r.node for _, r in sorted(self.reports.items()) if r.phase < phase]

    def failed(self, report: pb.GangReport) -> bool:
        """Whether a share has ended in a way that ends the others."""
        if report.phase < ENDED or report.exit.reason == PEER:
            return False
        if self.launcher == c.LAUNCHER_MPI and report.index and report.exit.reason in ("exited", "signal"):
            return False  # mpirun's daemon: what it means for the run, mpirun knows
        return report.exit.reason != "exited" or report.exit.exit_code != 0

    def ending(self) -> tuple[str, str]:
        """Why all that still runs has to end; ("", ""): it need not."""
        if self.why:
            return self.why, self.message
        failures = [r for _, r in sorted(self.reports.items()) if self.failed(r)]
        if failures:
            first = failures[0]
            return PEER, f"node {first.node} failed: {first.exit.message or first.exit.reason}"
        leader = self.reports.get(0)
        if self.launcher == c.LAUNCHER_MPI and leader is not None and leader.phase >= ENDED:
            return PEER, "mpirun has ended"
        return "", ""

    def order(self, index: int) -> pb.GangOrder:
        """How far a share may go. Its version is the caller's to set."""
        if self.names:
            return pb.GangOrder(phase=STORED, names=self.names)
        why, message = self.ending()
        if why:
            return pb.GangOrder(phase=ENDED, why=why, message=message)
        if not self.all_at(READY) or not self.port:
            return pb.GangOrder(phase=READY)
        hosts = [self.reports[i].host for i in range(self.count)]
        return pb.GangOrder(phase=RUNNING, hosts=hosts, port=self.port, command=self.commands.get(index, []))

    def realms(self) -> set[str]:
        """Where the names of the shares' hosts hold; more than one: they do not reach each other by them."""
        return {r.realm for r in self.reports.values()}

    def verdict(self) -> c.ExitStatus:
        """How the attempt ended, once all shares have."""
        reports = [r for _, r in sorted(self.reports.items())]
        status = c.ExitStatus()
        failures = [r for r in reports if self.failed(r)]
        # Of the ranks that failed, the first: what came after may be its doing.
        ranked = sorted((r.failed_at, r.index) for r in reports if r.failed_at and r.exit.HasField("rank"))
        if self.why in ASKED:
            status.CopyFrom(reports[0].exit)
            status.reason, status.message = self.why, self.message or self.why
            status.ClearField("rank")
            status.node = ""
        elif failures and ranked and all(r.exit.reason in ("exited", "signal") for r in failures):
            status.CopyFrom(self.reports[ranked[0][1]].exit)
        elif failures:
            # What a trainer did or saw (no memory, no image) explains what processes elsewhere died of.
            cause = min(failures, key=lambda r: (r.exit.reason in ("exited", "signal"), r.index))
            status.CopyFrom(cause.exit)
            status.node = status.node or (cause.node if self.count > 1 else "")
        else:
            # What rank 0 said last speaks for all.
            status.CopyFrom(min(reports, key=lambda r: (min(r.ranks, default=10**9), r.index)).exit)
            if reports[0].exit.reason == "exited":
                status.exit_code = reports[0].exit.exit_code
        for report in reports:
            if report.error and not failures and self.why not in ASKED:
                status = c.ExitStatus(reason="upload_failed", message=report.error, node=report.node)
        del status.ranks[:]
        status.ranks.extend(ranks_of([one for r in reports for one in r.exit.ranks]))
        return status


def ranks_of(ends: Sequence[c.RankExit]) -> list[c.RankExit]:
    """By rank; of too many, those that failed."""
    bad = sorted(ends, key=lambda e: (not (e.signal or e.exit_code), e.rank))[:_MOST_RANKS]
    return sorted(bad, key=lambda e: e.rank)


@dataclass(frozen=True)
class File:
    """A file of a share."""

    path: str
    size: int
    sha256: str
    executable: bool = False


def name_files(listings: Mapping[int, Sequence[File]], order: Sequence[int]) -> dict[int, dict[str, str]]:
    """Under which name each share stores each of its files; "": not at all, the same file is there.

    Shares come in `order`, and the first to have a path keeps it. Another's file of that path with another content goes
    to <top>/node-<index>/<rest>.
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
