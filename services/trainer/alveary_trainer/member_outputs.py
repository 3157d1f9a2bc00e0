"""Storing what one member of an attempt leaves, and publishing what all of them left as the outputs of the attempt.

An attempt on one node stores its files under their own names. The members of a gang agree on names first, see gang_outputs.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_trainer.gang_channel import NO_FILE_NAMES, GangChannel
from alveary_trainer.gang_outputs import GangFiles
from alveary_trainer.outputs import STORING, OutputStore, Published, not_stored, retry_while_disk_full

T = TypeVar("T")
# How long the manifest of an interrupted attempt may take.
_HURRIED_SECONDS = 10.0


@dataclass(frozen=True)
class Stored:
    """What a member stored, by its own names."""

    files: Mapping[str, c.FileEntry] = field(default_factory=dict)
    # Why something could not be stored; empty: everything is.
    error: str = ""
    # Of a gang: what the names were agreed on as.
    file_names_digest: str = ""


@dataclass(frozen=True)
class Storing:
    """What storing needs of its attempt."""

    outputs: OutputStore
    # A sentence while the node's disk is full, else empty.
    disk_fault: Callable[[], str]
    log: Callable[[str], None]

    async def retry(self, work: Callable[[], Awaitable[T]]) -> T:
        """See retry_while_disk_full."""
        return await retry_while_disk_full(work, self.disk_fault, self.log)


class MemberOutputs(Protocol):
    """The outputs of one member."""

    async def store(self) -> Stored:
        """Store the files of this member."""
        ...

    async def publish(self, status: c.ExitStatus, stored: Stored) -> ev.AttemptFinished:
        """Make what all members stored the outputs of an attempt that ended with `status`; returns its last event."""
        ...

    async def publish_partial(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """The last event of an attempt whose storing was interrupted, with what is stored by then where that makes sense."""
        ...


def _finished(status: c.ExitStatus, published: Published) -> ev.AttemptFinished:
    return ev.AttemptFinished(exit=status, manifest_digest=published.digest, output_files=published.files, output_bytes=published.bytes)


def _with_error(status: c.ExitStatus, stored: Stored) -> c.ExitStatus:
    """The status of an attempt that failed for another reason, and why not everything is stored."""
    told = c.ExitStatus()
    told.CopyFrom(status)
    told.message = "; ".join(filter(None, [status.message, stored.error]))
    return told


def upload_failed(failure: BaseException) -> ev.AttemptFinished:
    """The last event of an attempt whose outputs could not be stored."""
    return ev.AttemptFinished(exit=c.ExitStatus(reason=c.EXIT_REASON_UPLOAD_FAILED, message=not_stored(failure)))


class SoloOutputs:
    """Of an attempt on one node."""

    def __init__(self, storing: Storing) -> None:
        self._storing = storing

    async def store(self) -> Stored:
        """See MemberOutputs."""
        try:
            return Stored(await self._storing.retry(lambda: self._storing.outputs.store_all(None)))
        except STORING as failure:
            return Stored(error=not_stored(failure))

    async def publish(self, status: c.ExitStatus, stored: Stored) -> ev.AttemptFinished:
        """See MemberOutputs."""
        if status.reason == c.EXIT_REASON_UPLOAD_FAILED:
            return ev.AttemptFinished(exit=status)
        try:
            published = await self._storing.retry(lambda: self._storing.outputs.publish_manifest(stored.files))
            return _finished(_with_error(status, stored), published)
        except STORING as failure:
            return upload_failed(failure)

    async def publish_partial(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """See MemberOutputs: what was stored so far."""
        outputs = self._storing.outputs
        try:
            async with asyncio.timeout(_HURRIED_SECONDS):
                return _finished(status, await outputs.publish_manifest(dict(outputs.done)))
        except (*STORING, TimeoutError) as failure:
            self._storing.log(not_stored(failure))
            return ev.AttemptFinished(exit=status)


class FollowerOutputs:
    """Of a member of a gang that does not lead."""

    def __init__(self, storing: Storing, channel: GangChannel, files: GangFiles) -> None:
        self._storing, self._channel, self._files = storing, channel, files

    async def store(self) -> Stored:
        """See MemberOutputs: all members list their files, the leader names them, and each stores its own."""
        digest, errors = "", list[str]()
        try:
            digest = await self._files.list_own()
        except STORING as failure:
            errors.append(not_stored(failure))

        async def decide(reports: Mapping[int, pb.GangReport]) -> str:
            try:
                return await self._files.decide_names(reports)
            except STORING as failure:
                errors.append(not_stored(failure))
                return NO_FILE_NAMES

        agreed = await self._channel.agree_on_file_names(digest, "".join(errors), decide)
        stored: Mapping[str, c.FileEntry] = {}
        if agreed != NO_FILE_NAMES:
            try:
                names = await self._files.own_names(agreed)
                stored = await self._storing.retry(lambda: self._storing.outputs.store_all(names))
            except STORING as failure:
                errors.append(not_stored(failure))
        return Stored(stored, errors[-1] if errors else "", agreed)

    async def publish(self, status: c.ExitStatus, stored: Stored) -> ev.AttemptFinished:
        """See MemberOutputs: the leader publishes."""
        return ev.AttemptFinished(exit=status)

    async def publish_partial(self, status: c.ExitStatus) -> ev.AttemptFinished:
        """See MemberOutputs: nothing, as parts of some members' files are no outputs of the attempt."""
        return ev.AttemptFinished(exit=status)


class LeaderOutputs(FollowerOutputs):
    """Of the member that leads a gang."""

    async def publish(self, status: c.ExitStatus, stored: Stored) -> ev.AttemptFinished:
        """See MemberOutputs."""
        if status.reason == c.EXIT_REASON_UPLOAD_FAILED:
            return ev.AttemptFinished(exit=status)
        if stored.file_names_digest == NO_FILE_NAMES:  # it failed before that, and for another reason
            return ev.AttemptFinished(exit=_with_error(status, stored))
        try:
            return _finished(status, await self._storing.retry(lambda: self._files.publish(stored.file_names_digest)))
        except STORING as failure:
            return upload_failed(failure)
