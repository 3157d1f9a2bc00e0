"""What the distributions say of themselves."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import alveary

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(p.parent for p in [*ROOT.glob("libs/*/pyproject.toml"), *ROOT.glob("services/*/pyproject.toml")])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_distribution_is_described_and_typed(folder: Path) -> None:
    document = tomllib.loads((folder / "pyproject.toml").read_text())
    project = document["project"]
    assert (folder / project["readme"]).read_text().startswith(f"# {project['name']}\n")
    assert "Typing :: Typed" in project["classifiers"]
    for package in document["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (folder / package / "py.typed").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_all_distributions_have_the_one_version(folder: Path) -> None:
    document = tomllib.loads((folder / "pyproject.toml").read_text())
    assert document["project"]["dynamic"] == ["version"]
    assert (folder / document["tool"]["hatch"]["version"]["path"]).samefile(ROOT / "libs/sdk/alveary/__init__.py")
    assert version(document["project"]["name"]) == alveary.__version__


def test_compose_builds_images_of_this_version() -> None:
    defaults = set(re.findall(r"\$\{ALVEARY_VERSION:-([^}]+)\}", (ROOT / "docker-compose.yml").read_text()))
    assert defaults == {alveary.__version__}


def test_the_changelog_keeps_its_form() -> None:
    headings = re.findall(r"^##+ .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "## [Unreleased]"
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    for heading in headings:
        assert re.fullmatch(rf"## \[(Unreleased|\d+\.\d+\.\d+\] - \d{{4}}-\d\d-\d\d)\]?|### ({'|'.join(kinds)})", heading), heading
