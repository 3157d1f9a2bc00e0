"""The filter language of ListRuns, as SQL."""

from __future__ import annotations

import base64
import json
import math
import re
from datetime import datetime
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.errors import InvalidArgument
from alveary_runs.domain import state_name

_CONDITION = re.compile(r'\s*([A-Za-z_][\w.\-]*)\s*(!=|<=|>=|=|<|>)\s*("(?:[^"\\]|\\.)*"|[^\s"]+)\s*')
_AND = re.compile(r"AND\b\s*", re.IGNORECASE)
_STATES = {state_name(v).lower(): v for v in c.RunState.values() if v}
_COLUMNS = {"experiment": "experiment", "parent": "parent", "name": "name", "target": "target", "id": "id"}
_HELP = 'conditions look like: state = Completed AND experiment = "birds" AND tags.stage = "prod" AND metrics.loss < 0.5'


def where(text: str) -> tuple[str, list[Any]]:
    """SQL condition and its parameters for a filter; every value is a bound parameter.

    Raises:
        InvalidArgument: the filter cannot be read; says where.
    """
    sql: list[str] = ["1"]
    parameters: list[Any] = []
    rest = text
    while rest.strip():
        if len(sql) > 1:
            joined = _AND.match(rest)
            if not joined:
                raise InvalidArgument(("filter", f"AND is expected before {rest[:40]!r}; {_HELP}"))
            rest = rest[joined.end() :]
        found = _CONDITION.match(rest)
        if not found:
            raise InvalidArgument(("filter", f"cannot read {rest[:40]!r}; {_HELP}"))
        field, operator, raw = found.groups()
        value = re.sub(r"\\(.)", r"\1", raw[1:-1]) if raw.startswith('"') else raw
        one, more = _condition(field, operator, value)
        sql.append(one)
        parameters += more
        rest = rest[found.end() :]
    return " AND ".join(sql), parameters


def _condition(field: str, operator: str, value: str) -> tuple[str, list[Any]]:
    kind, _, name = field.partition(".")
    if kind in ("tags", "properties") and name:
        exists = "EXISTS (SELECT 1 FROM labels l WHERE l.run = runs.id AND l.kind = ? AND l.key = ? AND l.value {} ?)"
        if operator == "!=":
            return "NOT " + exists.format("="), [kind, name, value]
        return exists.format(operator), [kind, name, value]
    if kind == "metrics" and name:
        try:
            number = float(value)
        except ValueError:
            raise InvalidArgument(("filter", f"{field} is compared with {value!r}, which is no number")) from None
        condition, more = _number(field, operator, number)
        return f"EXISTS (SELECT 1 FROM newest n WHERE n.run = runs.id AND n.name = ? AND n.value IS NOT NULL AND {condition})", [
            name,
            *more,
        ]
    if field == "state":
        state = _STATES.get(value.lower())
        if state is None or operator not in ("=", "!="):
            known = ", ".join(state_name(v) for v in _STATES.values())
            raise InvalidArgument(("filter", f"state {operator} {value}: use = or != with one of {known}"))
        return f"state {operator} ?", [int(state)]
    if field == "submitted_at":
        try:
            return f"submitted_at {operator} ?", [datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()]
        except ValueError:
            raise InvalidArgument(("filter", f"submitted_at: {value!r} is no ISO 8601 time")) from None
    if field in _COLUMNS:
        return f"{_COLUMNS[field]} {operator} ?", [value]
    raise InvalidArgument(("filter", f"there is no field {field!r}; {_HELP}"))


def _number(field: str, operator: str, number: float) -> tuple[str, list[Any]]:
    """A comparison with a metric's value, as IEEE 754 has it; "= nan" asks whether it is NaN."""
    if math.isnan(number):
        if operator not in ("=", "!="):
            raise InvalidArgument(("filter", f"{field} {operator} nan: no number is less or greater than nan; use = or !="))
        return f"n.nan {operator} 1", []
    if operator == "!=":
        return "(n.nan OR n.value != ?)", [number]
    return f"(NOT n.nan AND n.value {operator} ?)", [number]


def order(text: str) -> tuple[str, str]:
    """(name of a metric, or "" for the time of submission; "ASC" or "DESC") of an order_by.

    Raises:
        InvalidArgument: it cannot be read.
    """
    field, _, direction = (text or "submitted_at desc").strip().partition(" ")
    direction = direction.strip().upper() or "ASC"
    if direction not in ("ASC", "DESC"):
        raise InvalidArgument(("order_by", f"{text!r}: use '<field>' or '<field> desc'"))
    if field == "submitted_at":
        return "", direction
    if field.startswith("metrics.") and len(field) > 8:
        return field[8:], direction
    raise InvalidArgument(("order_by", f"{field!r}: use submitted_at or metrics.<name>"))


def encode_token(offset: list[Any]) -> str:
    """An opaque page token."""
    return base64.urlsafe_b64encode(json.dumps(offset).encode()).decode()


def decode_token(token: str) -> list[Any]:
    """The inverse.

    Raises:
        InvalidArgument: it is none of ours.
    """
    try:
        value = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and [type(x) for x in value] in ([int, float, str], [int, int, str]):
        return value
    raise InvalidArgument(("page_token", "not a token that ListRuns gave"))
