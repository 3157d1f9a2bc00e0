"""The files of a gang: which member has which, and under which names they are stored.

In the object store, below runs/<run>/<attempt>/.gang/ until the attempt's manifest is published: <index>.json lists the files of
a member, names.json says under which name each member stores each of its files, and <index>/ holds files whose names were not
decided when they were stored.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_trainer.adapters.runtime import open_beneath
from alveary_trainer.gang import File, name_files
from alveary_trainer.outputs import BUCKET, OutputStore, Published

# Sorts members whose ranks are not known behind all others.
_NO_RANK = 10**9
_FOLDER = ".gang/"
_NAMES = "names.json"


class GangFiles:
    """One member's access to the lists of a gang."""

    def __init__(self, store: ObjectStore, outputs: OutputStore, index: int) -> None:
        self._store, self._outputs, self._index = store, outputs, index
        # The leader's: digests of all lists, by member.
        self._lists: dict[int, str] = {}

    async def list_own(self) -> str:
        """Write the list of this member's files; returns its digest."""
        files = await self._outputs.find()

        def digest_all() -> list[File]:
            uploaded = self._outputs.uploaded
            listed = {n: File(n, e.size, e.sha256, e.executable) for n, e in uploaded.items() if e.sha256}
            for file in files:
                with open_beneath(file.path, self._outputs.below) as readable, readable.open("rb") as content:
                    info = os.fstat(content.fileno())
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
                    listed[file.name] = File(file.name, info.st_size, digest, bool(info.st_mode & 0o100))
            return [f for _, f in sorted(listed.items())]

        listed = await asyncio.to_thread(digest_all)
        return await self._write(f"{self._index}.json", lambda: [asdict(f) for f in listed])

    async def decide_names(self, reports: Mapping[int, pb.GangReport]) -> str:
        """Decide under which names all members store their files, and write them; returns their digest.

        The member with rank 0 keeps its own names.
        """
        self._lists = {index: report.file_list_digest for index, report in sorted(reports.items())}
        order = sorted(reports, key=lambda i: (min(reports[i].ranks, default=_NO_RANK), i))
        lists = await self._read_lists()
        return await self._write(_NAMES, lambda: name_files(lists, order))

    async def own_names(self, digest: str) -> dict[str, str]:
        """Under which name this member stores each of its files. `digest`: what `decide_names` returned."""
        names: dict[str, str] = (await self._read(_NAMES, digest))[str(self._index)]
        return names

    async def publish(self, names_digest: str) -> Published:
        """Publish what all members stored as the outputs of the attempt; what only the gang needed is removed."""
        every: dict[str, dict[str, str]] = await self._read(_NAMES, names_digest)
        lists = await self._read_lists()
        entries: dict[str, c.FileEntry] = {}

        def gather() -> None:
            for index, files in lists.items():
                for file in files:
                    if name := every[str(index)].get(file.path):
                        entries[name] = c.FileEntry(path=name, size=file.size, sha256=file.sha256, executable=file.executable)

        await asyncio.to_thread(gather)
        published = await self._outputs.publish_manifest(entries)
        await self._store.delete(BUCKET, await self._store.keys(BUCKET, self._outputs.key(_FOLDER)))
        return published

    async def _read_lists(self) -> dict[int, list[File]]:
        found = {}
        for index, digest in self._lists.items():
            listed = await self._read(f"{index}.json", digest) if digest else []
            found[index] = await asyncio.to_thread(_files, listed)
        return found

    async def _write(self, name: str, content: Callable[[], object]) -> str:
        data = await asyncio.to_thread(lambda: json.dumps(content()).encode())
        await self._store.put(BUCKET, self._outputs.key(_FOLDER + name), data)
        return await _digest(data)

    async def _read(self, name: str, digest: str) -> Any:
        key = self._outputs.key(_FOLDER + name)
        data = await self._store.get(BUCKET, key)
        if await _digest(data) != digest:
            raise DigestMismatch(f"{BUCKET}/{key} is not what was written there")
        return await asyncio.to_thread(json.loads, data)


def _files(listed: Sequence[Mapping[str, Any]]) -> list[File]:
    return [File(**one) for one in listed]


async def _digest(data: bytes) -> str:
    return await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
