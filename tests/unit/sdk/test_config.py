"""config.json as people make it: what is wrong with it is said in a sentence."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alveary import Workspace
from alveary.client import connection
from alveary.config import find, load
from alveary.errors import AlvearyError, NoPlatform

GOOD = '{"endpoint": "127.0.0.1:7460", "token": "t"}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1, column 1 is not JSON"),
        ("{", "is not JSON"),
        ("[]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ('{"endpoint": "127.0.0.1:1"}', "it has no token"),
        ('{"token": ""}', "it has no endpoint and no token"),
        ('{"endpoint": 3, "token": "t"}', "endpoint is 3, where text is expected"),
        ('{"endpoint": "http://127.0.0.1:1", "token": "t"}', "is not HOST:PORT"),
        ('{"endpoint": "127.0.0.1", "token": "t"}', "is not HOST:PORT"),
        ('{"endpoint": "127.0.0.1:1", "token": "t", "endpoints": {"logs": "x"}}', "'x' of logs is not HOST:PORT"),
        ('{"endpoint": "127.0.0.1:1", "token": "two\\nlines"}', "characters that no token has"),
        ('{"endpoint": "127.0.0.1:1", "token": "t\\u00e9"}', "characters that no token has"),
        ('{"endpoint": "127.0.0.1:1", "token": "t", "tls": "yes"}', "true or false is expected"),
        ('{"endpoint": "127.0.0.1:1", "token": "t", "tls": true, "ca": "ca.pem"}', "ca is no certificate"),
        ("\xe9", "is not text in UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_config_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(AlvearyError) as caught:
        load(file)
    assert said in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("endpoint", ["localhost:1", "[::1]:7460", "platform.example.com:443", "unix:/tmp/x.sock"])
def test_good_configs_are_taken(tmp_path: Path, endpoint: str) -> None:
    (tmp_path / "config.json").write_text(GOOD.replace("127.0.0.1:7460", endpoint), encoding="utf-8-sig")  # as Windows writes it
    assert load(tmp_path).endpoint == endpoint


def test_another_programs_config_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALVEARY_CONFIG", raising=False)
    project = tmp_path / "project" / "deep"
    project.mkdir(parents=True)
    (project / "config.json").write_bytes(b"\xff\xfe binary")
    (project.parent / "config.json").mkdir()
    (tmp_path / "config.json").write_text(GOOD)
    monkeypatch.chdir(project)
    assert find() == tmp_path / "config.json"


def test_errors_of_the_command_line_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    for environment, code in (({"ALVEARY_CONFIG": str(tmp_path)}, 1), ({"ALVEARY_CONFIG": str(tmp_path / "none")}, 5)):
        done = subprocess.run(
            [sys.executable, "-m", "alveary.cli", "run", "list"], env=os.environ | environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_platform_that_does_not_answer_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    monkeypatch.setattr(connection, "CALL_TRIES", 1)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        (tmp_path / "config.json").write_text(GOOD.replace("127.0.0.1:7460", f"{host}:{taken.getsockname()[1]}"))
        with pytest.raises(NoPlatform, match=rf"no platform answers at {host}.*config.json.*alveary up"):
            Workspace.from_config(str(tmp_path)).get_details()
