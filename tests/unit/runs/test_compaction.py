"""Compaction of runs, one of which cannot be compacted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core.errors import InvalidArgument
from alveary_core.eventlog import Appended
from alveary_runs.compaction import Compaction


async def test_a_run_that_cannot_become_one_event_holds_up_no_other() -> None:
    rows = [
        {"workspace": "w", "idempotency": "", "canceled": 0, "proto": pb.Run(id=name, state=c.RUN_STATE_COMPLETED).SerializeToString()}
        for name in ("bad", "good")
    ]
    appended: list[str] = []
    waited: list[int] = []

    async def append(key: Any, events: Any, expected: int) -> Appended:
        appended.append(key.id)
        if key.id == "bad":
            raise InvalidArgument(("run.compacted", "nan"))
        return Appended(7)

    async def found(sql: str, values: Any, *, slow: bool) -> Any:
        return rows[: values[1]]

    async def wait_for(sequence: int) -> None:
        waited.append(sequence)

    view: Any = SimpleNamespace(rows=found, wait_for=wait_for)
    log: Any = SimpleNamespace(append=append)
    compaction = Compaction(log, view, 0.0, 1.0)
    assert await compaction.compact(0.0) == 2
    assert appended == ["bad", "good"] and waited == [7]
    assert await compaction.compact(0.0) == 1  # it is not tried again
    assert appended == ["bad", "good", "good"]
