"""DeadLetterService: events that services could not handle, and what an owner can do about them."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from nats.errors import Error as NatsError

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc as rpc
from alveary_core import auth, telemetry
from alveary_core.deadletters import DeadLetters, LetterId
from alveary_core.errors import InvalidArgument, NotFound

_MOST_AT_ONCE = 100
_MEASURE_SECONDS = 15.0
_TOKEN = re.compile(r"[0-9]{1,18}")


class DeadLetterService(rpc.DeadLetterServiceServicer):
    """alveary.runs.v1.DeadLetterService."""

    def __init__(self, letters: DeadLetters) -> None:
        self._letters = letters

    async def CountDeadLetters(self, request: pb.CountDeadLettersRequest, context: Any) -> pb.CountDeadLettersResponse:
        who = auth.require("reader")
        found = await self._letters.count(who.workspace)
        return pb.CountDeadLettersResponse(count=sum(found.values()), by_consumer=found)

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, context: Any) -> pb.ListDeadLettersResponse:
        who = auth.require("owner")
        size = request.page_size or 100
        if not 1 <= size <= 1000:
            raise InvalidArgument(("page_size", f"{size}: 1 to 1000"))
        if request.page_token and not _TOKEN.fullmatch(request.page_token):
            raise InvalidArgument(("page_token", "not a token that ListDeadLetters gave"))
        letters, following = await self._letters.page(who.workspace, int(request.page_token or 0), size)
        return pb.ListDeadLettersResponse(letters=letters, next_page_token=str(following) if following else "")

    async def RetryDeadLetters(self, request: pb.RetryDeadLettersRequest, context: Any) -> pb.RetryDeadLettersResponse:
        who = auth.require("owner")
        outcomes = []
        for letter_id in _ids(request.ids):
            outcome = pb.DeadLetterOutcome(id=str(letter_id))
            try:
                status, outcome.message = await self._letters.retry(await self._letters.get(who.workspace, letter_id))
                outcome.handled = status != "failed"
                if status == "handled":
                    await self._letters.drop(who.workspace, letter_id)
            except NotFound as error:  # the others are tried all the same
                outcome.message = str(error)
            outcomes.append(outcome)
        return pb.RetryDeadLettersResponse(outcomes=outcomes)

    async def DropDeadLetters(self, request: pb.DropDeadLettersRequest, context: Any) -> pb.DropDeadLettersResponse:
        who = auth.require("owner")
        for letter_id in _ids(request.ids):
            await self._letters.get(who.workspace, letter_id)
            await self._letters.drop(who.workspace, letter_id)
        return pb.DropDeadLettersResponse()


def _ids(texts: Any) -> list[LetterId]:
    if not 1 <= len(texts) <= _MOST_AT_ONCE:
        raise InvalidArgument(("ids", f"{len(texts)} ids: 1 to {_MOST_AT_ONCE}"))
    return [LetterId.parse(text) for text in texts]


async def measure(letters: DeadLetters) -> None:
    """For ever: keep the metric that tells how many dead letters there are."""
    while True:
        try:
            telemetry.DEAD_LETTERS_NOW.set(await letters.total())
        except (NatsError, OSError) as error:  # the bus does not answer: next time
            telemetry.logger().warning("dead-letters.measure", error=str(error) or type(error).__name__)
        await asyncio.sleep(_MEASURE_SECONDS)
