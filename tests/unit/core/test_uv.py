"""pip's settings reach uv; Alveary's own never reach a build."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from alveary_core.uv import clean_environment, find_python, python_for, uv_environment


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


async def test_the_interpreter_that_the_platform_runs_on_serves_its_own_version_wherever_it_is(
    no_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for version in (f"{sys.version_info.major}.{sys.version_info.minor}", ".".join(map(str, sys.version_info[:3]))):
        assert await find_python(version) == sys.executable
        assert await python_for(version, fail) == sys.executable


async def test_another_version_comes_from_the_path_before_it_is_downloaded(
    no_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "none"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Stands for an interpreter of another version, as uv asks each that it meets what it is.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / f"python{version}").symlink_to(Path(sys.base_prefix, "bin", f"python{version}"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("alveary_core.uv.sys", SimpleNamespace(version_info=(3, 2, 1), executable=sys.executable, prefix=sys.prefix))
    found = await python_for(version, fail)
    assert Path(found).samefile(Path(sys.base_prefix, "bin", f"python{version}"))


async def test_a_download_is_said(no_settings: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "none"))
    said: list[str] = []

    async def say(text: str) -> None:
        said.append(text)

    assert await python_for("3.5", say) == "3.5"
    assert said == [
        f"Python 3.5 is not on this machine (the platform runs on {platform.python_version()}, and the PATH has none): it is downloaded"
    ]


async def fail(text: str) -> None:
    raise AssertionError(text)
