"""Dead letters: events that a service could not handle or fold, set aside so that others are not held up.

They live in a JetStream stream of their own, which all replicas and services share: it is as durable as the event log, needs
no database that some service would own, and holds one message for each (workspace, service, consumer, sequence), so that
replicas that set the same event aside, or one that does it again after a restart, agree on one letter. A letter refers to its
event, which stays in the event log.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import NotFoundError

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.names import token, untoken
from alveary_core import telemetry
from alveary_core.errors import InvalidArgument, NotFound, Unavailable

DEAD_LETTERS = "ALVEARY_DEAD_LETTERS"
_SUBJECT, _RETRY = "alveary-dead", "alveary-redrive"
_ID = re.compile(r"([a-z]{1,32})/([A-Za-z0-9_-]{1,64})/([1-9][0-9]{0,18})")
# The oldest go when there are more.
_MOST, _MOST_BYTES = 20_000, 256 << 20
_ERROR_CHARACTERS, _TRACEBACK_CHARACTERS = 2000, 8000
_RETRY_SECONDS = 60.0
_TRANSIENT = (nats.errors.Error, asyncio.TimeoutError, ConnectionError, OSError)

STREAM_CONFIG = StreamConfig(
    name=DEAD_LETTERS, subjects=[f"{_SUBJECT}.>"], storage=StorageType.FILE, discard=DiscardPolicy.OLD, max_msgs_per_subject=1,
    max_msgs=_MOST, max_bytes=_MOST_BYTES, allow_direct=True, description="Events that a service could not handle or fold.",
)  # fmt: skip


@dataclass(frozen=True)
class LetterId:
    """Which consumer of which service could not handle the event at which sequence."""

    service: str
    consumer: str
    sequence: int

    def __str__(self) -> str:
        return f"{self.service}/{self.consumer}/{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> LetterId:
        """The inverse of `str`.

        Raises:
            InvalidArgument: `text` is no id of a dead letter.
        """
        found = _ID.fullmatch(text)
        if not found:
            raise InvalidArgument(("ids", f"{text[:80]!r}: an id is '<service>/<consumer>/<sequence>', as ListDeadLetters shows it"))
        return cls(found[1], found[2], int(found[3]))

    def subject(self, workspace: str) -> str:
        """Where its letter is."""
        return f"{_SUBJECT}.{token(workspace)}.{self.service}.{self.consumer}.{self.sequence}"


class DeadLetters:
    """The dead letters of all services, through the connection of one (`service`)."""

    def __init__(self, connection: Client, service: str) -> None:
        self._connection, self._js, self._service = connection, connection.jetstream(timeout=5), service

    async def put(self, consumer: str, subject: str, sequence: int, error: BaseException | str, tries: int = 1) -> None:
        """Set the event at `sequence` aside for a consumer of this service; durable when this returns. Idempotent.

        Raises:
            Unavailable: the letter was not stored in time; the event must not count as handled.
        """
        parts = subject.split(".")
        workspace = untoken(parts[1]) if len(parts) > 1 else ""
        letter_id = LetterId(self._service, consumer, sequence)
        letter = c.DeadLetter(
            id=str(letter_id), service=self._service, consumer=consumer, workspace=workspace, subject=_plain(subject),
            sequence=sequence, type=_plain(f"{parts[2]}.{parts[4]}" if len(parts) == 5 else ""), tries=tries,
        )  # fmt: skip
        if isinstance(error, str):
            letter.error = _plain(error)[:_ERROR_CHARACTERS]
        else:
            letter.error = _plain(f"{type(error).__name__}: {error}")[:_ERROR_CHARACTERS]
            letter.traceback = _plain("".join(traceback.format_exception(error)))[-_TRACEBACK_CHARACTERS:]
        letter.last_at.GetCurrentTime()
        letter.first_at.CopyFrom(letter.last_at)
        try:
            if (earlier := await self._find(letter_id.subject(workspace))) is not None:
                letter.first_at.CopyFrom(earlier.first_at)
                letter.tries += earlier.tries
            await self._js.publish(letter_id.subject(workspace), letter.SerializeToString())
        except _TRANSIENT as failure:
            raise Unavailable(f"the dead letter {letter_id} cannot be stored: {failure or type(failure).__name__}") from failure
        telemetry.DEAD_LETTERS.labels(f"{self._service}/{consumer}").inc()
        telemetry.logger().error(
            "dead-letter", id=letter.id, type=letter.type, subject=letter.subject, tries=letter.tries, error=letter.error
        )

    async def _find(self, subject: str) -> c.DeadLetter | None:
        try:
            raw = await self._js.get_last_msg(DEAD_LETTERS, subject)
        except NotFoundError:
            return None
        return c.DeadLetter.FromString(raw.data or b"")

    async def get(self, workspace: str, letter_id: LetterId) -> c.DeadLetter:
        """A letter.

        Raises:
            NotFound: there is none with this id in the workspace.
        """
        found = await self._find(letter_id.subject(workspace))
        if found is None:
            raise NotFound("dead letter", str(letter_id), "`alveary admin dead-letters list` shows those there are")
        return found

    async def page(self, workspace: str, after: int, size: int) -> tuple[list[c.DeadLetter], int]:
        """Up to `size` letters of a workspace behind position `after`, oldest first, and the position to go on at (0: no more)."""
        letters: list[c.DeadLetter] = []
        while len(letters) <= size:
            try:
                raw = await self._js.get_msg(DEAD_LETTERS, seq=after + 1, subject=f"{_SUBJECT}.{token(workspace)}.>", next=True)
            except NotFoundError:
                return letters, 0
            if len(letters) == size:
                break
            after = raw.seq or 0
            letters.append(c.DeadLetter.FromString(raw.data or b""))
        return letters, after

    async def count(self, workspace: str) -> dict[str, int]:
        """How many letters a workspace has, by "<service>/<consumer>"."""
        info = await self._js.stream_info(DEAD_LETTERS, subjects_filter=f"{_SUBJECT}.{token(workspace)}.>")
        found: dict[str, int] = {}
        for subject in info.state.subjects or {}:
            _, _, service, consumer, _ = subject.split(".")
            found[f"{service}/{consumer}"] = found.get(f"{service}/{consumer}", 0) + 1
        return found

    async def total(self) -> int:
        """How many letters there are in all workspaces."""
        return (await self._js.stream_info(DEAD_LETTERS)).state.messages

    async def drop(self, workspace: str, letter_id: LetterId) -> None:
        """Forget a letter, if it is there."""
        await self._js.purge_stream(DEAD_LETTERS, subject=letter_id.subject(workspace))

    async def forget(self, consumer: str) -> None:
        """Drop all letters of one consumer of this service: it is about to see all events again."""
        await self._js.purge_stream(DEAD_LETTERS, subject=f"{_SUBJECT}.*.{self._service}.{consumer}.*")

    # ---- retrying -------------------------------------------------------------------------------------------------

    async def retry(self, letter: c.DeadLetter) -> tuple[str, str]:
        """Have the service that set a letter aside try it once more.

        Returns ("handled", "later" or "failed", what happened in words); "later": its read model is to be rebuilt.
        """
        if letter.consumer.startswith("aggregate-"):
            return "failed", "its aggregate is folded whenever it is loaded, without this event: drop the letter once that is dealt with"
        try:
            subject = f"{_RETRY}.{letter.service}.{letter.consumer}"
            reply = await self._connection.request(subject, str(letter.sequence).encode(), timeout=_RETRY_SECONDS)
        except nats.errors.NoRespondersError:
            return "failed", f"the service {letter.service} does not run, or has no {letter.consumer} any more"
        except nats.errors.TimeoutError:
            return "failed", f"the service {letter.service} did not finish within {_RETRY_SECONDS:g} s; it may still do so"
        except _TRANSIENT as failure:
            raise Unavailable(f"the message bus does not answer: {failure or type(failure).__name__}") from failure
        status, _, text = reply.data.decode().partition(" ")
        return status, text

    @contextlib.asynccontextmanager
    async def serving(
        self, consumer: str, handle: Callable[[int], Awaitable[tuple[str, str]]], *, each: bool = False
    ) -> AsyncIterator[None]:
        """While the block runs, `handle(sequence)` answers requests to this service to `retry` a letter of `consumer`.

        It is called in one replica, or in each.
        """

        async def answer(message: Msg) -> None:
            try:
                status, text = await handle(int(message.data))
            except Exception as error:
                telemetry.logger().error("dead-letter.retry", consumer=consumer, exc_info=error)
                status, text = "failed", f"{type(error).__name__}: {error}"
            await message.respond(f"{status} {_plain(text)[:_ERROR_CHARACTERS]}".encode())

        subject = f"{_RETRY}.{self._service}.{consumer}"
        subscription = await self._connection.subscribe(subject, queue="" if each else "redrive", cb=answer)
        try:
            yield
        finally:
            with contextlib.suppress(*_TRANSIENT):  # the connection may be gone, and the subscription with it
                await subscription.unsubscribe()


def _plain(text: str) -> str:
    """`text` as a protobuf string can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()
