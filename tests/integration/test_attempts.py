"""The life of an attempt: what goes wrong with one is its own, and each of its waits ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from trainer_node import Node, running

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.trainer.v1 import trainer_pb2 as pb
from alveary_core.errors import Unavailable
from alveary_core.events import Key
from alveary_core.objectstore import ObjectStore
from alveary_trainer import attempt_parts, exit_status, launch
from alveary_trainer.adapters import process
from alveary_trainer.checkpoints import Checkpoints
from alveary_trainer.log_folder import LogFolder
from alveary_trainer.outputs import OutputStore
from alveary_trainer.staging import Stager


@pytest.fixture
async def node(bare_servers: Layout, tmp_path: Path) -> AsyncIterator[Node]:
    async with running(bare_servers, tmp_path / "node") as made:
        yield made


WAITS = """
import os, time
while not os.path.exists("go"): time.sleep(0.02)
print("went on")
"""


def bug(*_: Any, **__: Any) -> Any:
    raise LookupError("a bug in \udce9")


async def bug_later(*_: Any, **__: Any) -> Any:
    raise LookupError("a bug in \udce9")


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (launch, "program", bug), (Stager, "stage", bug_later), (process.ProcessRuntime, "launch", bug_later),
        (process.ProcessTree, "usage", bug), (exit_status, "classify", bug), (OutputStore, "store_all", bug_later),
        (OutputStore, "publish_manifest", bug_later), (process.ProcessTree, "wait", bug_later),
    ],
)  # fmt: skip
async def test_whatever_fails_of_one_attempt_fails_it_alone_and_says_so(
    node: Node, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, broken: Any
) -> None:
    neighbour = node.place(WAITS)
    await node.phase(neighbour, pb.ATTEMPT_PHASE_RUNNING)
    task = next(t for t in node.agent._tasks if t.get_name() == neighbour.assignment.name)
    with monkeypatch.context() as patch:
        if name == "usage":  # the neighbour is measured as well: only the next one is broken
            tree = neighbour._parts.supervisor.tree
            patch.setattr(
                process.ProcessTree, name, lambda self, original=process.ProcessTree.usage: original(self) if self is tree else bug()
            )
        else:
            patch.setattr(where, name, broken)
        # The broken measuring is noticed while the run goes on, everything else ends it.
        failing = node.place("import time; print('ran', flush=True); time.sleep(600)" if name == "usage" else "print('ran')")
        finished = await node.over(failing)
    assert finished.exit.reason == c.EXIT_REASON_INTERNAL_ERROR and "LookupError: a bug in" in finished.exit.message
    said = await node.lines(failing.assignment.run_id)
    assert any(line.startswith("Traceback") for line in said) and any("a bug in" in line for line in said)
    assert not (node.context.runs_dir / failing.assignment.name).exists()
    assert not task.done() and not node.agent.done.is_set()
    (node.context.runs_dir / neighbour.assignment.name / "work/go").touch()
    assert (await node.over(neighbour)).exit.exit_code == 0
    assert await node.lines(neighbour.assignment.run_id, "stdout") == ["went on"]


@pytest.mark.parametrize(("where", "name"), [(Checkpoints, "_scan"), (LogFolder, "_scan"), (attempt_parts, "remove_tree")])
async def test_what_is_beside_a_run_does_not_end_it(node: Node, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, bug)
        attempt = node.place("print('trained'); open('outputs/m', 'w').write('weights')")
        finished = await node.over(attempt)
    assert (finished.exit.reason, finished.exit.exit_code) == (c.EXIT_REASON_EXITED, 0)
    assert (await node.files(attempt))["outputs/m"] == b"weights"
    if where is not attempt_parts:
        assert any("a bug in" in line for line in await node.lines(attempt.assignment.run_id))


async def test_a_placement_that_cannot_be_taken_fails_and_one_event_stops_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_id()
    with monkeypatch.context() as patch:
        patch.setattr(attempt_parts, "Checkpoints", bug)
        with pytest.raises(KeyError):
            node.place("print('never')", run=run)
        await asyncio.gather(*node.agent._tasks)
    (event,) = await node.context.log.read(Key("default", "attempt", f"{run}-1"))
    assert isinstance(event.message, ev.AttemptFinished) and "LookupError" in event.message.exit.message

    class Raw:
        subject, headers, data = "alveary.default.placement.x.made", {"ce-time": "never"}, b"\xff"

    class Log:
        async def follow(self, subjects: list[str], start: int) -> Any:
            for sequence in (1, 2):
                yield Raw(), sequence
            yield None

    context = node.agent._context
    monkeypatch.setattr(context, "log", Log())
    await node.agent.follow(1)  # ends where the stream does, having set both aside


async def test_cancel_and_the_time_limit_work_while_outputs_are_being_stored(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    original, stuck = ObjectStore.put_file, asyncio.Event()

    async def stopping(self: ObjectStore, bucket: str, key: str, *rest: Any) -> Any:
        if key.endswith("outputs/second"):
            stuck.set()
            await asyncio.Event().wait()
        return await original(self, bucket, key, *rest)

    monkeypatch.setattr(ObjectStore, "put_file", stopping)
    code = "open('outputs/first', 'w').write('1'); open('outputs/second', 'w').write('2'); print('trained')"
    attempt = node.place(code)
    async with asyncio.timeout(60):
        await stuck.wait()
        while attempt._parts.store.progress[0] < 1:
            await asyncio.sleep(0.01)
    node.heed(attempt.assignment.run_id, ev.RunCancelRequested(requested_by="u"))
    finished = await node.over(attempt)
    assert finished.exit.reason == c.EXIT_REASON_CANCELED and "1 of 2 files" in finished.exit.message and finished.exit.exit_code == 0
    assert finished.output_files == 1 and finished.manifest_digest
    assert await node.lines(attempt.assignment.run_id, "stdout") == ["trained"]
    attempt = node.place(code, max_run_duration_seconds=1.5)
    finished = await node.over(attempt)
    assert finished.exit.reason == c.EXIT_REASON_TIMEOUT and "max_run_duration_seconds = 1.5" in finished.exit.message


async def test_what_is_broken_off_is_not_sent_any_further(node: Node) -> None:
    outputs = OutputStore(node.context.store, "r", 1, 0, node.context.runs_dir, lambda _: None)
    large = node.context.runs_dir / "large"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    outputs.below = Path("/")
    outputs.stop()  # as it is while the first part is being sent
    with pytest.raises(Unavailable, match="broken off"):
        await outputs.put(large, f"outputs/{new_id()}")
    assert await node.context.store.uploads("runs", "r/1/") == []


async def test_storing_that_stands_still_ends(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: ObjectStore, *_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(ObjectStore, "put_file", never)
    monkeypatch.setattr("alveary_trainer.outputs.STALLED_SECONDS", 0.1)
    finished = await node.over(node.place("open('outputs/first', 'w').write('1')"))
    assert finished.exit.reason == c.EXIT_REASON_UPLOAD_FAILED and "taken nothing for" in finished.exit.message


async def test_names_and_links_of_outputs(node: Node) -> None:
    attempt = node.place("""
        import os, socket
        open(b"outputs/caf\\xe9.txt", "w").write("not UTF-8"); open("outputs/caf%E9.txt", "w").write("its namesake")
        open("outputs/a\\\\b\\n.txt", "w").write("odd"); open("outputs/ü é.txt", "w").write("fine")
        os.makedirs("outputs/epoch3/deep"); open("outputs/epoch3/deep/w", "w").write("weights")
        os.symlink("epoch3", "outputs/best"); os.symlink("epoch3/deep/w", "outputs/last")
        os.symlink(os.path.abspath("outputs/epoch3"), "outputs/absolute"); os.symlink("..", "outputs/epoch3/loop")
        os.symlink("/etc", "outputs/etc"); os.symlink("/etc/hostname", "outputs/host"); os.symlink("nowhere", "outputs/broken")
        os.link("outputs/last", "outputs/hard"); os.mkfifo("outputs/pipe"); os.mkdir("outputs/empty")
        open(b"logs/\\xff.log", "wb").write(b"in a log\\n")
        """)  # fmt: skip
    finished = await node.over(attempt)
    assert finished.exit.exit_code == 0, finished
    files = await node.files(attempt)
    del files["manifest.json"]
    weights = {f"outputs/{name}": b"weights" for name in ("epoch3/deep/w", "best/deep/w", "absolute/deep/w", "last", "hard")}
    assert files == weights | {
        "outputs/caf%E9.txt": b"not UTF-8", "outputs/caf%E9.txt~2": b"its namesake", "outputs/a%5Cb%0A.txt": b"odd",
        "outputs/ü é.txt": b"fine", "logs/%FF.log": b"in a log\n",
    } or files == weights | {
        "outputs/caf%E9.txt~2": b"not UTF-8", "outputs/caf%E9.txt": b"its namesake", "outputs/a%5Cb%0A.txt": b"odd",
        "outputs/ü é.txt": b"fine", "logs/%FF.log": b"in a log\n",
    }  # fmt: skip
    assert finished.output_files == len(files)
    said = "\n".join(await node.lines(attempt.assignment.run_id))
    for words in (
        "caf\\xe9.txt: its name is not UTF-8: stored as", "outputs/epoch3/loop: not stored: it leads back", "outputs/etc: not stored: it leads outside",
        "outputs/host: not stored: it leads outside", "outputs/broken: not stored: a link that leads nowhere", "outputs/pipe: not stored: it is no file",
    ):  # fmt: skip
        assert words in said, said
    assert await node.lines(attempt.assignment.run_id, "logs/%FF.log") == ["in a log"]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
async def test_what_cannot_be_read_is_said(node: Node) -> None:
    attempt = node.place("import os; open('outputs/secret', 'w'); os.chmod('outputs/secret', 0)")
    assert (await node.over(attempt)).exit.exit_code == 0
    assert any("outputs/secret: not stored" in line for line in await node.lines(attempt.assignment.run_id))
