"""The run's state machine, driven by everything that can reach it in any order."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_runs import domain

DIGEST = "d" * 64
MAX_ATTEMPTS = 3


def submitted() -> ev.RunSubmitted:
    return ev.RunSubmitted(spec=c.RunSpec(max_attempts=MAX_ATTEMPTS), image_digest=DIGEST, submitted_by="me")


def ok() -> ev.AttemptFinished:
    return ev.AttemptFinished(exit=c.ExitStatus(exit_code=0, reason=c.EXIT_REASON_EXITED))


def fold(run: domain.Run, events: domain.Events) -> domain.Run:
    for event in events:
        run = domain.evolve(run, event)
    return run


class RunMachine(RuleBasedStateMachine):
    """Any command at any time; the invariants are what users are promised."""

    def __init__(self) -> None:
        super().__init__()
        self.run = fold(domain.Run(), domain.submit(domain.Run(), submitted()))
        self.history: list[Message] = [submitted()]
        self.revoked: set[int] = set()

    def do(self, events: domain.Events) -> None:
        was_final = self.run.final
        assert not (was_final and [e for e in events if not isinstance(e, ev.RunTagged)]), "a final run changed"
        self.history += events
        self.run = fold(self.run, events)

    @rule(failed=st.booleans())
    def image(self, failed: bool) -> None:
        self.do(domain.image_failed(self.run, DIGEST, "no") if failed else domain.prepared(self.run, DIGEST, cached=False))

    @rule()
    def preparing(self) -> None:
        self.do(domain.preparing(self.run, DIGEST, "building"))

    @rule(reason=st.sampled_from(["a", "b"]))
    def queued(self, reason: str) -> None:
        self.do(domain.queued(self.run, reason))

    @rule()
    def provisioning(self) -> None:
        self.do(domain.provisioning(self.run, "nodes"))

    @rule(attempt=st.integers(1, 4), what=st.sampled_from(["starting", "started", "finalizing"]))
    def attempt(self, attempt: int, what: str) -> None:
        events = {
            "starting": lambda: domain.starting(self.run, attempt, ["n"]),
            "started": lambda: domain.started(self.run, attempt),
            "finalizing": lambda: domain.finalizing(self.run, attempt),
        }[what]()
        if attempt in self.revoked:
            assert not events, "a fenced attempt changed the run"
        self.do(events)

    @rule(attempt=st.integers(1, 4), code=st.sampled_from([0, 1]))
    def finished(self, attempt: int, code: int) -> None:
        event = ev.AttemptFinished(exit=c.ExitStatus(exit_code=code, reason=c.EXIT_REASON_EXITED))
        events = domain.finished(self.run, attempt, event)
        if attempt in self.revoked:
            assert not events, "a fenced attempt ended the run"
        self.do(events)

    @rule(attempt=st.integers(1, 3))
    def revoke(self, attempt: int) -> None:
        events = domain.revoked(self.run, attempt, "lost")
        if events:
            self.revoked |= set(range(1, attempt + 1))
        self.do(events)

    @precondition(lambda self: not self.run.final)
    @rule()
    def cancel(self) -> None:
        self.do(domain.cancel(self.run, "me", ""))
        assert self.run.cancel_requested

    @rule()
    def released(self) -> None:
        self.do(domain.released(self.run))

    @invariant()
    def compacting_changes_nothing(self) -> None:
        events = domain.compact(self.run, submitted(), {})
        assert len(events) == int(self.run.final)
        whole = fold(domain.Run(), events)
        if self.run.final:
            kept = ("state", "spec", "submitted_by", "image_digest", "reason", "attempt", "nodes", "exit", "manifest_digest", "tags",
                    "properties", "display_name", "description", "archived", "cancel_requested")  # fmt: skip
            assert [getattr(whole, name) for name in kept] == [getattr(self.run, name) for name in kept]
            assert domain.compact(whole, submitted(), {}) == []

    @invariant()
    def ends_once(self) -> None:
        finals = [e for e in self.history if isinstance(e, (ev.RunCompleted, ev.RunFailed, ev.RunCanceled))]
        assert len(finals) == int(self.run.final)

    @invariant()
    def canceled_if_asked(self) -> None:
        if self.run.final and self.run.cancel_requested:
            assert self.run.state in (c.RUN_STATE_CANCELED, c.RUN_STATE_FAILED)

    @invariant()
    def attempts_are_limited(self) -> None:
        assert sum(isinstance(e, ev.RunRetrying) for e in self.history) < MAX_ATTEMPTS

    @invariant()
    def can_always_end(self) -> None:
        """From every state some sequence of what the other services say ends the run: nothing is stuck."""
        run = self.run
        if not run.final:
            run = fold(run, domain.prepared(run, DIGEST, cached=True))
            run = fold(run, domain.finished(run, max(run.first_valid_attempt, run.attempt), ok()))
        assert run.final


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def advance(*names: str) -> domain.Run:
    run = fold(domain.Run(), domain.submit(domain.Run(), submitted()))
    steps = {
        "prepared": lambda r: domain.prepared(r, DIGEST, cached=True),
        "starting": lambda r: domain.starting(r, 1, ["n"]),
        "started": lambda r: domain.started(r, 1),
        "finalizing": lambda r: domain.finalizing(r, 1),
        "finished": lambda r: domain.finished(r, 1, ok()),
        "cancel": lambda r: domain.cancel(r, "me", ""),
    }
    for name in names:
        run = fold(run, steps[name](run))
    return run


def test_the_usual_life() -> None:
    run = advance("prepared", "starting", "started", "finalizing", "finished")
    assert domain.state_name(run.state) == "Completed"


def test_a_process_that_ended_before_the_cancel_reached_it_is_still_canceled() -> None:
    assert domain.state_name(advance("prepared", "starting", "started", "cancel", "finished").state) == "Canceled"


def test_canceling_a_final_run_is_refused_with_a_reason() -> None:
    with pytest.raises(domain.Rejected, match="Completed already"):
        domain.cancel(advance("prepared", "starting", "finished"), "me", "")


def test_a_lost_node_leads_to_the_next_attempt_and_fences_the_first() -> None:
    run = advance("prepared", "starting", "started")
    run = fold(run, domain.revoked(run, 1, "node lost"))
    assert domain.state_name(run.state) == "Queued"
    assert not domain.finished(run, 1, ok())
    assert domain.finished(run, 2, ok())


def test_a_death_between_the_two_events_of_a_loss_is_made_good() -> None:
    run = advance("prepared", "starting", "started")
    run = fold(run, domain.revoked(run, 1, "node lost")[:1])
    assert domain.state_name(run.state) == "NotResponding"
    run = fold(run, domain.resume_after_loss(run))
    assert domain.state_name(run.state) == "Queued"


def test_properties_can_be_added_never_changed() -> None:
    run = fold(advance(), [ev.RunTagged(properties={"a": "1"})])
    assert domain.tag(run, ev.RunTagged(properties={"b": "2"}))
    with pytest.raises(domain.Rejected, match="never changed"):
        domain.tag(run, ev.RunTagged(properties={"a": "2"}))


def test_failures_that_the_policy_names_are_attempted_again_with_growing_pauses_and_the_rest_is_not() -> None:
    policy = c.RetryPolicy(on=[c.EXIT_REASON_EXITED, c.EXIT_REASON_OUT_OF_MEMORY], exit_codes=[75], backoff_seconds=100)
    run = fold(domain.Run(), [ev.RunSubmitted(spec=c.RunSpec(max_attempts=4, retry=policy), image_digest=DIGEST)])
    run = fold(run, domain.prepared(run, DIGEST, cached=True))

    def ends(run: domain.Run, attempt: int, **status: object) -> list[object]:
        run = fold(run, domain.starting(run, attempt, ["n"]))
        return list(domain.finished(run, attempt, ev.AttemptFinished(exit=c.ExitStatus(**status))))  # type: ignore[arg-type]

    delays = []
    for attempt in range(1, 4):
        (again,) = ends(run, attempt, reason=c.EXIT_REASON_EXITED, exit_code=75)
        assert isinstance(again, ev.RunRetrying) and again.attempt == attempt + 1
        delays.append(again.delay_seconds)
        assert isinstance(ends(run, attempt, reason=c.EXIT_REASON_EXITED, exit_code=1)[0], ev.RunFailed)
        assert isinstance(ends(run, attempt, reason=c.EXIT_REASON_EXITED, exit_code=0)[0], ev.RunCompleted)
        assert isinstance(ends(run, attempt, reason=c.EXIT_REASON_TIMEOUT)[0], ev.RunFailed)
        assert isinstance(ends(run, attempt, reason=c.EXIT_REASON_OUT_OF_MEMORY)[0], ev.RunRetrying)
        run = fold(run, [again])
    assert delays == [100, 200, 400]
    assert isinstance(ends(run, 4, reason=c.EXIT_REASON_EXITED, exit_code=75)[0], ev.RunFailed)


def test_making_room_costs_no_attempt() -> None:
    run = fold(domain.Run(), [ev.RunSubmitted(spec=c.RunSpec(max_attempts=1), image_digest=DIGEST)])
    run = fold(run, domain.prepared(run, DIGEST, cached=True))
    for attempt in (1, 2):
        run = fold(run, domain.starting(run, attempt, ["n"]))
        (again,) = domain.finished(run, attempt, ev.AttemptFinished(exit=c.ExitStatus(reason=c.EXIT_REASON_PREEMPTED)))
        assert isinstance(again, ev.RunRetrying) and again.preempted and again.attempt == attempt + 1
        run = fold(run, [again])
    run = fold(run, domain.starting(run, 3, ["n"]))
    assert isinstance(domain.revoked(run, 3, "lost")[-1], ev.RunFailed), "a lost node does cost one"
    canceled = fold(run, domain.cancel(run, "me", ""))
    (end,) = domain.finished(canceled, 3, ev.AttemptFinished(exit=c.ExitStatus(reason=c.EXIT_REASON_PREEMPTED)))
    assert isinstance(end, ev.RunCanceled)


def test_only_a_final_run_is_deleted_and_nothing_follows() -> None:
    now = ev.RunDeleted().submitted_at
    run = domain.evolve(domain.Run(), ev.RunSubmitted(spec=c.RunSpec(experiment="e")))
    with pytest.raises(domain.Rejected, match="it is NotStarted: cancel it"):
        domain.delete(run, "me", "", now)
    run = domain.evolve(run, ev.RunCompleted(attempt=2))
    (event,) = domain.delete(run, "me", "why", now)
    assert (event.deleted_by, event.reason, event.state, event.attempt, event.experiment) == ("me", "why", c.RUN_STATE_COMPLETED, 2, "e")  # type: ignore[attr-defined]
    for before in (run, domain.Run()):  # its events may be gone already
        gone = domain.evolve(before, event)
        assert gone.final and gone.deleted_by == "me"
        assert domain.delete(gone, "me", "", now) == domain.submit(gone, ev.RunSubmitted()) == []
