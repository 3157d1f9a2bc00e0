"""Checkpoints are copied whole, the newest are kept, and the next attempt finds them."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from fakes import MemoryStore

from alveary_core.objectstore import DigestMismatch
from alveary_trainer.adapters.runtime import StagingFailed
from alveary_trainer.checkpoints import Checkpoints, fetch


def write(folder: Path, name: str, text: str, age: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (1000 + age, 1000 + age))


async def found(store: MemoryStore, into: Path, *sources: tuple[str, int]) -> dict[str, str]:
    await fetch(store, sources, into)  # type: ignore[arg-type]
    return {p.relative_to(into).as_posix(): p.read_text() for p in into.rglob("*") if p.is_file()}


async def test_the_newest_are_kept_and_only_what_stood_still_is_copied(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "c"
    kept = Checkpoints(store, "r", 1, folder, keep=2)  # type: ignore[arg-type]
    assert await kept.sync(tmp_path) == 0
    write(folder, "a.pt", "A", 1)
    assert await kept.sync(tmp_path) == 0, "it may still be being written"
    assert await kept.sync(tmp_path) == 1
    write(folder, "b/x", "BX", 2)
    write(folder, "b/y", "BY", 2)
    write(folder, "c.pt", "C", 3)
    write(folder, ".writing", "half", 4)
    await kept.sync(tmp_path)
    await kept.sync(tmp_path)
    assert await found(store, tmp_path / "1", ("r", 1)) == {"b/x": "BX", "b/y": "BY", "c.pt": "C"}
    assert len(store.objects) == 4, "what is no longer named is removed"


async def test_a_file_that_changes_keeps_its_last_whole_version(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "c"
    kept = Checkpoints(store, "r", 1, folder, keep=3)  # type: ignore[arg-type]
    write(folder, "last.pt", "one", 1)
    await kept.sync(tmp_path)
    await kept.sync(tmp_path)
    write(folder, "last.pt", "two, half", 2)
    await kept.sync(tmp_path)
    assert await found(store, tmp_path / "1", ("r", 1)) == {"last.pt": "one"}
    write(folder, "last.pt", "two, whole", 3)
    await kept.sync(tmp_path, last=True)
    assert await found(store, tmp_path / "2", ("r", 1)) == {"last.pt": "two, whole"}


async def test_the_newest_attempt_that_has_any_is_taken_then_the_other_run(tmp_path: Path) -> None:
    store = MemoryStore()
    for run, attempt, text in (("other", 2, "theirs"), ("r", 1, "mine")):
        folder = tmp_path / f"{run}-{attempt}"
        write(folder, "x", text, 1)
        await Checkpoints(store, run, attempt, folder, keep=3).sync(tmp_path, last=True)  # type: ignore[arg-type]
    sources = (("r", 2), ("r", 1), ("other", 2))
    assert await found(store, tmp_path / "1", *sources) == {"x": "mine"}
    assert await found(store, tmp_path / "2", ("new", 1), ("other", 2)) == {"x": "theirs"}
    assert await fetch(store, [("new", 1)], tmp_path / "3") is None  # type: ignore[arg-type]


async def test_a_link_out_of_the_run_is_not_followed(tmp_path: Path) -> None:
    store, folder, secret = MemoryStore(), tmp_path / "run/c", tmp_path / "secret"
    secret.write_text("of the node")
    folder.mkdir(parents=True)
    (folder / "link").symlink_to(secret)
    await Checkpoints(store, "r", 1, folder, keep=3).sync(tmp_path / "run", last=True)  # type: ignore[arg-type]
    assert store.objects == {}


async def test_what_is_missing_or_damaged_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    write(tmp_path / "c", "x", "good", 1)
    await Checkpoints(store, "r", 1, tmp_path / "c", keep=3).sync(tmp_path, last=True)  # type: ignore[arg-type]
    (blob,) = [key for key in store.objects if not key[1].endswith(".json")]
    store.objects[blob] = b"evil"
    with pytest.raises(DigestMismatch):
        await found(store, tmp_path / "1", ("r", 1))
    del store.objects[blob]

    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(asyncio, "sleep", at_once)
    with pytest.raises(StagingFailed, match="attempt 1"):
        await found(store, tmp_path / "2", ("r", 1))


async def test_a_link_among_checkpoints_is_one_for_the_next_attempt_and_keeps_its_target(tmp_path: Path) -> None:
    store, folder, remarks = MemoryStore(), tmp_path / "c", list[str]()
    kept = Checkpoints(store, "r", 1, folder, keep=2, log=remarks.append)  # type: ignore[arg-type]
    for age in range(1, 5):
        write(folder, f"e{age}.ckpt", f"E{age}", age)
        write(folder, f"epoch{age}/w", f"W{age}", age)
    (folder / "last.ckpt").symlink_to("e4.ckpt")
    (folder / "best.ckpt").symlink_to(folder / "e1.ckpt")  # absolute, and of one that is old
    (folder / "latest").symlink_to("epoch4")
    (folder / "chain").symlink_to("last.ckpt")
    (folder / "epoch4/init").symlink_to("../e4.ckpt")
    (folder / "gone").symlink_to("nowhere")
    (folder / "outside").symlink_to("/etc")
    os.link(folder / "e4.ckpt", folder / "hard.ckpt")
    await kept.sync(tmp_path, last=True)
    await fetch(store, [("r", 1)], tmp_path / "found")  # type: ignore[arg-type]
    into = tmp_path / "found"
    assert {p.relative_to(into).as_posix() for p in into.rglob("*")} == {
        "e4.ckpt", "hard.ckpt", "epoch4", "epoch4/w", "epoch4/init", "last.ckpt", "best.ckpt", "e1.ckpt", "latest", "chain"
    }  # fmt: skip
    links = {name: str((into / name).readlink()) for name in ("last.ckpt", "best.ckpt", "latest", "chain", "epoch4/init")}
    assert links == {"last.ckpt": "e4.ckpt", "best.ckpt": "e1.ckpt", "latest": "epoch4", "chain": "e4.ckpt", "epoch4/init": "../e4.ckpt"}
    assert (into / "latest/w").read_text() == "W4" and (into / "last.ckpt").read_text() == "E4"
    assert len(remarks) == 1 and "outside leads to a folder outside" in remarks[0]
    before = len(store.objects)
    await kept.sync(tmp_path, last=True)
    assert len(store.objects) == before and len(remarks) == 1


async def test_a_link_to_what_is_being_written_points_where_it_did(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "c"
    kept = Checkpoints(store, "r", 1, folder, keep=3)  # type: ignore[arg-type]
    write(folder, "e1", "one", 1)
    (folder / "last").symlink_to("e1")
    await kept.sync(tmp_path)
    await kept.sync(tmp_path)
    write(folder, "e2", "half of two", 2)
    (folder / "last").unlink()
    (folder / "last").symlink_to("e2")
    await kept.sync(tmp_path)
    assert await found(store, tmp_path / "1", ("r", 1)) == {"e1": "one", "last": "one"}
    await kept.sync(tmp_path)
    assert (await found(store, tmp_path / "2", ("r", 1)))["last"] == "half of two"


async def test_links_that_somebody_forged_lead_nowhere_else(tmp_path: Path) -> None:
    store, folder = MemoryStore(), tmp_path / "c"
    write(folder, "e1", "one", 1)
    await Checkpoints(store, "r", 1, folder, keep=3).sync(tmp_path, last=True)  # type: ignore[arg-type]
    key = ("runs", "r/checkpoints/1.json")
    for link in ({"path": "x", "target": "../../etc"}, {"path": "../x", "target": "e1"}):
        listing = json.loads(store.objects[key]) | {"links": [link]}
        store.objects[key] = json.dumps(listing).encode()
        with pytest.raises(StagingFailed, match="must be relative"):
            await fetch(store, [("r", 1)], tmp_path / "into")  # type: ignore[arg-type]
