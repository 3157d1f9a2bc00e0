"""A run's whole life, on one page. Pure: no IO, no clock, no random.

Each command is a function (state, ...) -> events; `evolve` folds events. A command that comes too late or twice decides
nothing, nor does one for an attempt that is older than the newest or was revoked. Later attempts are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev

FINAL = frozenset({c.RUN_STATE_COMPLETED, c.RUN_STATE_FAILED, c.RUN_STATE_CANCELED})
_BEFORE_PREPARED = frozenset({c.RUN_STATE_NOT_STARTED, c.RUN_STATE_PREPARING})
_WAITING = frozenset({c.RUN_STATE_PREPARING, c.RUN_STATE_QUEUED, c.RUN_STATE_PROVISIONING, c.RUN_STATE_NOT_RESPONDING})
# Order of the states within an attempt.
_PROGRESS = {
    c.RUN_STATE_PREPARING: 0, c.RUN_STATE_QUEUED: 1, c.RUN_STATE_PROVISIONING: 1, c.RUN_STATE_NOT_RESPONDING: 1,
    c.RUN_STATE_STARTING: 2, c.RUN_STATE_RUNNING: 3, c.RUN_STATE_FINALIZING: 4,
}  # fmt: skip

Events = Sequence[Message]


_LONGEST_BACKOFF = 3600.0


class Rejected(Exception):
    """The command makes no sense for the run as it is; the text says why."""


@dataclass(frozen=True)
class Run:
    """A run as its events left it. `attempt` is the newest that began or is about to; 0: none yet."""

    state: c.RunState.ValueType = c.RUN_STATE_UNSPECIFIED
    spec: c.RunSpec = field(default_factory=c.RunSpec)
    submitted_by: str = ""
    image_digest: str = ""
    number: int = 0
    prepared: bool = False
    reason: str = ""
    attempt: int = 0
    # The next events must come from this attempt or a later one: earlier ones were revoked.
    first_valid_attempt: int = 1
    # Attempts that made room for others: they do not count.
    preemptions: int = 0
    nodes: tuple[str, ...] = ()
    cancel_requested: bool = False
    exit: c.ExitStatus | None = None
    manifest_digest: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)
    display_name: str = ""
    description: str = ""
    archived: bool = False
    compacted: bool = False
    # By whom; empty: it is there.
    deleted_by: str = ""

    @property
    def final(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in FINAL

    def current(self, attempt: int) -> bool:
        """Whether what `attempt` says still counts."""
        return not self.final and attempt >= max(self.first_valid_attempt, self.attempt)


def submit(run: Run, event: ev.RunSubmitted) -> Events:
    """Accept a run; a second submission of the same id decides nothing."""
    return [event] if run.state == c.RUN_STATE_UNSPECIFIED else []


def preparing(run: Run, digest: str, reason: str) -> Events:
    """Its image is being built."""
    if run.state not in _BEFORE_PREPARED or run.prepared or run.image_digest != digest:
        return []
    if run.state == c.RUN_STATE_PREPARING and run.reason == reason:
        return []
    return [ev.RunPreparing(image_digest=digest, reason=reason)]


def prepared(run: Run, digest: str, cached: bool) -> Events:
    """Its image is there."""
    if run.state not in _BEFORE_PREPARED or run.prepared or run.image_digest != digest:
        return []
    return [ev.RunPrepared(image_digest=digest, cached=cached, spec=run.spec, submitted_by=run.submitted_by)]


def image_failed(run: Run, digest: str, reason: str) -> Events:
    """Its image cannot be built."""
    if run.state not in _BEFORE_PREPARED or run.prepared or run.image_digest != digest:
        return []
    message = f"the environment could not be built: {reason}"
    exit_status = c.ExitStatus(reason=c.EXIT_REASON_BUILD_FAILED, message=message, last_lines=reason.splitlines()[-20:])
    return [ev.RunFailed(exit=exit_status, properties=run.properties)]


def queued(run: Run, reason: str) -> Events:
    """It waits for a place."""
    if run.final or run.state not in _WAITING or not run.prepared:
        return []
    if run.state == c.RUN_STATE_QUEUED and run.reason == reason:
        return []
    return [ev.RunQueued(reason=reason)]


def provisioning(run: Run, reason: str) -> Events:
    """Its target starts nodes."""
    if run.final or run.state not in _WAITING or not run.prepared:
        return []
    if run.state == c.RUN_STATE_PROVISIONING and run.reason == reason:
        return []
    return [ev.RunProvisioning(reason=reason)]


def _behind(run: Run, attempt: int, state: c.RunState.ValueType) -> bool:
    """Whether `attempt` being in `state` is news."""
    if not run.current(attempt) or run.state == c.RUN_STATE_CANCEL_REQUESTED:
        return False
    return attempt > run.attempt or _PROGRESS.get(run.state, 0) < _PROGRESS[state]


def starting(run: Run, attempt: int, nodes: Sequence[str]) -> Events:
    """An attempt has its place."""
    return [ev.RunStarting(attempt=attempt, nodes=nodes)] if _behind(run, attempt, c.RUN_STATE_STARTING) else []


def started(run: Run, attempt: int) -> Events:
    """The attempt's processes run."""
    return [ev.RunStarted(attempt=attempt)] if _behind(run, attempt, c.RUN_STATE_RUNNING) else []


def finalizing(run: Run, attempt: int) -> Events:
    """The processes ended; their outputs are being stored."""
    return [ev.RunFinalizing(attempt=attempt)] if _behind(run, attempt, c.RUN_STATE_FINALIZING) else []


def finished(run: Run, attempt: int, event: ev.AttemptFinished) -> Events:
    """The attempt is over and stored."""
    if not run.current(attempt):
        return []
    if run.cancel_requested:
        return [ev.RunCanceled(attempt=attempt, exit=event.exit, manifest_digest=event.manifest_digest, properties=run.properties)]
    if event.exit.reason == c.EXIT_REASON_PREEMPTED:
        return [
            ev.RunRetrying(
                attempt=attempt + 1, reason=f"attempt {attempt} made room for another run: {event.exit.message}", spec=run.spec,
                submitted_by=run.submitted_by, image_digest=run.image_digest, preempted=True,
            )
        ]  # fmt: skip
    if (again := _retried(run, attempt, event.exit)) is not None:
        return [again]
    kind = ev.RunCompleted if event.exit.reason == c.EXIT_REASON_EXITED and event.exit.exit_code == 0 else ev.RunFailed
    return [kind(attempt=attempt, exit=event.exit, manifest_digest=event.manifest_digest, properties=run.properties)]


def _retried(run: Run, attempt: int, status: c.ExitStatus) -> ev.RunRetrying | None:
    """The next attempt, where the run's policy asks for one."""
    policy, used = run.spec.retry, attempt - run.preemptions
    if status.reason == c.EXIT_REASON_EXITED and (
        status.exit_code == 0 or (policy.exit_codes and status.exit_code not in policy.exit_codes)
    ):
        return None
    if status.reason not in policy.on or used >= run.spec.max_attempts:
        return None
    delay = min(policy.backoff_seconds * 2.0 ** (used - 1), _LONGEST_BACKOFF)
    when = f"; again in {delay:g} s" if delay else ""
    return ev.RunRetrying(
        attempt=attempt + 1, reason=f"attempt {used} of {run.spec.max_attempts}: {status.message or exit_reasons.word(status.reason)}{when}", spec=run.spec,
        submitted_by=run.submitted_by, image_digest=run.image_digest, delay_seconds=delay,
    )  # fmt: skip


def revoked(run: Run, attempt: int, reason: str) -> Events:
    """The attempt's place was taken from it: its node is lost."""
    if not run.current(attempt):
        return []
    exit_status = c.ExitStatus(reason=c.EXIT_REASON_TRAINER_LOST, message=reason)
    if run.cancel_requested:
        return [ev.RunCanceled(attempt=attempt, exit=exit_status, properties=run.properties)]
    lost = ev.RunNotResponding(attempt=attempt, reason=reason)
    allowed = run.spec.max_attempts + run.preemptions
    if attempt < allowed:
        again = ev.RunRetrying(
            attempt=attempt + 1, reason=f"attempt {attempt} of {allowed}: {reason}", spec=run.spec,
            submitted_by=run.submitted_by, image_digest=run.image_digest,
        )  # fmt: skip
        return [lost, again]
    exit_status.message = f"{reason}; all {allowed} attempts were used"
    return [lost, ev.RunFailed(attempt=attempt, exit=exit_status, properties=run.properties)]


def resume_after_loss(run: Run) -> Events:
    """Finish what `revoked` began, had the service died between its two events."""
    if run.state != c.RUN_STATE_NOT_RESPONDING or run.first_valid_attempt > run.attempt + 1:
        return []
    probe = replace(run, first_valid_attempt=run.attempt)
    return list(revoked(probe, run.attempt, run.reason))[1:]


def cancel(run: Run, by: str, reason: str) -> Events:
    """Ask for its end, in any state.

    Raises:
        Rejected: it is final.
    """
    if run.final:
        raise Rejected(f"the run is {state_name(run.state)} already: there is nothing to cancel")
    return [] if run.cancel_requested else [ev.RunCancelRequested(requested_by=by, reason=reason)]


def released(run: Run) -> Events:
    """The scheduler holds no place for it and will never make one."""
    if run.final or not run.cancel_requested:
        return []
    exit_status = c.ExitStatus(reason=c.EXIT_REASON_CANCELED, message="canceled before it was started")
    return [ev.RunCanceled(exit=exit_status, properties=run.properties)]


def tag(run: Run, event: ev.RunTagged) -> Events:
    """Set and remove tags, add properties.

    Raises:
        Rejected: a property would change.
    """
    for key, value in event.properties.items():
        if run.properties.get(key, value) != value:
            raise Rejected(f"property {key!r} is {run.properties[key]!r}: properties can be added, never changed; use a tag")
    fresh = {k: v for k, v in event.set.items() if run.tags.get(k) != v}
    properties = {k: v for k, v in event.properties.items() if k not in run.properties}
    removed = [k for k in event.removed if k in run.tags]
    if not (fresh or properties or removed or event.HasField("display_name") or event.HasField("description")):
        return []
    return [event]


def compact(run: Run, submitted: ev.RunSubmitted, times: Mapping[str, Timestamp]) -> Events:
    """The whole of a final run in one event, that makes all earlier ones superfluous; once."""
    if not run.final or run.compacted:
        return []
    return [
        ev.RunCompacted(
            submitted=submitted, state=run.state, reason=run.reason, attempt=run.attempt, nodes=run.nodes,
            cancel_requested=run.cancel_requested, exit=run.exit, manifest_digest=run.manifest_digest, tags=run.tags,
            properties=run.properties, display_name=run.display_name, description=run.description, archived=run.archived,
            **times,
        )
    ]  # fmt: skip


def delete(run: Run, by: str, reason: str, submitted_at: Timestamp) -> Events:
    """Erase a final run; once.

    Raises:
        Rejected: it is not final.
    """
    if run.deleted_by:
        return []
    if not run.final:
        raise Rejected(f"it is {state_name(run.state)}: cancel it, or wait for its end, before it is deleted")
    return [
        ev.RunDeleted(
            deleted_by=by, reason=reason, state=run.state, attempt=run.attempt, experiment=run.spec.experiment, submitted_at=submitted_at
        )
    ]


def state_name(state: c.RunState.ValueType) -> str:
    """ "NotStarted" of RUN_STATE_NOT_STARTED: the names that users of Azure ML know."""
    known = c.RunState.DESCRIPTOR.values_by_number.get(state)
    if known is None:  # a newer version knows more
        return str(state)
    words = known.name.removeprefix("RUN_STATE_").split("_")
    return "".join(w.capitalize() for w in words)


def evolve(run: Run, event: Message) -> Run:
    """Fold one event."""
    match event:
        case ev.RunSubmitted():
            return replace(
                run, state=c.RUN_STATE_NOT_STARTED, spec=event.spec, submitted_by=event.submitted_by,
                image_digest=event.image_digest, number=event.number, tags=dict(event.spec.tags),
                properties=dict(event.spec.properties), display_name=event.spec.display_name,
                reason="accepted; its environment is looked up",
            )  # fmt: skip
        case ev.RunPreparing():
            return replace(run, state=c.RUN_STATE_PREPARING, reason=event.reason)
        case ev.RunPrepared():
            return replace(run, state=c.RUN_STATE_PREPARING, prepared=True, reason="its environment is ready")
        case ev.RunQueued():
            return replace(run, state=c.RUN_STATE_QUEUED, reason=event.reason)
        case ev.RunProvisioning():
            return replace(run, state=c.RUN_STATE_PROVISIONING, reason=event.reason)
        case ev.RunStarting():
            text = f"attempt {event.attempt} on {', '.join(event.nodes)}: files and environment are being staged"
            return replace(run, state=c.RUN_STATE_STARTING, attempt=event.attempt, nodes=tuple(event.nodes), reason=text)
        case ev.RunStarted():
            return replace(run, state=c.RUN_STATE_RUNNING, attempt=event.attempt, reason="")
        case ev.RunFinalizing():
            return replace(run, state=c.RUN_STATE_FINALIZING, attempt=event.attempt, reason="outputs are being stored")
        case ev.RunNotResponding():
            first = event.attempt + 1
            return replace(run, state=c.RUN_STATE_NOT_RESPONDING, first_valid_attempt=first, attempt=event.attempt, reason=event.reason)
        case ev.RunRetrying():
            return replace(
                run, state=c.RUN_STATE_QUEUED, reason=event.reason, first_valid_attempt=event.attempt,
                preemptions=run.preemptions + event.preempted,
            )  # fmt: skip
        case ev.RunCancelRequested():
            text = event.reason or f"{event.requested_by} asked for its end"
            return replace(run, state=c.RUN_STATE_CANCEL_REQUESTED, cancel_requested=True, reason=text)
        case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
            state = {ev.RunCompleted: c.RUN_STATE_COMPLETED, ev.RunFailed: c.RUN_STATE_FAILED}.get(type(event), c.RUN_STATE_CANCELED)
            return replace(
                run, state=state, exit=event.exit, manifest_digest=event.manifest_digest, reason=event.exit.message,
                attempt=event.attempt or run.attempt,
            )  # fmt: skip
        case ev.RunTagged():
            tags = {k: v for k, v in run.tags.items() if k not in event.removed} | dict(event.set)
            return replace(
                run, tags=tags, properties=run.properties | dict(event.properties),
                display_name=event.display_name if event.HasField("display_name") else run.display_name,
                description=event.description if event.HasField("description") else run.description,
            )  # fmt: skip
        case ev.RunArchived():
            return replace(run, archived=True)
        case ev.RunDeleted():
            return Run(
                state=event.state,
                attempt=event.attempt,
                spec=c.RunSpec(experiment=event.experiment),
                deleted_by=event.deleted_by or "somebody",
            )
        case ev.RunCompacted(submitted=first):
            return Run(
                state=event.state, spec=first.spec, submitted_by=first.submitted_by, image_digest=first.image_digest,
                number=first.number, prepared=True, reason=event.reason, attempt=event.attempt, nodes=tuple(event.nodes),
                cancel_requested=event.cancel_requested, exit=event.exit, manifest_digest=event.manifest_digest,
                tags=dict(event.tags), properties=dict(event.properties), display_name=event.display_name,
                description=event.description, archived=event.archived, compacted=True,
            )  # fmt: skip
    return run
