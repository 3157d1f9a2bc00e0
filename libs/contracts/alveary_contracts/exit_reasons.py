"""Exit reasons as users write and read them: "out_of_memory" of EXIT_REASON_OUT_OF_MEMORY."""

from __future__ import annotations

from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c

_PREFIX = "EXIT_REASON_"


def word(reason: c.ExitReason.ValueType) -> str:
    """The word for a reason: "" for none, the number for one that a newer version added."""
    known = c.ExitReason.DESCRIPTOR.values_by_number.get(reason)
    if known is None:
        return str(reason)
    return known.name.removeprefix(_PREFIX).lower() if reason else ""


def from_word(text: str) -> c.ExitReason.ValueType:
    """The inverse.

    Raises:
        ValueError: no reason has this word.
    """
    name = _PREFIX + text.upper()
    if text != text.lower() or name not in c.ExitReason.keys()[1:]:
        raise ValueError(f"{text!r} is not an exit reason")
    return c.ExitReason.Value(name)


def with_words(data: Any) -> Any:
    """A copy of the proto3 JSON of a message in which reasons of ExitStatus and RetryPolicy are words."""
    if isinstance(data, dict):
        return {key: _word_of(value) if key in ("reason", "on") else with_words(value) for key, value in data.items()}
    return [with_words(one) for one in data] if isinstance(data, list) else data


def _word_of(value: Any) -> Any:
    if isinstance(value, list):
        return [_word_of(one) for one in value]
    return word(c.ExitReason.Value(value)) if isinstance(value, str) and value in c.ExitReason.DESCRIPTOR.values_by_name else value
