"""What a source directory or a dataset folder may hold, and what is said of the rest."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from alveary.errors import AlvearyError, AlvearyWarning
from alveary.source import manifest_of


def names(folder: Path, snapshot: bool = True, **options: bool) -> tuple[list[str], list[str]]:
    """Paths, and what was said."""
    said: list[str] = []
    manifest, paths = manifest_of(folder, snapshot, say=said.append, **options)
    assert [f.path for f in manifest.files] == list(paths)
    return sorted(paths), said


def write(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def test_outputs_and_logs_are_no_part_of_a_source_and_that_is_said_once(tmp_path: Path) -> None:
    write(tmp_path, "train.py", "outputs/model.pt", "outputs/checkpoints/e1", "logs/a.log", "src/outputs/kept.py", "my_logs/x")
    assert names(tmp_path) == (
        ["my_logs/x", "src/outputs/kept.py", "train.py"],
        [f"{tmp_path}: ./{n} is no part of the source: a run stores its own there" for n in ("logs", "outputs")],
    )
    with pytest.warns(AlvearyWarning, match="./outputs is no part"), pytest.warns(AlvearyWarning, match="./logs is no part"):
        manifest_of(tmp_path, True)
    assert "outputs/model.pt" in names(tmp_path, snapshot=False)[0]


def test_an_empty_outputs_folder_is_not_worth_a_word(tmp_path: Path) -> None:
    write(tmp_path, "train.py", "logs/a")
    (tmp_path / "outputs").mkdir()
    (tmp_path / ".gitignore").write_text("logs\n")
    assert names(tmp_path) == ([".gitignore", "train.py"], [])


def test_links_to_folders_of_the_source_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "train.py", "lib/v2/model.py")
    (tmp_path / "current").symlink_to("lib/v2")
    (tmp_path / "absolute").symlink_to(tmp_path / "lib")
    assert names(tmp_path)[0] == ["absolute/v2/model.py", "current/model.py", "lib/v2/model.py", "train.py"]
    assert names(tmp_path, snapshot=False)[0] == names(tmp_path)[0]


@pytest.mark.parametrize("snapshot", [True, False])
def test_links_to_folders_elsewhere_are_refused_by_name(tmp_path: Path, snapshot: bool) -> None:
    write(tmp_path / "elsewhere", "secret", "deep/er")
    write(tmp_path / "source", "train.py")
    (tmp_path / "source/data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AlvearyError, match=r"/source/data is a link to .*/elsewhere, a folder outside of") as caught:
        manifest_of(tmp_path / "source", snapshot)
    assert ("alvearyignore" if snapshot else "follow_links=True") in str(caught.value)
    assert names(tmp_path / "source", snapshot, follow_links=True)[0] == ["data/deep/er", "data/secret", "train.py"]
    (tmp_path / "source/.alvearyignore").write_text("data\n")
    assert names(tmp_path / "source")[0] == [".alvearyignore", "train.py"]


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "shared.yaml", "source/train.py")
    (tmp_path / "source/config.yaml").symlink_to("../shared.yaml")
    manifest, _ = manifest_of(tmp_path / "source", True)
    assert {f.path: f.size for f in manifest.files}["config.yaml"] == len("shared.yaml")


@pytest.mark.parametrize("snapshot", [True, False])
@pytest.mark.parametrize("target", [".", "..", "b/c"])
def test_loops_are_refused_by_name(tmp_path: Path, snapshot: bool, target: str) -> None:
    write(tmp_path, "a/b/c/f")
    (tmp_path / "a/b/c/loop").symlink_to(tmp_path / "a" / target)
    with pytest.raises(AlvearyError, match=r"/loop (leads back to a folder that it is in|is a link to)"):
        manifest_of(tmp_path / "a", snapshot)
    with pytest.raises(AlvearyError, match=r"/loop.* leads back to a folder that it is in"):
        manifest_of(tmp_path / "a", snapshot, follow_links=True)


def test_what_is_no_file_is_left_out_of_a_source_and_said(tmp_path: Path) -> None:
    write(tmp_path, "train.py")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".#lock").symlink_to("user@host.1234")
    (tmp_path / "self").symlink_to("self")
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            opened.bind("sock")
        finally:
            os.chdir(here)
        found, said = names(tmp_path)
        assert found == ["train.py"]
        text = "\n".join(said)
        assert "links that lead nowhere are left out: .#lock" in text and "left out: self" in text
        assert "pipes are left out: pipe" in text and "sockets are left out: sock" in text
        for name in ("pipe", "sock", ".#lock", "self"):
            folder = tmp_path / f"only-{name}"
            folder.mkdir()
            (folder / "a").write_text("a")
            (tmp_path / name).rename(folder / name)
            with pytest.raises(AlvearyError, match=rf"{name}: .* cannot be uploaded"):
                manifest_of(folder, False)


@pytest.mark.parametrize("snapshot", [True, False])
def test_names_that_are_not_utf8_are_refused_by_name(tmp_path: Path, snapshot: bool) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb"):
        pass
    with pytest.raises(AlvearyError, match=r"'caf\\\\udce9.txt' is not UTF-8: rename it"):
        manifest_of(tmp_path, snapshot)
    (tmp_path / ".alvearyignore").write_text("caf*\n")
    assert names(tmp_path)[0] == [".alvearyignore"]


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a/f", "b")
    (tmp_path / "b").chmod(0)
    with pytest.raises(AlvearyError, match="/b cannot be read: Permission denied"):
        manifest_of(tmp_path, False)
    (tmp_path / "b").chmod(0o600)
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(AlvearyError, match="/a cannot be read: Permission denied"):
            manifest_of(tmp_path, False)
    finally:
        (tmp_path / "a").chmod(0o700)


def test_what_fails_to_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a")
    bare = Path.open

    def refuse(self: Path, *arguments: object) -> object:
        if self.name == "a":
            raise PermissionError(13, "Permission denied", str(self))
        opened: object = bare(self, *arguments)  # type: ignore[call-overload]
        return opened

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AlvearyError, match="/a cannot be read: Permission denied"):
        manifest_of(tmp_path, False)


def test_a_virtual_environment_in_the_source_is_told_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, "train.py", *(f".venv/lib/m{n}.py" for n in range(2100)))
    with pytest.raises(AlvearyError, match=r"2101 files .* most files are in .venv/ \(2100 files, .*\.alvearyignore") as caught:
        manifest_of(tmp_path, True)
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_counting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alveary.source._COUNTED", 2100)
    write(tmp_path, *(f"f{n}" for n in range(2200)))
    with pytest.raises(AlvearyError, match="more than 2101 files"):
        manifest_of(tmp_path, True)
    monkeypatch.setattr("alveary.source.MOST_FILES", 2100)
    with pytest.raises(AlvearyError, match="more than 2100 files: pack small files"):
        manifest_of(tmp_path, False)


@pytest.mark.parametrize(("data", "kept"), [(b"\xef\xbb\xbfa.txt\r\n", ["b.txt"]), (b"a.txt\n", ["b.txt"])])
def test_ignore_files_of_other_editors_are_read(tmp_path: Path, data: bytes, kept: list[str]) -> None:
    write(tmp_path, "a.txt", "b.txt")
    (tmp_path / ".alvearyignore").write_bytes(data)
    assert [n for n in names(tmp_path)[0] if n != ".alvearyignore"] == kept


def test_an_ignore_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    (tmp_path / ".gitignore").write_bytes("a.txt\n".encode("utf-16"))
    with pytest.raises(AlvearyError, match=r"\.gitignore cannot be read"):
        manifest_of(tmp_path, True)


STACK = json.dumps({"format": 1, "ports": {}, "secrets": {"tokens": "hidden"}})
CONFIG = json.dumps({"endpoint": "127.0.0.1:7460", "token": "hidden", "workspace": "default"})


def test_secrets_of_a_platform_are_never_uploaded(tmp_path: Path) -> None:
    write(tmp_path, "train.py", "state/config.json", "state/nats/data", "mine/stack.json", "mine/config.json", ".alveary/x", "config.json")
    (tmp_path / "state/stack.json").write_text(STACK)
    (tmp_path / ".alveary/config.json").write_text(CONFIG)
    (tmp_path / "config.json").write_text(CONFIG)
    (tmp_path / "mine/config.json").write_text(json.dumps({"endpoint": "https://x", "token": "of another program", "team": "t"}))
    files, said = names(tmp_path)
    assert files == ["mine/config.json", "mine/stack.json", "train.py"]
    assert len(said) == 2 and "configs with a token of the platform are left out: config.json" in said[0]
    assert "which hold its secrets, are left out: state" in said[1]
    for folder in ("state", ".alveary"):
        with pytest.raises(AlvearyError, match="state directory of a platform|configs with a token of the platform cannot be uploaded"):
            manifest_of(tmp_path / folder, snapshot=False)
    with pytest.raises(AlvearyError, match="state directory of a platform, and holds its secrets: name another"):
        manifest_of(tmp_path / "state", snapshot=True)


def test_a_config_with_a_token_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path, "train.py")
    (tmp_path / "config.outside.json").write_text(CONFIG)
    (tmp_path / "other.json").write_text(json.dumps(json.loads(CONFIG) | {"note": "of mine"}))
    (tmp_path / "config.json").write_text(json.dumps({"endpoint": "https://api.example.com", "token": "of another program"}))
    (tmp_path / "stack.json").write_text(json.dumps({"services": {}, "secrets": {"password": {"file": "x"}}}))
    files, said = names(tmp_path)
    assert files == ["config.json", "stack.json", "train.py"]
    assert len(said) == 1 and "config.outside.json" in said[0]
    with pytest.raises(AlvearyError, match="other.json is a config with a token of the platform"):
        manifest_of(tmp_path / "other.json", snapshot=False)
