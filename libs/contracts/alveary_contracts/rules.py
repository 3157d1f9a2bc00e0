"""What values of the contracts may be: one table for all messages, checked where they enter a service.

Every field has a rule. A field without an entry in RULES has that of its type: numbers are finite and not absurd, texts and lists
are bounded, texts hold no NUL, enum values are known, timestamps are those of the years 1 to 9999. What depends on more than one
field, or on what is stored, is checked by the service that knows it.

`problems` says what is wrong with a message. `problems(event, texts=False)` is for what services write to the event log: numbers,
enums and timestamps alone, because a text that is too long must not keep a service from saying how something ended.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

# Violations that are told of one message, at most.
MOST_PROBLEMS = 20
Problem = tuple[str, str]


@dataclass(frozen=True)
class Number:
    """From `low` to `high`. `finite` False: NaN and the infinities as well."""

    low: float
    high: float
    finite: bool = True

    def problem(self, value: float) -> str:
        """What is wrong with a value; empty: nothing."""
        if not self.finite and not math.isfinite(value):
            return ""
        if math.isfinite(value) and self.low <= value <= self.high:
            return ""
        return f"{value:g}: a number from {self.low:,.15g} to {self.high:,.15g} is needed"


@dataclass(frozen=True)
class Text:
    """Up to `most` characters that match `pattern`, which `what` describes."""

    most: int
    pattern: re.Pattern[str] | None = None
    what: str = ""

    def problem(self, value: str) -> str:
        """What is wrong with a value; empty: nothing."""
        if len(value) > self.most:
            return f"{len(value):,} characters: at most {self.most:,} are allowed"
        if "\0" in value:
            return f"{value[:40]!r}: a NUL character is not allowed"
        if self.pattern is not None and value and not self.pattern.fullmatch(value):
            return f"{value[:80]!r}: {self.what}"
        return ""


@dataclass(frozen=True)
class Data:
    """Up to `most` bytes."""

    most: int

    def problem(self, value: bytes) -> str:
        """What is wrong with a value; empty: nothing."""
        return "" if len(value) <= self.most else f"{len(value):,} bytes: at most {self.most:,} are allowed"


@dataclass(frozen=True)
class Many:
    """Up to `most` items, each as `each` says (None: as its type says); of a map, its values, with keys of `keys`."""

    most: int
    each: Number | Text | Data | None = None
    keys: Text | None = None


@dataclass(frozen=True)
class Size:
    """A message of up to `most` bytes."""

    most: int


_TEXT, _DATA, _LIST, _MAP = Text(8192), Data(1 << 20), Many(10_000), Many(1000)
_KEY = Text(256)
_FLOAT = Number(-1e15, 1e15)
_ANY_NUMBER = Number(-math.inf, math.inf, finite=False)
_ID = Text(128)
_NAME = Text(128)
_DIGEST = Text(64, re.compile(r"[0-9a-f]*"), "a digest is written in lower-case hex digits")
_REASON, _DESCRIPTION = Text(4000), Text(65_536)
_SECONDS = Number(0, 1e9)
# A process takes arguments and variables of up to 128 KiB.
_ARGUMENT = Text(100_000)
_BYTES = Number(0, float(1 << 60))
_TAGS = Many(1000, Text(8192), _KEY)
_MANIFEST = Size(512 << 20)

# "Message" or "Message.field". A message has at most one name in all packages (tests/unit/contracts/test_rules.py).
RULES: dict[str, Number | Text | Data | Many | Size] = {
    # ---- common
    "RunSpec": Size(512 << 10),
    "RunSpec.experiment": _NAME,
    "RunSpec.snapshot": _DIGEST,
    "RunSpec.entry_script": Text(1024),
    "RunSpec.command": Many(10_000, _ARGUMENT),
    "RunSpec.arguments": Many(10_000, _ARGUMENT),
    "RunSpec.compute_target": _NAME,
    "RunSpec.inputs": Many(1000),
    "RunSpec.max_run_duration_seconds": _SECONDS,
    "RunSpec.grace_seconds": _SECONDS,
    "RunSpec.tags": _TAGS,
    "RunSpec.properties": _TAGS,
    "RunSpec.display_name": Text(256),
    "RunSpec.parent_run_id": _ID,
    "RunSpec.resume_from": _ID,
    "RunSpec.module": Text(256),
    "RunSpec.node_labels": Many(100, Text(256), _KEY),
    "RetryPolicy.on": Many(20),
    "RetryPolicy.exit_codes": Many(256),
    "RetryPolicy.backoff_seconds": _SECONDS,
    "Resources.cpus": Number(0, 1e6),
    "Resources.memory_bytes": _BYTES,
    "Resources.shm_bytes": _BYTES,
    "Resources.gpus": Number(0, 100_000),
    "Resources.gpu_milli": Number(0, 1000),
    "Resources.gpu_models": Many(100, Text(256)),
    "Environment.name": _NAME,
    "Environment.python_version": Text(32),
    "Environment.pip_packages": Many(5000, Text(4096)),
    "Environment.conda_packages": Many(5000, Text(4096)),
    "Environment.conda_channels": Many(100, Text(4096)),
    "Environment.apt_packages": Many(5000, Text(256)),
    "Environment.environment_variables": Many(1000, _ARGUMENT, _KEY),
    "Environment.interpreter": Text(4096),
    "Environment.extends_digest": _DIGEST,
    "Environment.rebuild_key": Text(256),
    "Environment.base_image": Text(1024),
    "Environment.image": Text(1024),
    "Environment.dockerfile": Text(262_144),
    "InputDataset.name": _NAME,
    "InputDataset.dataset": _NAME,
    "InputDataset.manifest_digest": _DIGEST,
    "Manifest.files": Many(1_000_000),
    "FileEntry.path": Text(4096),
    "FileEntry.sha256": Text(64),
    # ---- events: what requests carry
    "ComputeSpec": Size(512 << 10),
    "ComputeSpec.vm_size": Text(256),
    "ComputeSpec.vm_priority": Text(32),
    "ComputeSpec.idle_seconds_before_scaledown": _SECONDS,
    "ComputeSpec.cooldown_seconds": _SECONDS,
    "ComputeSpec.tags": _TAGS,
    "ComputeSpec.description": _DESCRIPTION,
    "ComputeSpec.network": Text(256),
    "ComputeSpec.placement_policy": Text(64),
    "ComputeSpec.quotas": Many(1000),
    "ComputeSpec.address": Text(512),
    "Quota.user": Text(256),
    "Quota.weight": Number(0, 1e6),
    "OnnxSpec.file": Text(1024),
    "OnnxSpec.inputs": Many(1000),
    "OnnxSpec.opset": Number(0, 1000),
    "OnnxSpec.factory": Text(256),
    "OnnxSpec.tolerance": Number(0, 1e6),
    "OnnxSpec.output_names": Many(1000, Text(256)),
    "TensorSpec.name": Text(256),
    "TensorSpec.shape": Many(64, Number(-1, 2**31)),
    "TensorSpec.dtype": Text(32),
    "TensorSpec.dynamic_axes": Many(64, Text(256)),
    # ---- events: numbers that services measure
    "ModelExported.max_abs_diff": _ANY_NUMBER,
    "ModelExported.max_rel_diff": _ANY_NUMBER,
    # ---- runs
    "SubmitRunRequest.idempotency_key": Text(128),
    "ListRunsRequest.filter": Text(16_384),
    "ListRunsRequest.order_by": Text(1024),
    "CancelRunRequest.reason": _REASON,
    "TagRunRequest": Size(2 << 20),
    "TagRunRequest.set": _TAGS,
    "TagRunRequest.properties": _TAGS,
    "TagRunRequest.remove": Many(1000, Text(256)),
    "TagRunRequest.display_name": Text(256),
    "TagRunRequest.description": _DESCRIPTION,
    "LogMetricsRequest": Size(7 << 20),
    "LogMetricsRequest.points": Many(100_000),
    "MetricPoint.name": Text(256),
    "MetricPoint.scalar": _ANY_NUMBER,
    "MetricPoint.row_json": Text(1 << 20),
    "MetricPoint.table_json": Text(4 << 20),
    "MetricPoint.image_path": Text(4096),
    "MetricPoint.text": Text(1 << 20),
    "MetricPoint.description": _DESCRIPTION,
    "NumberList.values": Many(1_000_000, _ANY_NUMBER),
    "SubscribeStart.pattern": Text(256),
    "SubscribeStart.durable": Text(64),
    "RetryDeadLettersRequest.ids": Many(100, Text(128)),
    "DropDeadLettersRequest.ids": Many(100, Text(128)),
    # ---- registry
    "RegisterModelRequest.name": _NAME,
    "RegisterModelRequest.description": _DESCRIPTION,
    "RegisterModelRequest.tags": _TAGS,
    "RegisterModelRequest.properties": _TAGS,
    "RegisterModelRequest.framework": Text(256),
    "RegisterModelRequest.framework_version": Text(256),
    "RegisterModelRequest.idempotency_key": Text(128),
    "RegisterModelRequest.datasets": Many(1000, Text(256)),
    "RegisterModelRequest.parent": Text(256),
    "RunOutput.path": Text(4096),
    "TagModelRequest": Size(2 << 20),
    "TagModelRequest.set": _TAGS,
    "TagModelRequest.properties": _TAGS,
    "TagModelRequest.remove": Many(1000, Text(256)),
    "TagModelRequest.description": _DESCRIPTION,
    "ListModelsRequest.tags": Many(100, Text(8192), _KEY),
    "RegisterDatasetRequest.name": _NAME,
    "RegisterDatasetRequest.description": _DESCRIPTION,
    "RegisterDatasetRequest.tags": _TAGS,
    # ---- requests that carry a manifest, as large as the server takes
    **{
        f"{name}Request": _MANIFEST
        for name in ("PrepareSnapshot", "CommitSnapshot", "PrepareModel", "RegisterModel", "PrepareDataset", "RegisterDataset")
    },
    # ---- images
    "SetRegistryCredentialsRequest.registry": Text(256),
    "SetRegistryCredentialsRequest.username": Text(256),
    "SetRegistryCredentialsRequest.password": Text(16_384),
    # ---- scheduler
    "CreateJoinTokenRequest.valid_seconds": Number(0, 1e10),
    "DrainNodeRequest.reason": _REASON,
    "JoinNodeRequest.hostname": Text(256),
}
# Of a request without an entry.
_REQUEST = Size(4 << 20)
# Fields with these names, wherever they are, if they have no entry.
_BY_NAME: dict[str, Text] = {
    "run_id": _ID, "digest": _DIGEST, "page_token": Text(4096), "name": Text(256), "target": Text(256), "node": Text(256),
    "alias": Text(256), "export_id": _ID, "image_digest": _DIGEST, "manifest_digest": _DIGEST,
}  # fmt: skip
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_INTEGERS = (
    FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64,
)  # fmt: skip
# Seconds since the epoch of 0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z: what google.protobuf.Timestamp allows.
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
_Check = Callable[[str, Any], Iterator[Problem]]


def problems(message: Message, *, texts: bool = True) -> list[Problem]:
    """(path of the field, what is wrong and what is allowed) for each value that breaks its rule, the first MOST_PROBLEMS.

    `texts` False: numbers, enums and timestamps alone.
    """
    found: list[Problem] = []
    for problem in _check(message.DESCRIPTOR, texts)("", message):
        found.append(problem)
        if len(found) == MOST_PROBLEMS:
            break
    return found


def too_large(message: Message) -> str:
    """What is wrong with the size of a request; empty: nothing."""
    rule = RULES.get(message.DESCRIPTOR.name, _REQUEST)
    most = rule.most if isinstance(rule, Size) else _REQUEST.most
    size = message.ByteSize()
    return f"{size:,} bytes: at most {most:,} are allowed" if size > most else ""


@cache
def _check(descriptor: Descriptor, texts: bool) -> _Check:
    """Goes through the fields of a message that are set."""
    if descriptor.full_name == "google.protobuf.Timestamp":
        return _timestamp
    size = RULES.get(descriptor.name)
    most = size.most if isinstance(size, Size) and texts else 0
    fields: dict[int, tuple[str, _Check] | None] = {}

    def check(path: str, message: Any) -> Iterator[Problem]:
        if most and message.ByteSize() > most:
            yield path or descriptor.name, f"{message.ByteSize():,} bytes: at most {most:,} are allowed"
            return
        for field, value in message.ListFields():
            if field.number not in fields:
                made = _field(descriptor, field, texts)
                fields[field.number] = (field.name, made) if made else None
            known = fields[field.number]
            if known is not None:
                yield from known[1](f"{path}.{known[0]}" if path else known[0], value)

    return check


def _timestamp(path: str, value: Any) -> Iterator[Problem]:
    if not (_FIRST_SECOND <= value.seconds <= _LAST_SECOND and 0 <= value.nanos < 1_000_000_000):
        yield path, f"{value.seconds} s and {value.nanos} ns: a time of the years 1 to 9999 is needed, and 0 to 999,999,999 ns"


def _field(descriptor: Descriptor, field: FieldDescriptor, texts: bool) -> _Check | None:
    rule = RULES.get(f"{descriptor.name}.{field.name}")
    if not repeated(field):
        return _one(field, rule, texts)
    many = rule if isinstance(rule, Many) else _MAP if _is_map(field) else _LIST
    most = many.most if texts else 0
    if _is_map(field):
        assert field.message_type is not None
        key = _one(field.message_type.fields_by_name["key"], many.keys or _KEY, texts)
        each = _one(field.message_type.fields_by_name["value"], many.each, texts)
        return _map(most, key, each) if most or key or each else None
    item = _one(field, many.each, texts)
    return _list(most, item) if most or item else None


def repeated(field: FieldDescriptor) -> bool:
    """Whether a field is a list or a map, with old and new versions of protobuf."""
    if hasattr(field, "is_repeated"):
        return bool(field.is_repeated)
    return bool(field.label == FieldDescriptor.LABEL_REPEATED)  # before 6.31


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _list(most: int, each: _Check | None) -> _Check:
    def check(path: str, values: Any) -> Iterator[Problem]:
        if most and len(values) > most:
            yield path, f"{len(values):,} items: at most {most:,} are allowed"
        elif each is not None:
            for index, value in enumerate(values):
                yield from each(f"{path}[{index}]", value)

    return check


def _map(most: int, key: _Check | None, each: _Check | None) -> _Check:
    def check(path: str, values: Any) -> Iterator[Problem]:
        if most and len(values) > most:
            yield path, f"{len(values):,} entries: at most {most:,} are allowed"
            return
        for name in values:
            if key is not None:
                yield from key(f"{path} (key)", name)
            if each is not None:
                yield from each(f"{path}[{str(name)[:80]!r}]", values[name])

    return check


def _one(field: FieldDescriptor, rule: Any, texts: bool) -> _Check | None:
    """The check of one value of a field; None: it may be anything."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        assert field.message_type is not None
        return _check(field.message_type, texts)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return _enum(field.enum_type)
    if kind in _FLOATS:
        return _ruled(rule if isinstance(rule, Number) else _FLOAT)
    if kind in _INTEGERS:
        return _ruled(rule) if isinstance(rule, Number) else None
    if kind != FieldDescriptor.CPPTYPE_STRING or not texts:
        return None
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _ruled(rule if isinstance(rule, Data) else _DATA)
    return _ruled(rule if isinstance(rule, Text) else _BY_NAME.get(field.name, _TEXT))


def _ruled(rule: Number | Text | Data) -> _Check:
    problem: Callable[[Any], str] = rule.problem

    def check(path: str, value: Any) -> Iterator[Problem]:
        if text := problem(value):
            yield path, text

    return check


def _enum(enum: EnumDescriptor) -> _Check:
    known = frozenset(enum.values_by_number)

    def check(path: str, value: int) -> Iterator[Problem]:
        if value not in known:
            yield path, f"{value} is no {enum.name}: use one of {', '.join(v.name for v in enum.values)}"

    return check
