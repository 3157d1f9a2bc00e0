"""What `alveary node join` does before there is a trainer."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from alveary.cli.nodes import _authority, let_docker_trust
from alveary.errors import AlvearyError

PEM = "-----BEGIN CERTIFICATE-----\nMIIB>>>???\n-----END CERTIFICATE-----\n"


def test_the_authority_comes_from_a_file_or_from_the_command(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text(PEM)
    data = base64.urlsafe_b64encode(PEM.encode()).decode()
    assert _authority(None, "") == "" and _authority(tmp_path / "ca.crt", "") == PEM == _authority(None, data)
    for file, text in ((tmp_path / "ca.crt", data), (tmp_path / "gone", ""), (None, "a$b"), (None, data[:7]), (None, "aGVsbG8=")):
        with pytest.raises(AlvearyError) as caught:
            _authority(file, text)
        assert caught.value.code == "INVALID_ARGUMENT"


def test_docker_is_told_whom_to_trust_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_text(PEM)
    for nobody_asks in ("", "localhost:7461", "127.0.0.1:7461"):
        let_docker_trust(nobody_asks, ca, tmp_path / "certs.d")
    assert not (tmp_path / "certs.d").exists()
    for _ in range(2):
        let_docker_trust("hive.example.com:7461", ca, tmp_path / "certs.d")
    assert (tmp_path / "certs.d/hive.example.com:7461/ca.crt").read_text() == PEM
    assert capsys.readouterr().out.count("trusts hive.example.com:7461") == 1


def test_who_may_not_tell_docker_is_given_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.crt").write_text(PEM)

    def refuse(self: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(AlvearyError, match=r"sudo install -D -m 644 \S+ca.crt \S+hive:7461/ca.crt") as caught:
        let_docker_trust("hive:7461", tmp_path / "ca.crt", tmp_path / "certs.d")
    assert caught.value.code == "FAILED_PRECONDITION"
