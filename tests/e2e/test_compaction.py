"""Final runs become one event; nothing that a user sees changes, and views made from nothing see the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nats
import pytest
from support import embedded, finished, lines, submit, until

from alveary.local.layout import Layout

SCRIPT = """
    from alveary import Run
    run = Run.get_context()
    run.log("loss", 0.5)
    run.tag("k", "v")
    print("hello")
    open("outputs/model.txt", "w").write("m")
    """


def events_of(state_dir: Path, run_id: str) -> list[str]:
    layout = Layout.open(state_dir, None)

    async def read() -> list[str]:
        connection = await nats.connect(f"nats://127.0.0.1:{layout.ports.nats}", user="runs", password=layout.secrets["runs"])
        info = await connection.jetstream().stream_info("ALVEARY", subjects_filter="alveary.>")
        await connection.close()
        return sorted(".".join(s.split(".")[2:5:2]) for s in info.state.subjects or {} if run_id in s)

    return asyncio.run(read())


def test_compacted_runs_are_what_they_were(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALVEARY_COMPACT_AFTER_SECONDS", "0")
    monkeypatch.setenv("ALVEARY_COMPACT_INTERVAL_SECONDS", "0.2")
    state = tmp_path / "stack"
    with embedded(state) as first:
        workspace = first.workspace()
        run = submit(workspace, source, SCRIPT, tags={"a": "b"})
        failed = submit(workspace, source, "print('bad'); raise SystemExit(3)")
        before = finished(run)
        finished(failed, "Failed")
        for one in (run, failed):
            until(lambda one=one: events_of(state, one.id) == ["log.archived", "run.compacted"], f"{one.id} is compacted")  # type: ignore[misc]
    for file in (state / "services").glob("*.sqlite*"):
        file.unlink()
    with embedded(state, port=None) as second:
        again = second.workspace()
        same = again.get_run(run.id)
        after = same.get_details()
        for name in (
            "status",
            "submitted_at",
            "started_at",
            "ended_at",
            "tags",
            "attempt",
            "nodes",
            "exit",
            "spec",
            "metrics",
            "manifest_digest",
        ):
            assert after[name] == before[name], name
        assert lines(same) == ["hello"] and "outputs/model.txt" in same.get_file_names()
        model = same.register_model("compacted", "outputs/model.txt")
        assert model.run_id == run.id
        listed = again._call(again._client.runs.list('tags.a = "b" AND metrics.loss < 1'))
        assert [r.id for r in listed] == [run.id]
        same.tag("later", "yes")
        assert again.get_run(run.id).get_tags() == {"a": "b", "k": "v", "later": "yes"}
        assert again.get_run(failed.id).get_details()["exit"]["exit_code"] == 3
        finished(submit(again, source, "print('more')"))
