"""In-memory implementations of the ports, held to the same contract as the real ones (integration/test_ports.py)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.ids import new_id
from alveary_core.errors import NotFound
from alveary_core.eventlog import Appended, Conflict
from alveary_core.events import Event, Key, body, decode, envelope, name_of
from alveary_core.objectstore import DigestMismatch, FileChanged


class MemoryLetters:
    """Dead letters in a list: (consumer, sequence, error)."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, int, str]] = []

    async def put(self, consumer: str, subject: str, sequence: int, error: BaseException | str, tries: int = 1) -> None:
        self.letters.append((consumer, sequence, str(error)))

    async def forget(self, consumer: str) -> None:
        self.letters = [letter for letter in self.letters if letter[0] != consumer]

    @contextlib.asynccontextmanager
    async def serving(self, consumer: str, handle: object, *, each: bool = False) -> AsyncIterator[None]:
        yield


class MemoryLog:
    """The event log's append, read and purge."""

    def __init__(self, source: str = "test") -> None:
        self.source = source
        self.dead_letters = MemoryLetters()
        self._stored: list[tuple[int, str, dict[str, str], bytes]] = []
        self._sequence = 0

    async def append(self, key: Key, messages: Sequence[Message], expected: int) -> Appended:
        for message in messages:
            aggregate, name = name_of(message)
            if aggregate != key.aggregate:
                raise ValueError(f"{message.DESCRIPTOR.name} does not belong to {key}")
            prefix = key.subject().removesuffix("*")
            await asyncio.sleep(0)  # as the real one, it lets others in before
            newest = max((s for s, subject, _, _ in self._stored if subject.startswith(prefix)), default=0)
            if newest != expected:
                raise Conflict(key.subject())
            self._sequence += 1
            headers = envelope(key, message, new_id(), self.source, "")
            self._stored.append((self._sequence, key.subject(name), headers, body(message)))
            expected = self._sequence
        return Appended(expected)

    async def read(self, key: Key) -> list[Event]:
        prefix = key.subject().removesuffix("*")
        return [decode(subject, headers, data, s) for s, subject, headers, data in self._stored if subject.startswith(prefix)]

    async def purge(self, key: Key, before: int) -> None:
        prefix = key.subject().removesuffix("*")
        self._stored = [row for row in self._stored if not (row[1].startswith(prefix) and row[0] < before)]

    async def last_sequence(self) -> int:
        return self._sequence


class MemoryStore:
    """The object store in a dict."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], bytes] = {}

    async def put(self, bucket: str, key: str, data: bytes) -> None:
        self.objects[bucket, key] = data

    async def put_file(
        self, bucket: str, key: str, path: Path, progress: Callable[[int], None] | None = None, *, sha256: str = ""
    ) -> c.FileEntry:
        data = path.read_bytes()
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise FileChanged(f"{path} changed while it was stored")
        if progress:
            progress(len(data))
        self.objects[bucket, key] = data
        return c.FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest(), executable=bool(path.stat().st_mode & 0o100))

    async def get(self, bucket: str, key: str, offset: int = 0, length: int = 0) -> bytes:
        if (bucket, key) not in self.objects:
            raise NotFound("object", f"{bucket}/{key}")
        data = self.objects[bucket, key][offset:]
        return data[:length] if length else data

    async def get_file(self, bucket: str, key: str, path: Path, sha256: str) -> None:
        data = await self.get(bucket, key)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DigestMismatch(f"{bucket}/{key} is not {sha256}")
        path.write_bytes(data)

    async def size(self, bucket: str, key: str) -> int | None:
        return len(self.objects[bucket, key]) if (bucket, key) in self.objects else None

    async def copy(self, bucket: str, key: str, source_bucket: str, source_key: str, size: int | None = None) -> None:
        self.objects[bucket, key] = await self.get(source_bucket, source_key)

    async def keys(self, bucket: str, prefix: str) -> list[str]:
        return sorted(k for b, k in self.objects if b == bucket and k.startswith(prefix))

    async def delete(self, bucket: str, keys: Iterable[str]) -> None:
        for key in keys:
            self.objects.pop((bucket, key), None)
