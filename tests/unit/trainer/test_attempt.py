"""What is known of an attempt where supervising it fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_trainer import supervisor
from alveary_trainer.assignment import Progress
from alveary_trainer.attempt import Attempt
from alveary_trainer.end_signal import EndSignal
from alveary_trainer.rank_state import Rank
from alveary_trainer.supervisor import ProcessSupervisor


class Nothing:
    """Starts, finishes and closes."""

    async def start(self) -> None: ...

    async def finish(self, *_: object) -> None: ...

    async def close(self) -> None: ...


class OneRank(Nothing):
    """The ranks of a node, of which one has failed."""

    def __init__(self, *_: object) -> None:
        self.ranks = {3: Rank(3, 0, exit_code=1, ended_at=12.0)}


class Launched:
    """A launcher of nothing."""

    def __init__(self, *_: object) -> None: ...

    async def launch(self, ranks: object, command: Sequence[str]) -> None: ...


async def broken(*_: object) -> None:
    raise LookupError("a bug")


async def test_the_ranks_of_an_attempt_whose_supervising_fails_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "Ranks", OneRank)
    monkeypatch.setattr(supervisor, "ProcessLauncher", Launched)
    monkeypatch.setattr(ProcessSupervisor, "_watch", broken)
    node = SimpleNamespace(sockets_dir=tmp_path / "sockets", runtime_dir=tmp_path, runtime=SimpleNamespace(leave=lambda paths: None))
    (tmp_path / "root").mkdir()
    assignment: Any = SimpleNamespace(node=node, root=tmp_path / "root", name="r-1", number=1, run_id="r")
    channel, end = SimpleNamespace(start=Nothing().start, launch_on=None), EndSignal()
    logs: Any = SimpleNamespace(lines=None, log_system_line=lambda line: None)
    supervising = ProcessSupervisor(
        assignment, cast(Any, channel), logs, Progress(), end, lambda paths: cast(Any, Nothing()), lambda paths: cast(Any, Nothing()),
        cast(Any, broken),
    )  # fmt: skip
    attempt = Attempt.__new__(Attempt)
    attempt.assignment, attempt.end = assignment, end
    attempt._parts = cast(Any, SimpleNamespace(channel=channel, supervisor=supervising, log=lambda line: None))

    async def prepare() -> Any:
        return SimpleNamespace(inputs={}), None, ()

    monkeypatch.setattr(attempt, "_prepare", prepare)
    status, supervised = await attempt._stage_and_supervise()
    assert status.reason == c.EXIT_REASON_INTERNAL_ERROR
    assert {number: rank.exit_code for number, rank in supervised.ranks.items()} == {3: 1}
