"""The filter language of ListRuns: conditions and orders, read from text."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.errors import InvalidArgument
from alveary_runs.domain import state_name

_QUOTED = r'"(?:[^"\\]|\\.)*"'
# A name may be anything: in quotes, or as it is where it has no blanks, quotes or operators.
# Backticks quote too, as in filters of MLflow.
_FIELD = rf'(?:tags|properties|metrics)\.(?:{_QUOTED}|`[^`]*`|[^\s"`=!<>]+)|[A-Za-z_]\w*'
_CONDITION = re.compile(rf'\s*({_FIELD})\s*(!=|<=|>=|=|<|>)\s*({_QUOTED}|[^\s"]+)\s*', re.DOTALL)
_ORDER = re.compile(rf"\s*({_FIELD})(?:\s+(asc|desc))?\s*", re.IGNORECASE | re.DOTALL)
_AND = re.compile(r"AND\b\s*", re.IGNORECASE)
_STATES = {state_name(v).lower(): v for v in c.RunState.values() if v}
_COLUMNS = ("experiment", "parent", "name", "target", "id")
_HELP = (
    'conditions look like: state = Completed AND experiment = "birds" AND tags.stage = "prod" AND metrics.loss < 0.5 '
    'AND metrics."train/loss" < 0.5'
)
_MOST = 50


@dataclass(frozen=True)
class Condition:
    """One comparison. `kind`: "tags", "properties", "metrics" with a `name`, or "" with `name` a column of runs."""

    kind: str
    name: str
    operator: str
    value: Any


def conditions(text: str) -> list[Condition]:
    """The conditions of a filter, all of which must hold.

    Raises:
        InvalidArgument: it cannot be read; says where.
    """
    found: list[Condition] = []
    rest = text
    while rest.strip():
        if found:
            joined = _AND.match(rest)
            if not joined:
                raise InvalidArgument(("filter", f"AND is expected before {rest[:40]!r}; {_HELP}"))
            rest = rest[joined.end() :]
        match = _CONDITION.match(rest)
        if not match:
            raise InvalidArgument(("filter", f"cannot read {rest[:40]!r}; {_HELP}"))
        if len(found) == _MOST:
            raise InvalidArgument(("filter", f"at most {_MOST} conditions"))
        field, operator, raw = match.groups()
        found.append(_condition(*_split(field, "filter"), operator, _unquoted(raw) if raw.startswith('"') else raw))
        rest = rest[match.end() :]
    return found


def _unquoted(raw: str) -> str:
    if raw.startswith("`"):
        return raw[1:-1]
    return re.sub(r"\\(.)", r"\1", raw[1:-1], flags=re.DOTALL) if raw.startswith('"') else raw


def _split(field: str, where: str) -> tuple[str, str]:
    kind, dot, name = field.partition(".")
    if not dot:
        return "", field
    name = _unquoted(name)
    if not name:
        raise InvalidArgument((where, f'{kind}."": a name is missing; {_HELP}'))
    return kind, name


def _condition(kind: str, name: str, operator: str, value: str) -> Condition:
    if kind == "metrics":
        try:
            number = float(value)
        except ValueError:
            raise InvalidArgument(("filter", f"metrics.{name} is compared with {value!r}, which is no number")) from None
        if math.isnan(number) and operator not in ("=", "!="):
            raise InvalidArgument(("filter", f"metrics.{name} {operator} nan: no number is less or greater than nan; use = or !="))
        return Condition(kind, name, operator, number)
    if kind:
        return Condition(kind, name, operator, value)
    if name == "state":
        state = _STATES.get(value.lower())
        if state is None or operator not in ("=", "!="):
            known = ", ".join(state_name(v) for v in _STATES.values())
            raise InvalidArgument(("filter", f"state {operator} {value}: use = or != with one of {known}"))
        return Condition("", name, operator, int(state))
    if name == "submitted_at":
        try:
            return Condition("", name, operator, datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp())
        except (ValueError, OverflowError, OSError):
            raise InvalidArgument(("filter", f"submitted_at: {value!r} is no ISO 8601 time")) from None
    if name in _COLUMNS:
        return Condition("", name, operator, value)
    raise InvalidArgument(("filter", f"there is no field {name!r}; {_HELP}"))


def order(text: str) -> tuple[str, str]:
    """(name of a metric, or "" for the time of submission; "ASC" or "DESC") of an order_by.

    Raises:
        InvalidArgument: it cannot be read.
    """
    match = _ORDER.fullmatch(text or "submitted_at desc")
    if not match:
        raise InvalidArgument(
            ("order_by", f"{text!r}: use '<field>' or '<field> desc', a field like submitted_at or metrics.\"train/loss\"")
        )
    kind, name = _split(match.group(1), "order_by")
    direction = (match.group(2) or "ASC").upper()
    if kind == "metrics":
        return name, direction
    if (kind, name) == ("", "submitted_at"):
        return "", direction
    raise InvalidArgument(("order_by", f"{match.group(1)!r}: use submitted_at or metrics.<name>"))


def encode_token(offset: list[Any]) -> str:
    """An opaque page token."""
    return base64.urlsafe_b64encode(json.dumps(offset).encode()).decode()


def decode_token(token: str) -> tuple[int, float, str]:
    """(nan, rank, id) of the last run of the page before.

    Raises:
        InvalidArgument: it is none of ours.
    """
    try:
        value = json.loads(base64.urlsafe_b64decode(token.encode()))
        if isinstance(value, list) and [type(x) for x in value] in ([int, float, str], [int, int, str]) and value[0] in (0, 1):
            value[2].encode()  # JSON can spell halves of surrogate pairs, which are no text
            return value[0], float(value[1]), value[2]
    except (ValueError, RecursionError, OverflowError):
        pass  # it is not what `encode_token` makes
    raise InvalidArgument(("page_token", "not a token that ListRuns gave"))
