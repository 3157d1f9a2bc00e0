"""What each member of an attempt leaves is stored under names that all agree on, and published once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fakes import MemoryStore
from gang_wire import Wire

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.errors import Unavailable
from alveary_trainer.adapters.runtime import Host
from alveary_trainer.end_signal import EndSignal
from alveary_trainer.gang import Gang
from alveary_trainer.gang_channel import NO_FILE_NAMES, GangChannel
from alveary_trainer.gang_outputs import GangFiles
from alveary_trainer.member_outputs import FollowerOutputs, LeaderOutputs, MemberOutputs, SoloOutputs, Stored, Storing
from alveary_trainer.outputs import OutputStore
from alveary_trainer.rendezvous import Follower, Leader

EXITED = c.ExitStatus(reason=c.EXIT_REASON_EXITED, exit_code=0)


class FailingStore(MemoryStore):
    """Takes no file whose key ends so."""

    failing = "no such file"

    async def put_file(self, bucket: str, key: str, *rest: Any, **more: Any) -> c.FileEntry:
        if key.endswith(self.failing):
            raise Unavailable("the object store is away")
        return await super().put_file(bucket, key, *rest, **more)


def storing(store: MemoryStore, folder: Path, index: int, **files: str) -> Storing:
    for name, content in files.items():
        path = folder / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    outputs = OutputStore(store, "r", 1, index, folder, lambda text: None)  # type: ignore[arg-type]
    outputs.below = Path("/")
    return Storing(outputs, str, lambda text: None)


async def conclude(channel: GangChannel, outputs: MemberOutputs, ranks: list[int]) -> ev.AttemptFinished:
    """What an attempt does with a member's files."""
    await channel.start()
    await channel.rendezvous(Host("h", "", 1))
    await channel.running()
    await channel.ended(EXITED, 0.0, ranks)
    stored = await outputs.store()
    await channel.stored(stored.error)
    return await outputs.publish(channel.exit_status(EXITED), stored)


async def gang(store: MemoryStore, tmp_path: Path) -> ev.AttemptFinished:
    wire: Any = Wire()
    leader = Leader(wire, "where", Gang(2), "a", "1", EndSignal(), lambda text: None)
    follower = Follower(wire, "where", 1, "b", "2", EndSignal())
    of_leader = storing(store, tmp_path / "0", 0, model="leader", same="same", mine="x")
    of_follower = storing(store, tmp_path / "1", 1, model="follower", same="same", theirs="y")
    both = (
        conclude(leader, LeaderOutputs(of_leader, leader, GangFiles(store, of_leader.outputs, 0)), [0]),  # type: ignore[arg-type]
        conclude(follower, FollowerOutputs(of_follower, follower, GangFiles(store, of_follower.outputs, 1)), [1]),  # type: ignore[arg-type]
    )
    try:
        async with asyncio.timeout(20):
            finished, _ = await asyncio.gather(*both)
    finally:
        await follower.close()
        await leader.close()
    return finished


async def test_every_member_keeps_its_outputs_and_what_two_have_is_stored_once(tmp_path: Path) -> None:
    store = MemoryStore()
    finished = await gang(store, tmp_path)
    files = {key.removeprefix("r/1/"): await store.get("runs", key) for key in await store.keys("runs", "r/1/")}
    manifest = json.loads(files.pop("manifest.json"))
    assert files == {
        "outputs/model": b"leader",
        "outputs/node-1/model": b"follower",
        "outputs/same": b"same",
        "outputs/mine": b"x",
        "outputs/theirs": b"y",
    }
    assert sorted(one["path"] for one in manifest["files"]) == sorted(files)
    assert (finished.exit.reason, finished.output_files) == (c.EXIT_REASON_EXITED, 5)


@pytest.mark.parametrize("failing", ["outputs/mine", "outputs/theirs"])
async def test_what_one_member_cannot_store_fails_the_attempt(tmp_path: Path, failing: str) -> None:
    store = FailingStore()
    store.failing = failing
    finished = await gang(store, tmp_path)
    assert finished.exit.reason == c.EXIT_REASON_UPLOAD_FAILED and "the object store is away" in finished.exit.message
    assert finished.exit.node == ("a" if failing == "outputs/mine" else "b")
    assert not finished.manifest_digest


async def test_one_node_publishes_what_was_stored_by_an_interruption(tmp_path: Path) -> None:
    store = FailingStore()
    store.failing = "outputs/b"
    outputs = SoloOutputs(storing(store, tmp_path, 0, a="a", b="b"))
    assert "the object store is away" in (await outputs.store()).error
    finished = await outputs.publish_partial(c.ExitStatus(reason=c.EXIT_REASON_CANCELED))
    assert (finished.exit.reason, finished.output_files) == (c.EXIT_REASON_CANCELED, 1)


async def test_a_failed_run_whose_outputs_are_not_stored_keeps_its_reason_and_says_both(tmp_path: Path) -> None:
    store, died = FailingStore(), c.ExitStatus(reason=c.EXIT_REASON_OUT_OF_MEMORY, message="it needed too much")
    store.failing = "outputs/b"
    solo = SoloOutputs(storing(store, tmp_path / "solo", 0, a="a", b="b"))
    of_leader = storing(store, tmp_path / "gang", 0, a="a")
    files = GangFiles(store, of_leader.outputs, 0)  # type: ignore[arg-type]
    leader = LeaderOutputs(of_leader, Leader(Wire(), "where", Gang(2), "a", "1", EndSignal(), lambda text: None), files)  # type: ignore[arg-type]
    undecided = Stored(error="its outputs could not be stored: the object store is away", file_names_digest=NO_FILE_NAMES)
    for finished in (await solo.publish(died, await solo.store()), await leader.publish(died, undecided)):
        assert finished.exit.reason == c.EXIT_REASON_OUT_OF_MEMORY
        assert finished.exit.message == "it needed too much; its outputs could not be stored: the object store is away"
