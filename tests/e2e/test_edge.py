"""What comes from outside, and is not as it should be: one stack that has to bear all of it."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from strategies import TEXTS, few, messages
from support import RUNTIME, Embedded, blocked, embedded, finished, submit, until

import alveary_contracts
from alveary import Model
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_core.eventlog import connect
from alveary_core.events import Key, body, envelope, name_of


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """A stack of this module's own: dead letters stay in it."""
    with embedded(tmp_path_factory.mktemp("edge"), runtime=RUNTIME) as running:
        yield running


def write_past_the_edge(stack: Embedded, service: str, *events: tuple[Key, Message | bytes]) -> int:
    """Write events as a service of an earlier version might have done, without any check; the last sequence."""
    known = json.loads((stack.state_dir / "stack.json").read_text())

    async def write() -> int:
        connection = await connect(f"nats://127.0.0.1:{known['ports']['nats']}", service, known["secrets"][service], service)
        try:
            for key, event in events:
                message = ev.RunSubmitted() if isinstance(event, bytes) else event
                data = event if isinstance(event, bytes) else body(event)
                headers = envelope(key, message, new_id(), service, "")
                last = await connection.jetstream().publish(key.subject(name_of(message)[1]), data, headers=headers)
            return last.seq
        finally:
            await connection.close()

    return asyncio.run(write())


def test_a_log_that_is_poisoned_already_stops_nobody(edge: Embedded) -> None:
    before = edge.pids()["control"]
    spec = ev.RunSubmitted().spec
    spec.experiment, spec.compute_target = "tests", "local"
    spec.resources.cpus = float("nan")
    run = new_id()
    submitted, prepared = ev.RunSubmitted(spec=spec, number=1), ev.RunPrepared(spec=spec)
    write_past_the_edge(edge, "runs", *((Key("default", "run", run), message) for message in (submitted, prepared)))
    spec.resources.cpus = float("inf")
    spec.launcher = 99  # type: ignore[assignment]
    submitted.spec.CopyFrom(spec)
    run = new_id()
    endless = ev.RunRetrying(spec=spec, delay_seconds=float("nan"))
    last = write_past_the_edge(edge, "runs", *((Key("default", "run", run), m) for m in (submitted, ev.RunPrepared(spec=spec), endless)))
    workspace = edge.workspace()
    client = workspace._client

    async def seen() -> None:
        from alveary_contracts.scheduler.v1 import scheduler_pb2

        await client.stubs.compute.GetTarget(scheduler_pb2.GetTargetRequest(name="local", min_sequence=last), metadata=client.metadata)

    workspace._call(seen())
    assert edge.pids()["control"] == before
    done = edge.cli("admin", "dead-letters", "list", "--json")
    letters = json.loads(done.stdout)
    assert {x["type"] for x in letters} == {"run.prepared", "run.retrying"}, letters
    assert {x["consumer"] for x in letters} == {"SchedulerProjection"}, letters
    # Whoever asks sees the run, and can end it.
    shown = workspace._call(client.runs.get(run))
    assert shown.spec.launcher == 99
    edge.cli("run", "cancel", run)
    until(lambda: workspace._call(client.runs.get(run)).state == c.RUN_STATE_CANCELED, "the poisoned run is canceled")
    assert blocked(edge.state_dir, "control") == []


def test_dead_letters_are_listed_tried_again_and_dropped(edge: Embedded) -> None:
    key = Key("default", "run", new_id())
    write_past_the_edge(edge, "runs", (key, b"not json"))
    consumers = {"runs/RunsProjection", "runs/runs", "images/ImagesProjection", "images/images"}

    def letters() -> list[dict[str, str]]:
        found = json.loads(edge.cli("admin", "dead-letters", "list", "--json").stdout)
        return [x for x in found if x["subject"] == key.subject("submitted")]

    until(lambda: {x["id"].rpartition("/")[0] for x in letters()} >= consumers, "every reader of run.submitted set it aside")
    plain = edge.cli("admin", "dead-letters", "list").stdout
    assert "run.submitted" in plain and "MalformedEvent" in plain and "Traceback" not in plain
    (one,) = [x["id"] for x in letters() if x["id"].startswith("runs/runs/")]
    failed = edge.cli("admin", "dead-letters", "retry", one, check=False)
    assert failed.returncode == 1 and "MalformedEvent" in failed.stderr
    (view,) = [x["id"] for x in letters() if x["id"].startswith("logs/LogsProjection/")]
    assert "is rebuilt when its service starts next" in edge.cli("admin", "dead-letters", "retry", view).stderr
    edge.cli("admin", "dead-letters", "drop", one)
    assert one not in [x["id"] for x in letters()]
    again = edge.cli("admin", "dead-letters", "drop", one, check=False)
    assert again.returncode == 1 and "there is no dead letter" in again.stderr
    nothing = edge.cli("admin", "dead-letters", "drop", check=False)
    assert nothing.returncode == 2 and "--all" in nothing.stderr
    edge.cli("admin", "dead-letters", "drop", "--all")
    assert letters() == []


# ---- any request --------------------------------------------------------------------------------------------------


def services() -> list[ServiceDescriptor]:
    """All services of the contracts that the stack's endpoint serves: all but that of trainers."""
    found = []
    for module in pkgutil.walk_packages(alveary_contracts.__path__, "alveary_contracts."):
        if module.name.endswith("_pb2"):
            found += importlib.import_module(module.name).DESCRIPTOR.services_by_name.values()
    return [s for s in found if s.name != "TrainerService"]


METHODS = [m for s in services() for m in s.methods]
# Values that would do more than a request should here: nodes that are started or drained, packages that are looked up on an index,
# waits of seconds for a run or a sequence that never comes.
FIXED: dict[str, Any] = {
    "ComputeSpec.min_nodes": (0, -1, 2**31 - 1), "Environment.pip_packages": ([], ["-e ."], ["not a requirement!"], ["\n"]),
    "Environment.conda_packages": ([], ["\n"]), "DeleteTargetRequest.name": ("", "a.b", "*", "x" * 300),
    "DrainNodeRequest.node": ("", "a", "*"), "UpdateTargetRequest.name": ("", "a"),
    "PrepareModelRequest.run_id": ("",), **{f"{m.input_type.name}.min_sequence": (0, -1, 1, -(2**63)) for m in METHODS},
}  # fmt: skip


@pytest.fixture(scope="module")
def known(edge: Embedded, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Ids and names of things that are there."""
    folder = tmp_path_factory.mktemp("known")
    workspace = edge.workspace()
    run = submit(workspace, folder, "from pathlib import Path; Path('outputs/m.pt').write_bytes(b'1'); print('hello')")
    details = finished(run)
    run.register_model("known", "outputs/m.pt")
    (folder / "data").mkdir()
    Path(folder, "data/a.txt").write_text("a")
    workspace._call(workspace._client.datasets.upload(folder / "data", "data"))
    assert Model(workspace, "known").version == 1
    return (run.id, details["spec"]["snapshot"], details["image_digest"], "known", "data", "tests", "known:1", "local-0", "outputs")


def call(channel: grpc.Channel, token: str, method: MethodDescriptor, request: Message) -> grpc.StatusCode:
    """Make a call and return how it ended; of a stream, after three answers at most."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    reply = GetMessageClass(method.output_type)
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=reply.FromString)
    sent: Any = iter([request]) if method.client_streaming else request
    metadata = (("authorization", f"Bearer {token}"),)
    try:
        if method.server_streaming:
            answers = stub(sent, metadata=metadata, timeout=0.5)
            for _, _ in zip(range(3), answers, strict=False):
                pass
            answers.cancel()
        else:
            stub(sent, metadata=metadata, timeout=60)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        details = error.details()  # type: ignore[attr-defined]
        streams = (grpc.StatusCode.DEADLINE_EXCEEDED,) if method.server_streaming else ()
        bad = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert code not in bad - {*streams}, f"{path}: {code}: {details}"
        assert details or code in streams, f"{path}: {code} without a sentence"
        return code
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def door(edge: Embedded) -> Iterator[tuple[grpc.Channel, str]]:
    """A channel to the stack, and an owner's token."""
    config = json.loads(edge.config.read_text())
    with grpc.insecure_channel(config["endpoint"], options=[("grpc.max_send_message_length", 64 << 20)]) as channel:
        yield channel, config["token"]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name.removeprefix("alveary."))
def test_no_request_is_an_internal_error(
    edge: Embedded, door: tuple[grpc.Channel, str], known: tuple[str, ...], method: MethodDescriptor
) -> None:
    before = edge.pids()

    @few(20)
    @given(messages(method.input_type, (*known, *known, *TEXTS), FIXED))
    def check(request: Message) -> None:
        call(*door, method, request)

    check()
    call(*door, method, GetMessageClass(method.input_type)())
    assert edge.pids() == before


FORGED = ["99999999999999999999", "-1", "²", "\u0661", "1.5", "=", "é", "[" * 4000] + [
    base64.urlsafe_b64encode(text.encode()).decode()
    for text in (
        "null", "{}", "[]", "[0]", '[0, 1, "a", 2]', '[{}, [], "a"]', f'[0, {10**400}, "a"]', '[0, 1e999, "a"]', '[0, NaN, "a"]', "[1, 1, 1]",
        f'[0, {2**64}, "\\ud800"]', '["a", -1, 0]', f'["a", {10**30}, 0]', '["a", 0, 9223372036854775807]', '[true, true, "a"]', "[" * 2000,
    )
]  # fmt: skip


@pytest.mark.parametrize("method", [m for m in METHODS if "page_token" in m.input_type.fields_by_name], ids=lambda m: m.name)
def test_no_page_token_is_an_internal_error(door: tuple[grpc.Channel, str], known: tuple[str, ...], method: MethodDescriptor) -> None:
    given_names = {"run_id": known[0], "name": "data" if "Dataset" in method.name else "known"}
    for token in FORGED:
        request: Any = GetMessageClass(method.input_type)(page_token=token)
        for field, value in given_names.items():
            if field in method.input_type.fields_by_name and method.name != "ListModels":
                setattr(request, field, value)
        # NOT_FOUND: another test has deleted what is asked for.
        assert call(*door, method, request) in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), token


def test_bytes_that_are_no_request_are_refused(edge: Embedded, door: tuple[grpc.Channel, str]) -> None:
    channel, token = door
    for method in METHODS:
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        stub = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
        data = b"\xff\xff\xff"
        with pytest.raises(grpc.RpcError, match="its bytes are no message of the type that this call takes") as caught:
            answer = stub(iter([data]) if method.client_streaming else data, metadata=(("authorization", f"Bearer {token}"),), timeout=30)
            list(answer) if method.server_streaming else None
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, method.full_name  # type: ignore[attr-defined]


def test_after_all_that_the_platform_works(edge: Embedded, door: tuple[grpc.Channel, str], tmp_path: Path) -> None:
    health: Any = health_pb2_grpc.HealthStub(door[0])
    for name in ["", *(s.full_name for s in services())]:
        assert health.Check(health_pb2.HealthCheckRequest(service=name), timeout=30).status == health_pb2.HealthCheckResponse.SERVING, name
    finished(submit(edge.workspace(), tmp_path, "print('hello')"))
    assert blocked(edge.state_dir, "control") == []


def test_numbers_that_are_none_are_refused_where_they_are_given(edge: Embedded, tmp_path: Path) -> None:
    Path(tmp_path, "train.py").write_text("")
    for value in ("nan", "1e308", "-1"):
        done = edge.cli("run", "submit", "--source", str(tmp_path), f"--cpus={value}", "train.py", check=False)
        assert done.returncode in (1, 2), (value, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr and "cpus" in done.stderr, (value, done.stderr)
