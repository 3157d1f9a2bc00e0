"""The scheduler's rows on a disk that is full."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Key, body, envelope, name_of
from alveary_core.projection import Raw
from alveary_scheduler.projection import SchedulerProjection


def raw(sequence: int, aggregate: str, ident: str, message: object) -> Raw:
    key = Key("w", aggregate, ident)
    headers = envelope(key, message, f"id{sequence}", "test", "")  # type: ignore[arg-type]
    return Raw(key.subject(name_of(message)[1]), headers, body(message), sequence)  # type: ignore[arg-type]


async def test_a_batch_that_the_disk_refused_is_folded_once_and_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = SchedulerProjection(str(tmp_path / "s.sqlite"))
    view.db.execute("INSERT INTO position VALUES (1, 0, 'log')")
    spec = c.RunSpec(compute_target="t", resources=c.Resources(cpus=1, memory_bytes=1))
    node = ev.NodeJoined(target="t", incarnation="i", resources=c.Resources(cpus=4, memory_bytes=8))
    made = ev.PlacementMade(attempt=1, target="t", nodes=[ev.AllocatedNode(node="n", incarnation="i")], spec=spec)
    batch = [
        raw(1, "target", "t", ev.TargetCreated(spec=ev.ComputeSpec(kind=c.TARGET_KIND_LOCAL, max_nodes=1))),
        raw(2, "node", "n", node), raw(3, "run", "r", ev.RunPrepared(spec=spec)), raw(4, "placement", "r", made),
    ]  # fmt: skip
    refused = 2

    def flush() -> None:
        nonlocal refused
        if refused:
            refused -= 1
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    monkeypatch.setattr(view, "flush", flush)
    await view._commit(batch)
    pool = view.state.pools["w", "t"]
    assert list(view.state.placed) == ["r"] and not refused
    assert [m.cpu_milli for m in pool.nodes.cluster.machines if m] == [4000]
    assert int(pool.nodes.cluster.cpu[pool.nodes.cluster.rows["n"]]) == 3000, "its place is taken once"
    view.close()
    again = SchedulerProjection(str(tmp_path / "s.sqlite"))
    assert again.position == 4 and list(again.state.placed) == ["r"] and list(again.state.nodes) == ["n"]
    again.close()
