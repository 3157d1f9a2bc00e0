"""Files of ./logs while a run lives: nothing of a text is missed or shipped twice, and nothing else is shipped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from alveary_trainer import log_folder
from alveary_trainer.log_folder import LogFolder, is_text


class Sink:
    def __init__(self) -> None:
        self.lines: dict[str, list[bytes]] = {}

    def add(self, message: Any) -> None:
        if not message.provisional:
            self.lines.setdefault(message.stream, []).append(message.data)

    async def room(self) -> None:
        return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "logs"
    made.mkdir()
    return made


def follow(folder: Path) -> tuple[LogFolder, Sink, list[str]]:
    sink, said = Sink(), list[str]()
    return LogFolder(folder, sink, 1, folder.parent, log=said.append), sink, said  # type: ignore[arg-type]


async def test_rotation_replacement_truncation_and_removal(folder: Path) -> None:
    logs, sink, _ = follow(folder)
    log = folder / "train.log"
    log.write_text("1\n2")
    await logs.look()
    with log.open("a") as file:
        file.write("nd\n")
    log.rename(folder / "train.log.1")  # rotated, with a line that was not shipped yet
    log.write_text("3\n")
    await logs.look()
    with log.open("w") as file:  # truncated, and longer than before at once
        file.write("four\nfive\n")
    await logs.look()
    with log.open("r+") as file:
        file.truncate(0)
    await logs.look()
    log.write_text("6\n")
    await logs.look()
    (folder / "new").write_text("7\n")
    (folder / "new").rename(log)  # replaced
    await logs.look()
    with log.open("a") as file:
        file.write("8\n")
    await logs.look()
    with log.open("a") as file:
        file.write("9\nno end")
    log.unlink()
    await logs.finish()
    assert (
        sink.lines["logs/train.log"] == [b"1", b"2nd", b"3", b"four", b"five", b"6", b"7", b"8", b"9", b"no end"] and len(sink.lines) == 1
    )


async def test_what_is_no_text_or_too_much_is_left_to_be_synced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_folder, "_MAX_BYTES", 1000)
    logs, sink, said = follow(folder)
    (folder / "events.out.tfevents.1.host").write_bytes(b"\x18\0\0\0\0\0\0\0" + b"x" * 100)
    (folder / "model.ckpt").write_bytes(os.urandom(5000))
    (folder / "large.csv").write_text("1,2\n" * 1000)
    (folder / "empty").touch()
    (folder / "utf.log").write_text("é" * 400 + "\n")
    (folder / "link.log").symlink_to("utf.log")
    os.mkfifo(folder / "pipe")
    deep = folder / "lightning/version_0"
    deep.mkdir(parents=True)
    (deep / "metrics.csv").write_text("a\n")
    await logs.look()
    await logs.look()
    assert set(sink.lines) == {"logs/utf.log", "logs/lightning/version_0/metrics.csv"}
    info = (folder / "events.out.tfevents.1.host").stat()
    assert not logs.follows((info.st_dev, info.st_ino)) and [t for t in said if "large.csv" in t] == said and len(said) == 1
    with (folder / "utf.log").open("a") as file:  # it grows beyond what is shipped
        file.write("more\n" * 300)
    await logs.finish()
    assert "logs/utf.log is no longer followed" in said[1]


async def test_only_so_many_are_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_folder, "_MAX_FILES", 3)
    logs, sink, said = follow(folder)
    for number in range(5):
        (folder / f"{number}.log").write_text("x\n")
    await logs.look()
    await logs.finish()
    assert len(sink.lines) == 3 and len(said) == 1 and "more than 3 files" in said[0]


@pytest.mark.parametrize(
    ("head", "text"),
    [(b"plain\n", True), ("é".encode()[:1], True), (b"a\x1b[31mred", True), (b"\x89PNG\r\n\x1a\n", False), (b"\xff\xfea\0", False), (b"caf\xe9 au lait", True)],
)  # fmt: skip
def test_text_is_told_from_data(head: bytes, text: bool) -> None:
    assert is_text(head) == text
