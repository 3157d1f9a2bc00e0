"""Reading events is fast and the same as with json_format, for every message and whatever the JSON is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core import protojson
from alveary_core.events import body

EVENTS = [getattr(ev, name) for name in ev.DESCRIPTOR.message_types_by_name]
F = FieldDescriptor
VALUES: dict[int, st.SearchStrategy[Any]] = {
    F.TYPE_STRING: st.text(max_size=5), F.TYPE_BYTES: st.binary(max_size=5), F.TYPE_BOOL: st.booleans(), F.TYPE_DOUBLE: st.floats(),
    F.TYPE_FLOAT: st.floats(width=32), F.TYPE_INT32: st.integers(-(2**31), 2**31 - 1), F.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    F.TYPE_UINT64: st.integers(0, 2**64 - 1), F.TYPE_UINT32: st.integers(0, 2**32 - 1),
}  # fmt: skip


def repeated(field: Any) -> bool:
    return bool(field.is_repeated) if hasattr(field, "is_repeated") else field.label == F.LABEL_REPEATED


def fill(draw: Any, message: Message, depth: int = 0) -> None:
    field: Any
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            value, key = entry.fields_by_name["value"], draw(VALUES[entry.fields_by_name["key"].type])
            if value.type == F.TYPE_MESSAGE:
                fill(draw, getattr(message, field.name)[key], depth + 1)
            else:
                getattr(message, field.name)[key] = draw(VALUES[value.type])
        elif entry is not None and entry.full_name == "google.protobuf.Timestamp":
            getattr(message, field.name).FromNanoseconds(draw(st.integers(-(2**60), 2**61)))
        elif entry is not None:
            if depth > 3:
                continue
            target = getattr(message, field.name)
            fill(draw, target.add() if repeated(field) else target, depth + 1)
        else:
            one = VALUES[field.type] if field.type != F.TYPE_ENUM else st.sampled_from([v.number for v in field.enum_type.values])
            if repeated(field):
                getattr(message, field.name).extend(draw(st.lists(one, max_size=3)))
            else:
                setattr(message, field.name, draw(one))


@st.composite
def event(draw: Any) -> Message:
    made: Message = draw(st.sampled_from(EVENTS))()
    fill(draw, made)
    return made


@given(event())
@settings(max_examples=300, deadline=None)
def test_every_event_is_read_as_it_was_written(message: Message) -> None:
    data = body(message)
    assert protojson.parse(data, type(message)).SerializeToString(deterministic=True) == Parse(data, type(message)()).SerializeToString(
        deterministic=True
    )


@given(event())
@settings(max_examples=50, deadline=None)
def test_what_is_written_needs_no_help(message: Message) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protojson, "Parse", lambda *_, **__: pytest.fail(f"json_format was asked: {MessageToJson(message)}"))
        protojson.parse(body(message), type(message))


@pytest.mark.parametrize(
    "text",
    [
        '{"newField": {"deep": [1]}, "number": "7"}', '{"submitted_by": "x"}', '{"number": 7}', '{"number": null, "submittedBy": null}',
        '{"spec": {"nodeCount": 2.0}}', '{"spec": {"resources": {"cpus": "NaN"}}}', '{"spec": {"resources": {"cpus": "1.5"}}}', "{}",
        '{"spec": {"unknown": null}}', '{"spec": null}', '{"spec": {"tags": {"a": "b"}}}', '{"spec": {"arguments": []}}',
    ],
)  # fmt: skip
def test_other_spellings_are_read_as_json_format_reads_them(text: str) -> None:
    found, wanted = protojson.parse(text.encode(), ev.RunSubmitted), Parse(text, ev.RunSubmitted(), ignore_unknown_fields=True)
    assert found.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "1", "{", '{"number": "x"}', '{"number": true}', '{"submittedBy": 1}', '{"submittedBy": ["x"]}',
        '{"spec": {"tags": {"a": 1}}}', '{"spec": {"arguments": "abc"}}', '{"spec": {"arguments": [null]}}', '{"number": "99999999999999999999"}',
        '{"spec": {"resources": {"cpus": "x"}}}', '{"spec": {"nodeCount": 1.5}}', '{"spec": {"useGpu": 1}}', '{"submittedBy": "\\ud800"}',
        '{"number": "--1"}', "\xff",
    ],
)  # fmt: skip
def test_what_json_format_refuses_is_refused(text: str) -> None:
    data = text.encode("latin-1")
    with pytest.raises((ParseError, ValueError)):
        Parse(data, ev.RunSubmitted(), ignore_unknown_fields=True)
    with pytest.raises((ParseError, ValueError)):
        protojson.parse(data, ev.RunSubmitted)


def test_numbers_that_are_none_are_read() -> None:
    data = json.dumps({"spec": {"resources": {"cpus": "NaN"}}}).encode()
    assert math.isnan(protojson.parse(data, ev.RunSubmitted).spec.resources.cpus)
