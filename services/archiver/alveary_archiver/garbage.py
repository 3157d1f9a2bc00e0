"""What nothing refers to. Pure: events give references, and references and a listing give what is left over.

Digests are taken from the text of every event, whatever its kind and field: a digest that any event names keeps the blob and the
manifest of that name in every bucket. So an event or field that was not thought of here keeps too much, never too little. Runs are
followed by their events, since their objects are named by run and attempt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.json_format import ParseError
from google.protobuf.message import Message

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import event_name, message_name, untoken
from alveary_core.protojson import parse

_DIGEST = re.compile(rb"[0-9a-f]{64}")
_BLOB, _MANIFEST = re.compile(r"(?:blobs|incoming)/([0-9a-f]{64})"), re.compile(r"manifests/([0-9a-f]{64})\.json")
_RUN = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
_CHECKPOINT = re.compile(r"checkpoints/(\d+)(?:\.\d+)?(?:/.*|\.json)")
_OUTPUT = re.compile(r"(\d+)/.*", re.DOTALL)


class Incomplete(Exception):
    """Something that may refer to files cannot be read: nothing may be removed. The text says what."""


class Object(NamedTuple):
    """An object of a listing. `changed`: seconds since 1970."""

    key: str
    size: int
    changed: float


class Doomed(NamedTuple):
    """An object that nothing refers to, and what it is."""

    key: str
    size: int
    kind: str


@dataclass
class Run:
    """What matters of a run."""

    final: bool = False
    deleted: bool = False
    # Of a final run: the attempt whose files are the run's; 0: none.
    attempt: int = 0
    snapshot: str = ""
    resume_from: str = ""


@dataclass
class References:
    """What the event log refers to."""

    # Binary, which takes half of the memory.
    digests: set[bytes] = field(default_factory=set)
    # Those that came since it was emptied last.
    fresh: set[bytes] = field(default_factory=set)
    runs: dict[str, Run] = field(default_factory=dict)
    # Manifests that must be there, by bucket and digest, and who needs them.
    needed: dict[tuple[str, str], str] = field(default_factory=dict)

    def names(self, digest: str) -> bool:
        """Whether an event names it."""
        return bytes.fromhex(digest) in self.digests

    def required(self) -> dict[tuple[str, str], str]:
        """Manifests without which it is not known which blobs are needed."""
        sources = {("snapshots", run.snapshot): f"run {name}" for name, run in self.runs.items() if run.snapshot and not run.deleted}
        return self.needed | sources

    def resumed(self) -> set[str]:
        """Runs whose checkpoints another run, that is not over, begins with."""
        return {r.resume_from for r in self.runs.values() if r.resume_from and not (r.final or r.deleted)}


def digests_of(text: bytes) -> Iterator[bytes]:
    """All digests that a text names, binary."""
    return (bytes.fromhex(found.decode()) for found in _DIGEST.findall(text))


def mark(references: References, subject: str, data: bytes) -> None:
    """Add what one message of the log refers to; messages come in their order.

    Raises:
        Incomplete: it is no event that this version knows, or cannot be read.
    """
    new = set(digests_of(data)) - references.digests
    references.digests |= new
    references.fresh |= new
    parts = subject.split(".")
    name = message_name(parts[2], parts[4]) if len(parts) == 5 else ""
    kind: type[Message] | None = getattr(ev, name, None) if name else None
    if kind is None or event_name(name) != (parts[2], parts[4]):
        raise Incomplete(f"this version does not know the event {subject}: use the newest version that writes into this log")
    if parts[2] not in ("run", "dataset", "model"):
        return
    try:
        message = parse(data, kind)
    except (ParseError, ValueError, RecursionError) as error:
        raise Incomplete(f"the event {subject} cannot be read: {error}") from error
    ident = untoken(parts[3])
    match message:
        case ev.DatasetRegistered():
            references.needed["datasets", message.manifest_digest] = f"dataset {ident}"
        case ev.ModelRegistered() if message.manifest_digest and not message.manifest.files:
            references.needed["models", message.manifest_digest] = f"model {ident}"
        case _ if parts[2] == "run":
            _follow(references.runs.setdefault(ident, Run()), message)


def _follow(run: Run, message: Message) -> None:
    match message:
        case ev.RunSubmitted():
            run.snapshot, run.resume_from = message.spec.snapshot, message.spec.resume_from
        case ev.RunCompleted() | ev.RunFailed() | ev.RunCanceled():
            run.final, run.attempt = True, message.attempt
        case ev.RunCompacted():
            run.final, run.attempt, run.snapshot = True, message.attempt, message.submitted.spec.snapshot
        case ev.RunDeleted():
            run.deleted = True


def sweep(objects: Iterable[Object], kept: Callable[[str], bool], claimed: Callable[[str], bool], oldest: float) -> Iterator[Doomed]:
    """What is left over of a bucket of blobs and manifests.

    `kept`: whether something refers to a digest. `claimed`: whether something is about to. `oldest`: what changed later stays,
    seconds since 1970.
    """
    for key, size, changed in objects:
        if changed >= oldest:
            continue
        if found := _MANIFEST.fullmatch(key):
            if not kept(found[1]):
                yield Doomed(key, size, "manifests")
        elif found := _BLOB.fullmatch(key):
            if key.startswith("incoming/"):
                # What it becomes may be there already; then this is left of a process that was killed.
                if not claimed(found[1]):
                    yield Doomed(key, size, "unfinished uploads")
            elif not kept(found[1]):
                yield Doomed(key, size, "blobs")
        elif key.startswith("damaged/"):
            yield Doomed(key, size, "damaged blobs")
        elif key.startswith(("claims/", "probe/")):
            yield Doomed(key, size, "marks of services")


def digest_of(key: str) -> str:
    """The digest that an object of a bucket of blobs is named by; empty: none."""
    found = _MANIFEST.fullmatch(key) or _BLOB.fullmatch(key)
    return found[1] if found else ""


def run_of(key: str) -> str:
    """The run that an object of bucket `runs` belongs to; empty: none."""
    name = key.partition("/")[0]
    return name if "/" in key and _RUN.fullmatch(name) else ""


def sweep_run(name: str, run: Run | None, resumed: bool, objects: Iterable[Object], oldest: float) -> Iterator[Doomed]:
    """What is left over of one run's objects, all of which `objects` must be. `run`: None where the log does not know it.

    Of a final run the files of its final attempt stay, its log, and the newest checkpoints, which `resume_from` finds.
    """
    everything = list(objects)
    if run is None or run.deleted:
        kind = "of deleted runs" if run else "of unknown runs"
        yield from (Doomed(key, size, kind) for key, size, changed in everything if changed < oldest)
        return
    if not run.final:
        return
    rest = [(one, one.key[len(name) + 1 :]) for one in everything]
    listings = [int(found[1]) for _, key in rest if key.endswith(".json") and (found := _CHECKPOINT.fullmatch(key)) and "/" not in key[12:]]
    newest = max(listings, default=0)
    for one, key in rest:
        if one.changed >= oldest:
            continue
        if found := _OUTPUT.fullmatch(key):
            if int(found[1]) < run.attempt:
                yield Doomed(one.key, one.size, "outputs of lost attempts")
        elif (found := _CHECKPOINT.fullmatch(key)) and int(found[1]) < newest and not resumed:
            yield Doomed(one.key, one.size, "checkpoints of earlier attempts")
