"""An attempt on several nodes: whatever order reports come in, all go together, and the first failure is the cause."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer.end_signal import REQUESTED_ENDS
from alveary_trainer.gang import ENDED, LISTED, READY, RUNNING, STAGING, STORED, File, Gang, name_files

PEER = c.EXIT_REASON_PEER_FAILURE
REQUESTED = [end.exit_reason for end in REQUESTED_ENDS]


def report(
    index: int, phase: int, exit_code: int | None = None, reason: c.ExitReason.ValueType = c.EXIT_REASON_EXITED, failed_at: float = 0.0
) -> pb.GangReport:
    made = pb.GangReport(index=index, node=f"n{index}", phase=phase, host=f"h{index}")  # type: ignore[arg-type]
    if phase >= ENDED:
        made.exit.reason = reason
        if exit_code is not None:
            made.exit.exit_code = exit_code
        if failed_at:
            made.failed_at, made.exit.rank, made.exit.node = failed_at, index, f"n{index}"
    return made


class Shares(RuleBasedStateMachine):
    """Shares that do what they are told, and messages that come late, twice, or never."""

    @initialize(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        self.gang = Gang(count)
        self.phase = [STAGING] * count
        self.said: list[pb.GangReport] = []
        self.launched: set[int] = set()
        for index in range(count):
            self.say(index)

    def say(self, index: int, exit_code: int | None = None, reason: c.ExitReason.ValueType = c.EXIT_REASON_EXITED) -> None:
        one = report(index, self.phase[index], exit_code, reason)
        self.said.append(one)
        self.gang.merge_report(one)

    @rule(index=st.integers(0, 3), code=st.integers(0, 1))
    def go_on(self, index: int, code: int) -> None:
        index %= self.gang.count
        phase, order = self.phase[index], self.gang.order(index)
        if phase == STAGING:
            self.phase[index] = READY
            self.say(index)
            if index == 0:
                self.gang.port = 1
        elif phase == READY and order.phase == RUNNING:
            self.launched.add(index)
            self.phase[index] = RUNNING
            self.say(index)
        elif phase in (READY, RUNNING) and order.phase >= ENDED:
            self.phase[index] = ENDED
            self.say(index, None, order.end_reason or PEER)
        elif phase == RUNNING:
            self.phase[index] = ENDED
            self.say(index, code)
        elif phase == ENDED:
            self.phase[index] = LISTED
            self.say(index, self.gang.reports[index].exit.exit_code, self.gang.reports[index].exit.reason)
        elif phase == LISTED and order.phase == STORED:
            self.phase[index] = STORED
            self.say(index, self.gang.reports[index].exit.exit_code, self.gang.reports[index].exit.reason)
        if self.gang.all_at(LISTED):
            self.gang.file_names_digest = "names"

    @rule(at=st.integers(0, 100))
    def an_old_message_comes(self, at: int) -> None:
        known = {i: r.phase for i, r in self.gang.reports.items()}
        self.gang.merge_report(self.said[at % len(self.said)])
        assert all(self.gang.reports[i].phase >= p for i, p in known.items())

    @rule(why=st.sampled_from(REQUESTED))
    def end(self, why: c.ExitReason.ValueType) -> None:
        self.gang.request_end(why)

    @invariant()
    def nobody_is_launched_before_all_are_ready(self) -> None:
        if self.launched:
            assert all(p >= READY for p in self.phase)

    @invariant()
    def nobody_stores_before_all_have_ended(self) -> None:
        if any(p == STORED for p in self.phase):
            assert all(p >= LISTED for p in self.phase)

    def teardown(self) -> None:
        if not hasattr(self, "gang"):
            return
        for _ in range(8 * self.gang.count):
            for index in range(self.gang.count):
                self.go_on(index, 0)
        assert self.gang.all_at(STORED), "it never came to its end"
        status = self.gang.exit_status()
        codes = [r.exit.exit_code for r in self.gang.reports.values()]
        if self.gang.requested_end:
            assert status.reason == self.gang.requested_end.reason
        elif any(codes):
            assert status.reason == c.EXIT_REASON_EXITED and status.exit_code == 1
        else:
            assert status.reason == c.EXIT_REASON_EXITED and status.exit_code == 0


TestShares = Shares.TestCase
TestShares.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_of_several_failing_ranks_the_first_is_the_cause() -> None:
    gang = Gang(3)
    gang.merge_report(report(0, LISTED, 1, failed_at=30.0))
    gang.merge_report(report(1, LISTED, 7, failed_at=20.0))
    gang.merge_report(report(2, LISTED, None, PEER))
    status = gang.exit_status()
    assert (status.rank, status.exit_code, status.node) == (1, 7, "n1")


def test_what_has_ended_by_itself_stays_what_it_was() -> None:
    gang = Gang(1)
    gang.merge_report(report(0, ENDED, 0))
    gang.request_end(c.EXIT_REASON_PREEMPTED)
    assert (gang.exit_status().reason, gang.exit_status().exit_code) == (c.EXIT_REASON_EXITED, 0)


def test_what_no_rank_did_is_not_blamed_on_one() -> None:
    gang = Gang(2)
    gang.merge_report(report(0, LISTED, 1, failed_at=30.0))
    gang.merge_report(report(1, LISTED, None, c.EXIT_REASON_OUT_OF_MEMORY))
    assert (gang.exit_status().reason, gang.exit_status().node) == (c.EXIT_REASON_OUT_OF_MEMORY, "n1")
    assert gang.exit_status().reason == c.EXIT_REASON_EXITED or gang.exit_status().reason == c.EXIT_REASON_OUT_OF_MEMORY
    failed = Gang(2)
    failed.merge_report(report(0, LISTED, None, PEER))
    failed.merge_report(report(1, LISTED, None, c.EXIT_REASON_STAGING_FAILED))
    assert (failed.exit_status().reason, failed.exit_status().node, failed.exit_status().HasField("rank")) == (
        c.EXIT_REASON_STAGING_FAILED,
        "n1",
        False,
    )


def test_mpirun_alone_says_how_an_mpi_run_ended() -> None:
    gang = Gang(2, c.LAUNCHER_MPI)
    gang.merge_report(report(0, RUNNING))
    gang.merge_report(report(1, ENDED, 1))
    assert gang.end() is None, "its daemon ended first"
    gang.merge_report(report(0, ENDED, 0))
    assert (end := gang.end()) is not None and end.reason == PEER
    assert (gang.exit_status().reason, gang.exit_status().exit_code) == (c.EXIT_REASON_EXITED, 0)
    lost = Gang(2, c.LAUNCHER_MPI)
    lost.merge_report(report(0, READY))
    lost.merge_report(report(1, ENDED, None, c.EXIT_REASON_STAGING_FAILED))
    assert (end := lost.end()) is not None and end.reason == PEER


@given(
    st.dictionaries(
        st.integers(0, 3),
        st.lists(st.builds(File, st.sampled_from(["outputs/a", "outputs/b/c", "logs/x", "top"]), st.just(1), st.sampled_from("pqr")), unique_by=lambda f: f.path),
        min_size=1,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_no_file_is_lost_and_none_is_overwritten(listings: dict[int, list[File]], random: object) -> None:
    order = sorted(listings)
    random.shuffle(order)  # type: ignore[attr-defined]
    names = name_files(listings, order)
    stored = {name: file.sha256 for i in order for file in listings[i] if (name := names[i][file.path])}
    assert sum(bool(n) for mine in names.values() for n in mine.values()) == len(stored), "two under one name"
    for index, files in listings.items():
        for file in files:
            assert stored[names[index][file.path] or file.path] == file.sha256
    first = order[0]
    assert all(names[first][f.path] == f.path for f in listings[first])
