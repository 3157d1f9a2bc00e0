"""States of runs, and a run as plain data."""

from __future__ import annotations

from typing import Any

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.runs.v1 import runs_pb2 as pb

FINAL = (c.RUN_STATE_COMPLETED, c.RUN_STATE_FAILED, c.RUN_STATE_CANCELED)


def state_name(state: int) -> str:
    """A state's name as users know it: "NotStarted" of RUN_STATE_NOT_STARTED."""
    words = c.RunState.Name(state).removeprefix("RUN_STATE_").split("_")  # type: ignore[arg-type]
    return "".join(word.capitalize() for word in words)


def run_details(run: pb.Run) -> dict[str, Any]:
    """A run as plain data: the fields of the message, with `status` and `runId` beside them. Exit reasons are words."""
    from google.protobuf.json_format import MessageToDict

    fields = MessageToDict(run, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    plain: dict[str, Any] = exit_reasons.with_words(fields)
    plain["status"] = state_name(run.state)
    plain["runId"] = run.id
    plain.setdefault("exit", {})
    return plain
