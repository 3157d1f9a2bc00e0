"""Random messages of the contracts, made from their descriptors: a new field, message or service is included by itself.

ALVEARY_TEST_EXAMPLES=n makes n times as many examples, with a random seed each time; by default they are few and the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from alveary_contracts.rules import repeated

EXAMPLES = int(os.environ.get("ALVEARY_TEST_EXAMPLES", "1"))
_INT = {FieldDescriptor.CPPTYPE_INT32: 31, FieldDescriptor.CPPTYPE_INT64: 63}
# What has hurt somebody somewhere.
TEXTS = (
    "", "a", "b", "*", ">", "a.b", ".", "..", "../x", "a/b", "x" * 300, "x" * 100_000, "\0", "a\0b", "\n", " ", "é", "e\u0301", "\U0001f600", "%", "%2E",
    "'; DROP TABLE runs; --", "\u202e", "-1", "0", "99999999999999999999", "1e308", "NaN", "null", "[]", "WyJhIiwgMV0=", "--help", "$HOME", "*.*",
    'state = Completed', 'metrics.loss < 1e999', 'metrics."a b" = nan', 'submitted_at > "9999-12-31T23:59:59Z"', "metrics.x desc", "local", "default",
)  # fmt: skip
NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324, 1e15, 2.0**63)


def few(examples: int) -> settings:
    """Settings of a property test that runs in CI: the same examples each time, and no verdict by the clock."""
    return settings(
        max_examples=examples * EXAMPLES, derandomize=EXAMPLES == 1, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def messages(
    descriptor: Descriptor, texts: Sequence[str] = TEXTS, fixed: Mapping[str, Sequence[Any]] | None = None, depth: int = 5
) -> st.SearchStrategy[Message]:
    """Messages of a type. Strings are often of `texts`; a field "Message.field" in `fixed` has one of those values, or none."""
    fixed = fixed or {}
    kind = GetMessageClass(descriptor)
    if descriptor.full_name == "google.protobuf.Timestamp":
        return st.sampled_from([(0, 0), (1_700_000_000, 5), (-1, 0), (10**15, 0), (0, -1), (2**62, 2**30)]).map(
            lambda pair: kind(seconds=pair[0], nanos=pair[1])
        )
    if depth == 0:
        return st.just(kind())

    @st.composite
    def make(draw: st.DrawFn) -> Message:
        message = kind()
        chosen = (
            draw(st.lists(st.sampled_from(list(descriptor.fields)), max_size=6, unique_by=lambda f: f.number))
            if list(descriptor.fields)
            else []
        )
        for field in chosen:
            name = f"{descriptor.name}.{field.name}"
            if name in fixed:
                one = draw(st.sampled_from(list(fixed[name])))
                if repeated(field):
                    getattr(message, field.name).extend(one)
                else:
                    setattr(message, field.name, one)
            else:
                _fill(draw, message, field, texts, fixed, depth)
        return message

    return make()


def _fill(
    draw: st.DrawFn, message: Any, field: FieldDescriptor, texts: Sequence[str], fixed: Mapping[str, Sequence[Any]], depth: int
) -> None:
    target = getattr(message, field.name)
    if repeated(field) and field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for _ in range(draw(st.integers(0, 3))):
            one = draw(_value(key, texts, fixed, depth))
            if value.message_type is not None:
                target[one].CopyFrom(draw(_value(value, texts, fixed, depth)))
            else:
                target[one] = draw(_value(value, texts, fixed, depth))
    elif repeated(field):
        target.extend(draw(st.lists(_value(field, texts, fixed, depth), max_size=3)))
    elif field.message_type is not None:
        target.CopyFrom(draw(_value(field, texts, fixed, depth)))
    else:
        setattr(message, field.name, draw(_value(field, texts, fixed, depth)))


def _value(field: FieldDescriptor, texts: Sequence[str], fixed: Mapping[str, Sequence[Any]], depth: int) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        return messages(field.message_type, texts, fixed, depth - 1)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return st.sampled_from([*field.enum_type.values_by_number, 99, -1])
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return st.sampled_from(NUMBERS) | st.floats(width=32)
    if kind in _INT:
        most = 2 ** _INT[kind] - 1
        return st.sampled_from([0, 1, 2, 3, -1, 1000, most, -most - 1]) | st.integers(-most - 1, most)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=50)
    # Lone surrogates are no text of a protobuf message: they cannot be sent.
    return st.sampled_from(list(texts)) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
