"""The table of what values may be."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from alveary_contracts import rules
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.images.v1 import images_pb2
from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.registry.v1 import registry_pb2 as reg
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.scheduler.v1 import scheduler_pb2
from alveary_contracts.trainer.v1 import trainer_pb2

FILES = [m.DESCRIPTOR for m in (c, ev, images_pb2, logs_pb2, reg, pb, scheduler_pb2, trainer_pb2)]
MESSAGES: dict[str, Descriptor] = {}
for file in FILES:
    for name, descriptor in file.message_types_by_name.items():
        assert name not in MESSAGES, f"two messages are called {name}: rules are by name"
        MESSAGES[name] = descriptor


def test_every_rule_is_of_a_field_that_exists_and_fits_its_type() -> None:
    for key, rule in rules.RULES.items():
        message, _, name = key.partition(".")
        assert message in MESSAGES, key
        if not name:
            assert isinstance(rule, rules.Size), key
            continue
        field = MESSAGES[message].fields_by_name[name]
        assert isinstance(rule, rules.Many) == rules.repeated(field), key
        kind = rule.each if isinstance(rule, rules.Many) else rule
        value = field.message_type.fields_by_name["value"] if rules._is_map(field) else field  # type: ignore[union-attr]
        fits: dict[type, tuple[Any, ...]] = {
            rules.Number: (*rules._FLOATS, *rules._INTEGERS), rules.Text: (value.CPPTYPE_STRING,), rules.Data: (value.CPPTYPE_STRING,),
        }  # fmt: skip
        assert kind is None or value.cpp_type in fits[type(kind)], key


def spec(**fields: Any) -> pb.SubmitRunRequest:
    return pb.SubmitRunRequest(spec=c.RunSpec(**fields))


@pytest.mark.parametrize(
    ("message", "path", "text"),
    [
        (spec(resources=c.Resources(cpus=float("nan"))), "spec.resources.cpus", "nan: a number from 0 to 1,000,000 is needed"),
        (spec(resources=c.Resources(cpus=float("inf"))), "spec.resources.cpus", "inf: a number from 0 to 1,000,000 is needed"),
        (spec(resources=c.Resources(cpus=1e308)), "spec.resources.cpus", "1e+308: a number from 0 to 1,000,000 is needed"),
        (spec(resources=c.Resources(cpus=-1)), "spec.resources.cpus", "-1: a number from 0 to 1,000,000 is needed"),
        (spec(resources=c.Resources(memory_bytes=-(2**63))), "spec.resources.memory_bytes", "a number from 0 to"),
        (spec(max_run_duration_seconds=float("-inf")), "spec.max_run_duration_seconds", "-inf: a number from 0 to 1,000,000,000 is needed"),
        (spec(retry=c.RetryPolicy(backoff_seconds=float("nan"))), "spec.retry.backoff_seconds", "nan: a number"),
        (spec(launcher=99), "spec.launcher", "99 is no Launcher: use one of LAUNCHER_UNSPECIFIED, LAUNCHER_PLAIN"),
        (spec(display_name="x" * 257), "spec.display_name", "257 characters: at most 256 are allowed"),
        (spec(arguments=["a", "b\0c"]), "spec.arguments[1]", "'b\\x00c': a NUL character is not allowed"),
        (spec(arguments=["x"] * 10_001), "spec.arguments", "10,001 items: at most 10,000 are allowed"),
        (spec(tags={str(i): "" for i in range(1001)}), "spec.tags", "1,001 entries: at most 1,000 are allowed"),
        (spec(tags={"k": "v" * 8193}), "spec.tags['k']", "8,193 characters"),
        (spec(tags={"k" * 257: "v"}), "spec.tags (key)", "257 characters"),
        (spec(arguments=["x" * 90_000] * 6), "spec", "bytes: at most 524,288 are allowed"),
        (spec(snapshot="../../x"), "spec.snapshot", "lower-case hex"),
        (
            scheduler_pb2.UpdateTargetRequest(spec=ev.ComputeSpec(quotas=[ev.Quota(), ev.Quota(weight=float("nan"))])),
            "spec.quotas[1].weight", "nan: a number from 0 to 1,000,000 is needed",
        ),
        (
            scheduler_pb2.CreateTargetRequest(spec=ev.ComputeSpec(idle_seconds_before_scaledown=float("inf"))),
            "spec.idle_seconds_before_scaledown", "inf: a number",
        ),
        (pb.SubscribeRequest(start=pb.SubscribeStart(from_time={"seconds": 10**15})), "start.from_time", "a time of the years 1 to 9999"),  # type: ignore[arg-type]
        (pb.SubscribeRequest(start=pb.SubscribeStart(from_time={"nanos": -1})), "start.from_time", "a time of the years 1 to 9999"),  # type: ignore[arg-type]
        (pb.LogMetricsRequest(points=[pb.MetricPoint(name="x" * 257)]), "points[0].name", "257 characters"),
        (reg.RegisterModelRequest(tags={"k": "a\0"}), "tags['k']", "NUL"),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_named_with_its_value_and_what_is_allowed(message: Any, path: str, text: str) -> None:
    ((found, why),) = rules.problems(message)
    assert found == path
    assert text in why


def test_what_may_be_any_number_may() -> None:
    points = [pb.MetricPoint(name="loss", scalar=float("nan")), pb.MetricPoint(name="l", list=pb.NumberList(values=[float("inf"), 1]))]
    assert rules.problems(pb.LogMetricsRequest(run_id="r", points=points)) == []
    assert rules.problems(ev.ModelExported(max_abs_diff=float("nan"))) == []


def test_of_many_violations_the_first_are_told() -> None:
    assert len(rules.problems(pb.LogMetricsRequest(points=[pb.MetricPoint(name="\0")] * 1000))) == rules.MOST_PROBLEMS


def test_texts_of_events_are_not_held_against_them_and_numbers_are() -> None:
    long = ev.RunFailed(exit=c.ExitStatus(message="\0" * 100_000))
    assert rules.problems(long, texts=False) == []
    bad = ev.RunPrepared(spec=c.RunSpec(resources=c.Resources(cpus=float("nan")), launcher=7))  # type: ignore[arg-type]
    assert [path for path, _ in rules.problems(bad, texts=False)] == ["spec.resources.cpus", "spec.launcher"]


def test_requests_have_a_size() -> None:
    assert rules.too_large(pb.ListRunsRequest(filter="x" * (5 << 20))) == "5,242,885 bytes: at most 4,194,304 are allowed"
    assert rules.too_large(pb.PrepareSnapshotRequest(manifest=c.Manifest(files=[c.FileEntry(path="x" * 1000)] * 20_000))) == ""
