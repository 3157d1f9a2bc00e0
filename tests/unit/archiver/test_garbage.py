"""What nothing refers to: of any log and any listing, never too much."""

from __future__ import annotations

import hashlib

import pytest
from alveary_archiver.garbage import Doomed, Incomplete, Object, References, Run, mark, run_of, sweep, sweep_run
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Key, body, name_of

NOW, OLD = 1000.0, 500.0
RUN = "01JABCDEFGHJKMNPQRSTVWXYZ0"


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def told(*events: tuple[str, Message]) -> References:
    references = References()
    for ident, message in events:
        aggregate, name = name_of(message)
        mark(references, Key("w", aggregate, ident).subject(name), body(message))
    return references


DIGESTS = st.integers(0, 20).map(digest)
SPECS = st.builds(
    lambda snapshot, data, resume: c.RunSpec(
        snapshot=snapshot, resume_from=resume, inputs=[c.InputDataset(name="d", dataset="d", manifest_digest=data)]
    ),
    DIGESTS, DIGESTS, st.sampled_from(["", RUN]),
)  # fmt: skip


def files(spec: c.RunSpec) -> list[str]:
    """Digests that a run needs."""
    return [spec.snapshot, *(i.manifest_digest for i in spec.inputs)]


# (event, digests that must stay for it)
EVENTS = st.one_of(
    st.builds(lambda s: (ev.RunSubmitted(spec=s), set(files(s))), SPECS),
    st.builds(lambda s: (ev.RunRetrying(spec=s), set(files(s))), SPECS),
    st.builds(lambda s: (ev.RunCompacted(submitted=ev.RunSubmitted(spec=s)), set(files(s))), SPECS),
    st.builds(lambda s: (ev.PlacementMade(spec=s), set(files(s))), SPECS),
    st.builds(lambda s: (ev.ModelExportRequested(run=s), set(files(s))), SPECS),
    st.builds(lambda d: (ev.ModelExported(key=f"blobs/{d}", file=c.FileEntry(sha256=d)), {d}), DIGESTS),
    st.builds(lambda d: (ev.DatasetRegistered(manifest_digest=d), {d}), DIGESTS),
    st.builds(lambda d, e: (ev.ModelRegistered(manifest_digest=d, lineage=ev.Lineage(snapshot=e)), {d, e}), DIGESTS, DIGESTS),
    st.builds(lambda d: (ev.ModelRegistered(manifest=c.Manifest(files=[c.FileEntry(path="p", sha256=d)])), {d}), DIGESTS),
)


@given(st.lists(EVENTS), st.sets(DIGESTS), st.dictionaries(DIGESTS, st.floats(0, NOW)))
def test_what_an_event_or_a_claim_names_stays_and_all_else_that_is_old_goes(
    events: list[tuple[Message, set[str]]], claimed: set[str], there: dict[str, float]
) -> None:
    references = told(*((RUN, message) for message, _ in events))
    needed = claimed.union(*(digests for _, digests in events))
    objects = [Object(f"{kind}/{d}{end}", 1, at) for d, at in there.items() for kind, end in (("blobs", ""), ("manifests", ".json"))]
    gone = {one.key for one in sweep(objects, lambda d: references.names(d) or d in claimed, claimed.__contains__, OLD)}
    assert gone == {o.key for o in objects if o.changed < OLD and not any(d in o.key for d in needed)}


def test_of_a_bucket_only_what_is_known_goes() -> None:
    blob = digest("x")
    keys = ["collecting", "other/thing", f"blobs/{blob}x", "blobs/short", f"manifests/{blob}", "damaged/x-1", "claims/x", "probe/x"]
    keys += [f"incoming/{blob}"]
    found = sweep([Object(k, 3, 0.0) for k in keys], lambda _: True, lambda _: False, OLD)
    assert list(found) == [
        Doomed("damaged/x-1", 3, "damaged blobs"), Doomed("claims/x", 3, "marks of services"), Doomed("probe/x", 3, "marks of services"),
        Doomed(f"incoming/{blob}", 3, "unfinished uploads"),
    ]  # fmt: skip
    assert not list(sweep([Object(f"incoming/{blob}", 3, 0.0)], lambda _: False, lambda _: True, OLD))


def test_a_manifest_that_must_be_there_is_asked_for_until_its_run_is_deleted() -> None:
    spec = c.RunSpec(snapshot=digest("s"))
    few = ev.ModelRegistered(manifest_digest=digest("m"), manifest=c.Manifest(files=[c.FileEntry(path="p", sha256=digest("p"))]))
    events: list[tuple[str, Message]] = [(RUN, ev.RunSubmitted(spec=spec)), ("d", ev.DatasetRegistered(manifest_digest=digest("d")))]
    events += [("few", few), ("many", ev.ModelRegistered(manifest_digest=digest("n")))]
    others = {("datasets", digest("d")): "dataset d", ("models", digest("n")): "model many"}
    assert told(*events).required() == others | {("snapshots", digest("s")): f"run {RUN}"}
    assert told(*events, (RUN, ev.RunDeleted())).required() == others


@pytest.mark.parametrize(
    ("subject", "data"),
    [
        ("alveary.w.run.x.invented", b"{}"), ("alveary.w.run.x", b"{}"), ("alveary.w.comet.x.seen", b"{}"),
        ("alveary.w.run.x.submitted", b"{"), ("alveary.w.dataset.x.registered", b"[1]"), ("alveary.w.run.x.completed", b'{"attempt": "many"}'),
    ],
)  # fmt: skip
def test_an_event_that_cannot_be_read_ends_it(subject: str, data: bytes) -> None:
    with pytest.raises(Incomplete):
        mark(References(), subject, data)


ATTEMPTS = st.integers(1, 4)
KEYS = st.one_of(
    st.builds("{}/outputs/checkpoints/{}.pt".format, ATTEMPTS, ATTEMPTS),
    st.builds("{}/manifest.json".format, ATTEMPTS),
    st.builds("log-{}-9.binpb.zst".format, ATTEMPTS),
    st.builds("checkpoints/{}.json".format, ATTEMPTS),
    st.builds("checkpoints/{}.{}.json".format, ATTEMPTS, ATTEMPTS),
    st.builds("checkpoints/{}/{}".format, ATTEMPTS, DIGESTS),
    st.builds("checkpoints/{}.{}/{}".format, ATTEMPTS, ATTEMPTS, DIGESTS),
)
OBJECTS = st.dictionaries(KEYS, st.floats(0, NOW)).map(lambda found: [Object(f"{RUN}/{k}", 1, at) for k, at in found.items()])


@given(OBJECTS, st.integers(0, 4), st.booleans())
def test_of_a_run_that_is_over_the_files_log_and_newest_checkpoints_stay(objects: list[Object], attempt: int, resumed: bool) -> None:
    for run in (None, Run(deleted=True), Run(final=True, deleted=True)):
        gone = {one.key for one in sweep_run(RUN, run, resumed, objects, OLD)}
        assert gone == {o.key for o in objects if o.changed < OLD}
    assert not list(sweep_run(RUN, Run(), resumed, objects, OLD))
    kept = {o.key for o in objects} - {one.key for one in sweep_run(RUN, Run(final=True, attempt=attempt), resumed, objects, OLD)}
    newest = max((int(k.split("/")[2].split(".")[0]) for k, *_ in objects if k.endswith(".json") and "/checkpoints/" in k), default=0)
    for key, _, changed in objects:
        kind, _, rest = key.removeprefix(f"{RUN}/").partition("/")
        if kind == "checkpoints":
            stays = resumed or int(rest.partition("/")[0].partition(".")[0]) >= newest
        else:
            stays = kind.startswith("log-") or int(kind) >= attempt
        assert (key in kept) == (stays or changed >= OLD), key


def test_runs_are_followed_to_their_end() -> None:
    other = RUN[:-1] + "1"
    begun: list[tuple[str, Message]] = [(other, ev.RunSubmitted(spec=c.RunSpec(resume_from=RUN)))]
    assert told(*begun).resumed() == {RUN}
    for last in (ev.RunFailed(attempt=2), ev.RunCanceled(attempt=2), ev.RunCompleted(attempt=2), ev.RunCompacted(attempt=2)):
        ended = told(*begun, (other, last))
        assert (ended.runs[other].final, ended.runs[other].attempt, ended.resumed()) == (True, 2, set())
    assert run_of(f"{RUN}/1/x") == RUN
    assert [run_of(k) for k in ("probe/x", RUN, f"{RUN.lower()}/x", "")] == [""] * 4
