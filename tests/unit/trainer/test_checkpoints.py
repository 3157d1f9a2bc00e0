"""Checkpoints are copied whole, the newest are kept, and the next attempt finds them."""

from __future__ import annotations

import asyncio
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
