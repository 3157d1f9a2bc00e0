"""An event and its envelope: CloudEvents 1.0, binary mode, in NATS headers; the body in proto3 JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToJson, ParseError
from google.protobuf.message import Message

from alveary_contracts.events.v1 import events_pb2
from alveary_contracts.names import event_name, message_name, token, untoken
from alveary_core.errors import InvalidArgument
from alveary_core.protojson import parse

STREAM = "ALVEARY"
# Of workspace and id together, percent-encoded: nats-server's limit for a command line, subject and inbox, is 4 KiB.
_MOST_TOKENS = 1024


@dataclass(frozen=True)
class Key:
    """Which aggregate: its workspace, kind and id."""

    workspace: str
    aggregate: str
    id: str

    def subject(self, event: str = "*") -> str:
        """Subject of its `event`, or of all its events.

        Raises:
            InvalidArgument: no aggregate can have this id.
        """
        workspace, ident = token(self.workspace), token(self.id)
        if not workspace or not ident or len(workspace) + len(ident) > _MOST_TOKENS:
            raise InvalidArgument((f"{self.aggregate} id", f"{self.id[:80]!r}: an id or name of 1 to about 300 characters is needed"))
        return f"alveary.{workspace}.{self.aggregate}.{ident}.{event}"


@dataclass(frozen=True)
class Event:
    """One fact. `sequence` is its position in the stream, `time` seconds since the epoch."""

    id: str
    key: Key
    name: str
    message: Message
    sequence: int
    time: float
    traceparent: str = ""

    @property
    def type(self) -> str:
        """Like "run.completed"."""
        return f"{self.key.aggregate}.{self.name}"


def name_of(message: Message) -> tuple[str, str]:
    """(aggregate, event) of a message.

    Raises:
        ValueError: it is no event.
    """
    kind = event_name(message.DESCRIPTOR.name)
    if kind is None:
        raise ValueError(f"{message.DESCRIPTOR.full_name} is no event")
    return kind


def body(message: Message) -> bytes:
    """A message in proto3 JSON."""
    return MessageToJson(message, indent=None, ensure_ascii=False).encode()


def envelope(key: Key, message: Message, event_id: str, source: str, trace: str) -> dict[str, str]:
    """The headers of an event."""
    aggregate, name = name_of(message)
    headers = {
        "Nats-Msg-Id": event_id,
        "ce-specversion": "1.0",
        "ce-id": event_id,
        "ce-type": f"alveary.{aggregate}.{name}.v1",
        "ce-source": f"/alveary/{source}",
        "ce-subject": f"{aggregate}/{token(key.id)}",
        "ce-time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "content-type": "application/json",
    }
    if trace:
        headers["traceparent"] = trace
    return headers


class UnknownEvent(ValueError):
    """A message of the stream that this version has no name for: a newer version wrote it, or it is none of Alveary's."""


class MalformedEvent(ValueError):
    """A message of the stream that claims to be an event of this version, and cannot be read as one."""


def decode(subject: str, headers: dict[str, str], data: bytes, sequence: int) -> Event:
    """An event from what the stream holds.

    Raises:
        UnknownEvent: this version knows no such event.
        MalformedEvent: its body or envelope cannot be read.
    """
    parts = subject.split(".")
    if len(parts) != 5 or parts[0] != "alveary":
        raise UnknownEvent(f"{subject}: not an event subject")
    _, workspace, aggregate, ident, name = parts
    kind = getattr(events_pb2, message_name(aggregate, name), None)
    if kind is None or event_name(message_name(aggregate, name)) != (aggregate, name):
        raise UnknownEvent(f"{subject}: this version knows no event {aggregate}.{name}")
    try:
        # Fields of a newer version are ignored, so that services can be upgraded one after another.
        message: Message = parse(data, kind)
        at = datetime.fromisoformat(headers["ce-time"].replace("Z", "+00:00")).timestamp()
        ident_of = headers["ce-id"]
    except (ParseError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise MalformedEvent(f"{subject}: its body or envelope cannot be read: {type(error).__name__}: {error}") from error
    key = Key(untoken(workspace), aggregate, untoken(ident))
    return Event(ident_of, key, name, message, sequence, at, headers.get("traceparent", ""))
