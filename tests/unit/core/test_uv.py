"""pip's settings reach uv; Alveary's own never reach a build."""

from __future__ import annotations

from pathlib import Path

import pytest

from alveary_core.uv import clean_environment, uv_environment


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import os

    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_", "ALVEARY_")):
            monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    return file


def test_pips_file_is_honoured_and_variables_win(no_settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_settings.write_text(
        "[global]\nindex-url = https://one.example/simple\nfind-links = /w1\n  /w2\ncert = /ca.pem\n[install]\ntrusted-host = one.example\n"
    )
    env = uv_environment()
    assert env["UV_DEFAULT_INDEX"] == "https://one.example/simple"
    assert env["UV_FIND_LINKS"] == "/w1,/w2"
    assert env["SSL_CERT_FILE"] == "/ca.pem" or "SSL_CERT_FILE" in __import__("os").environ
    assert env["UV_INSECURE_HOST"] == "one.example"
    monkeypatch.setenv("PIP_INDEX_URL", "https://two.example/simple")
    assert uv_environment()["UV_DEFAULT_INDEX"] == "https://two.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://three.example/simple")
    assert uv_environment()["UV_DEFAULT_INDEX"] == "https://three.example/simple"


def test_a_damaged_file_is_named(no_settings: Path) -> None:
    no_settings.write_text("index-url = no section\n")
    with pytest.raises(ValueError, match="pip's settings cannot be read"):
        uv_environment()


def test_a_build_sees_nothing_of_the_platforms_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALVEARY_S3_SECRET_KEY", "hidden")
    monkeypatch.setenv("ALVEARY_TOKEN_SECRET", "hidden")
    for env in (clean_environment(), uv_environment()):
        assert "hidden" not in env.values()
