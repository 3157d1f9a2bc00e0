"""The format of the second copy. Pure: bytes in, bytes out.

A segment covers the sequences (after, last] of a stream: one JSON object a line for each message that the stream had,
compressed with zstd, under a key that says what it covers and the SHA-256 of its bytes. Segments follow each other
without gaps: each begins where the one before ends. A sequence that is missing inside a segment was purged (see
compaction) before it was copied.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import zstandard

_KEY = re.compile(r"(?P<stream>[A-Z_]+)/(?P<after>\d{20})-(?P<last>\d{20})-(?P<sha256>[0-9a-f]{64})\.ndjson\.zst")


class Damaged(Exception):
    """The copy is not what it should be; the text says where."""


@dataclass(frozen=True)
class Record:
    """One message of a stream."""

    sequence: int
    subject: str
    headers: tuple[tuple[str, str], ...]
    data: bytes

    def line(self) -> bytes:
        """As stored."""
        body: dict[str, object] = {"seq": self.sequence, "subject": self.subject, "headers": dict(self.headers)}
        try:
            body["data"] = self.data.decode()
        except UnicodeDecodeError:
            body["data64"] = base64.b64encode(self.data).decode()
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> Record:
        """The inverse of `line`."""
        body = json.loads(line)
        data = base64.b64decode(body["data64"]) if "data64" in body else body["data"].encode()
        return cls(body["seq"], body["subject"], tuple(body["headers"].items()), data)


@dataclass(frozen=True, order=True)
class Segment:
    """Where a segment is and what it covers."""

    stream: str
    after: int
    last: int
    sha256: str

    @property
    def key(self) -> str:
        """Its object."""
        return f"{self.stream}/{self.after:020}-{self.last:020}-{self.sha256}.ndjson.zst"

    @classmethod
    def of(cls, key: str) -> Segment | None:
        """The segment of an object's key; None: it is none."""
        found = _KEY.fullmatch(key)
        return cls(found["stream"], int(found["after"]), int(found["last"]), found["sha256"]) if found else None


def pack(stream: str, after: int, last: int, records: Iterable[Record]) -> tuple[Segment, bytes]:
    """A segment and its bytes."""
    data = zstandard.ZstdCompressor(level=6).compress(b"".join(r.line() for r in records))
    return Segment(stream, after, last, hashlib.sha256(data).hexdigest()), data


def unpack(segment: Segment, data: bytes) -> Iterator[Record]:
    """The records of a segment.

    Raises:
        Damaged: the bytes are not those that were written.
    """
    if hashlib.sha256(data).hexdigest() != segment.sha256:
        raise Damaged(f"{segment.key}: its bytes are not those that were written")
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    previous = segment.after
    for line in raw.splitlines():
        record = Record.of(line)
        if not previous < record.sequence <= segment.last:
            raise Damaged(f"{segment.key}: sequence {record.sequence} is out of place")
        previous = record.sequence
        yield record


def chain(segments: Iterable[Segment]) -> list[Segment]:
    """The segments that together cover a stream from its beginning, in order; those within a merged one are left out.

    Raises:
        Damaged: a part is missing.
    """
    ordered: list[Segment] = []
    reached = 0
    for segment in sorted(segments, key=lambda s: (s.after, -s.last)):
        if segment.last <= reached:
            continue  # inside one that was merged from it
        if segment.after != reached:
            raise Damaged(f"the copy of {segment.stream} has a gap: nothing covers ({reached}, {segment.after}]")
        ordered.append(segment)
        reached = segment.last
    return ordered


def mergeable(segments: Sequence[Segment], small: int, many: int) -> list[Segment]:
    """The newest run of at least `many` neighbours that cover less than `small` sequences each; empty: none."""
    run: list[Segment] = []
    for segment in reversed(segments):
        if segment.last - segment.after >= small:
            break
        run.insert(0, segment)
    return run if len(run) >= many else []
