"""Exit reasons are words for users, wherever they read or write one."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import MessageToDict

from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev


def test_every_reason_has_a_word_and_no_other_word_is_one() -> None:
    for number in c.ExitReason.values()[1:]:
        assert exit_reasons.from_word(exit_reasons.word(number)) == number
    assert exit_reasons.word(c.EXIT_REASON_OUT_OF_MEMORY) == "out_of_memory"
    assert exit_reasons.word(c.EXIT_REASON_UNSPECIFIED) == ""
    assert exit_reasons.word(4711) == "4711", "a newer version knows more"  # type: ignore[arg-type]
    for text in ("", "unspecified", "Exited", "EXIT_REASON_EXITED", "no such"):
        with pytest.raises(ValueError, match="is not an exit reason"):
            exit_reasons.from_word(text)


def test_the_json_of_messages_has_words() -> None:
    failed = ev.RunFailed(exit=c.ExitStatus(reason=c.EXIT_REASON_DISK_FULL, message="EXIT_REASON_EXITED"), properties={"reason": "x"})
    assert exit_reasons.with_words(MessageToDict(failed)) == {
        "exit": {"reason": "disk_full", "message": "EXIT_REASON_EXITED"},
        "properties": {"reason": "x"},
    }
    retrying = ev.RunRetrying(reason="why", spec=c.RunSpec(retry=c.RetryPolicy(on=[c.EXIT_REASON_EXITED, c.EXIT_REASON_SIGNAL])))
    data = exit_reasons.with_words(MessageToDict(retrying))
    assert data["reason"] == "why" and data["spec"]["retry"]["on"] == ["exited", "signal"]
    empty = exit_reasons.with_words(MessageToDict(c.ExitStatus(), always_print_fields_with_no_presence=True))
    assert empty["reason"] == ""
