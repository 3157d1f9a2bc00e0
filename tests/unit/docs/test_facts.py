"""What the docs say is so: tables, names and numbers in them are compared with the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest
from docs_pages import ROOT, blocks, checked_tables, code, inline_code, name_of, pages, prose, table_after
from reference.settings import settings_classes

import alveary
from alveary.cli import app
from alveary.cli.run_logs import SHOWN
from alveary.local.layout import DEFAULT_PORT, SERVICES, Ports
from alveary.script_run import ContextRun
from alveary_contracts import exit_reasons
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2
from alveary_contracts.names import AGGREGATES, event_name
from alveary_core.access import BUCKETS, WRITES
from alveary_core.eventlog import stream_configs
from alveary_runs.validation import _RETRIED

PAGES = pytest.mark.parametrize("page", pages(), ids=name_of)
SEVEN = ("runs", "images", "scheduler", "trainer", "logs", "registry", "archiver")
LAYOUT = ("domain.py", "handlers.py", "api.py", "projection.py", "adapters/", "settings.py", "__main__.py")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@cache
def sources() -> str:
    """Everything in the tree that is no documentation."""
    folders = ("libs", "services", "tools", "tests", "deploy", "examples")
    kinds = {".py", ".sh", ".yml", ".json", ".proto", ".toml", ""}
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in kinds and f.is_file() and f != Path(__file__)]
    return "\n".join(f.read_text(errors="replace") for f in [*files, ROOT / "docker-compose.yml", ROOT / "Makefile"])


@cache
def events() -> dict[str, list[str]]:
    """Events by aggregate, in the order of the protos."""
    found: dict[str, list[str]] = {aggregate: [] for aggregate in AGGREGATES}
    for name in events_pb2.DESCRIPTOR.message_types_by_name:
        if kind := event_name(name):
            found[kind[0]].append(kind[1])
    return found


# ---- tables -------------------------------------------------------------------------------------------------------------


def _aggregates(rows: list[list[str]]) -> None:
    assert {code(a)[0]: (writer, set(code(names))) for a, writer, names in rows} == {
        a: (AGGREGATES[a], set(names)) for a, names in events().items()
    }


def _streams(rows: list[list[str]]) -> None:
    assert {code(name)[0]: code(subjects) for name, subjects, _ in rows} == {str(s.name): s.subjects for s in stream_configs()}


def _publishers(rows: list[list[str]]) -> None:
    assert {user: tuple(code(subjects)) for user, subjects in rows} == WRITES


def _buckets(rows: list[list[str]]) -> None:
    assert {key: dict(re.findall(r"`(\w+)` (\w+)", buckets)) for key, buckets in rows} == BUCKETS


def _files(rows: list[list[str]]) -> None:
    said = {re.sub(r"\[(\w+)\].*", r"\1", service): [c == "yes" for c in cells] for service, *cells in rows}
    there = {s: [(ROOT / "services" / s / f"alveary_{s}" / file).exists() for file in LAYOUT] for s in SEVEN}
    assert said == there
    for service, cells in there.items():
        page = (ROOT / f"docs/contributing/{service}.md").read_text()
        section = page.partition("\n## Files\n")[2].partition("\n## ")[0]
        lacking = {file for file, exists in zip(LAYOUT, cells, strict=True) if not exists}
        told = {file for sentence in re.findall(r"Without [^:]+:", section) for file in code(sentence)}
        assert told == lacking, f"docs/contributing/{service}.md, Files"


def _exit_reasons(rows: list[list[str]]) -> None:
    reasons = {code(reason)[0]: retried for reason, _, retried in rows}
    assert {r for r, retried in reasons.items() if retried.startswith("yes")} == {exit_reasons.word(r) for r in _RETRIED}
    between_trainers = {c.EXIT_REASON_UNSPECIFIED, c.EXIT_REASON_PEER_FAILURE}
    assert set(reasons) == {exit_reasons.word(r) for r in c.ExitReason.values() if r not in between_trainers}


def _log_streams(rows: list[list[str]]) -> None:
    said = {name for cell, _ in rows for name in code(cell)}
    assert said >= set(SHOWN)
    assert said - {"logs/<path>"} == {n for n in said if f'"{n}"' in sources()}


def _wait_codes(rows: list[list[str]]) -> None:
    assert [code(name)[0] for name, *_ in rows] == [name.removeprefix("WAIT_CODE_") for name in c.WaitCode.keys()[1:]]


CHECKS: dict[str, Callable[[list[list[str]]], None]] = {
    "aggregates": _aggregates,
    "streams": _streams,
    "publishers": _publishers,
    "buckets": _buckets,
    "files": _files,
    "exit-reasons": _exit_reasons,
    "log-streams": _log_streams,
    "wait-codes": _wait_codes,
}


def test_each_marked_table_has_a_check() -> None:
    assert set(checked_tables()) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_table_says_what_the_code_does(name: str) -> None:
    CHECKS[name](checked_tables()[name])


# ---- names ----------------------------------------------------------------------------------------------------------------


@PAGES
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target or target.startswith("#"):
            continue
        place = (page.parent / target.partition("#")[0]).resolve()
        assert place.exists() or place.parent.name == "reference", f"{name_of(page)} links to {target}"


@PAGES
def test_paths_of_the_repository_exist(page: Path) -> None:
    for found in inline_code(page):
        if re.fullmatch(r"(libs|services/[a-z]+/alveary_|protos|tests|tools|examples|deploy|docs)[\w./-]*/[\w./-]+", found):
            assert (ROOT / found).exists() or found.startswith(("docs/reference", "deploy/secrets")), f"{name_of(page)} names {found}"


@pytest.mark.parametrize("service", [*SEVEN, "core", "sdk"])
def test_the_map_of_a_service_names_modules_that_exist(service: str) -> None:
    page = (ROOT / f"docs/contributing/{service}.md").read_text()
    libraries = {"core": "libs/core/alveary_core", "sdk": "libs/sdk/alveary"}
    package = ROOT / libraries.get(service, f"services/{service}/alveary_{service}")
    mark = re.search(r"^\| Module \| Job \|$", page, re.MULTILINE)
    assert mark, f"docs/contributing/{service}.md has no table of modules"
    for module, _ in table_after(page, mark.start()):
        for name in code(module):
            assert (package / name).exists(), f"docs/contributing/{service}.md names {name}"


@PAGES
def test_events_that_are_named_exist(page: Path) -> None:
    classes = {
        "run": (alveary.Run, ContextRun),
        "model": (alveary.Model,),
        "dataset": (alveary.Dataset,),
        "target": (alveary.ComputeTarget,),
    }
    named = re.compile(rf"({'|'.join(AGGREGATES)})\.([a-z_]+)")
    diagrams = [pair for b in blocks(page) if b.language == "mermaid" for pair in named.findall(b.text)]
    for aggregate, event in [*diagrams, *(m.groups() for found in inline_code(page) if (m := named.fullmatch(found)))]:
        known = event in events()[aggregate] or any(hasattr(c, event) for c in classes.get(aggregate, ()))
        assert known or event in ("md", "py"), f"{name_of(page)} names {aggregate}.{event}"


@PAGES
def test_subjects_that_are_named_exist(page: Path) -> None:
    known = {s.partition(".")[0] for subjects in WRITES.values() for s in subjects} | {"alveary-dead", "alveary-redrive"}
    for found in re.findall(r"`(alveary-[a-z]+)\.[^`]*`", prose(page)):
        assert found in known, f"{name_of(page)} names {found}"


@PAGES
def test_variables_that_are_named_exist(page: Path) -> None:
    known = {f.variable for c in settings_classes() for f in c.fields}
    known |= {v.replace("ALVEARY_", "ALVEARY_TRAINER_") for v in known}
    for found in set(re.findall(r"ALVEARY_[A-Z0-9_]*[A-Z0-9]\b(?!_)", page.read_text())):
        assert found in known or re.search(rf"\b{found}\b", sources()), f"{name_of(page)} names {found}"


@PAGES
def test_metrics_that_are_named_exist(page: Path) -> None:
    for found in inline_code(page):
        if re.fullmatch(r"alveary_[a-z_]+_(total|seconds|bytes|sequence)", found):
            assert f'"{found.removesuffix("_total")}' in sources(), f"{name_of(page)} names {found}"


def _command_lines(page: Path) -> list[str]:
    shown = [line for b in blocks(page) if b.language not in ("python", "mermaid") for line in b.text.splitlines()]
    lines = [re.sub(r"^(\$ )?(\.venv/bin/)?", "", line.strip()) for line in [*shown, *inline_code(page)]]
    return [line for line in lines if re.match(r"alveary [a-z-]", line)]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)[1:]
    except ValueError:
        return line.split()[1:]


@PAGES
def test_commands_and_options_that_are_shown_exist(page: Path) -> None:
    for line in _command_lines(page):
        command: click.Command = app
        words = [w.strip("[],.:") for w in _words(line)]
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            context = click.Context(command)
            found = command.get_command(context, words[0])
            assert found is not None, f"{name_of(page)}: {line!r}: no command {words[0]!r}"
            command, words = found, words[1:]
        options = {o for p in command.get_params(click.Context(command)) for o in (*p.opts, *p.secondary_opts)}
        for word in words:
            if word == "--" or word.endswith(".py"):
                break  # what follows is the script's
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in options, f"{name_of(page)}: {line!r}: no option {word}"


@PAGES
def test_tests_that_are_named_exist(page: Path) -> None:
    for found in inline_code(page):
        if re.fullmatch(r"test_[a-z0-9_]+", found):
            assert f"def {found}(" in sources(), f"{name_of(page)} names {found}"


@PAGES
def test_make_targets_that_are_shown_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = [line for b in blocks(page) if b.language not in ("python", "mermaid") for line in b.text.splitlines()]
    for line in [*shown, *inline_code(page)]:
        if found := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*make ([a-z][a-z-]*)", line.strip()):
            assert found[1] in targets, f"{name_of(page)}: {line!r}"


@PAGES
def test_python_that_is_shown_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text.replace("(...", "(*()"), block.page, "exec")


# ---- numbers --------------------------------------------------------------------------------------------------------------


def test_ports_are_counted_right() -> None:
    text = (ROOT / "docs/operating.md").read_text()
    assert f"{len(fields(Ports))} consecutive ports from BASE (default {DEFAULT_PORT})" in text
    assert f"with `--separate`, {_NUMBERS[len(SERVICES)]} ports from there" in " ".join(text.split())


def test_services_are_counted_right() -> None:
    assert f"{_NUMBERS[len(SEVEN)]} services" in (ROOT / "README.md").read_text()
    assert {p.name for p in (ROOT / "services").iterdir() if (p / "pyproject.toml").exists()} == set(SEVEN)


def test_ports_of_compose_are_those_of_its_file() -> None:
    compose = (ROOT / "docker-compose.yml").read_text() + (ROOT / "tools/compose_init.py").read_text()
    for port in re.findall(r"\b74\d\d\b", (ROOT / "docs/compose.md").read_text()):
        assert port in compose, port


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs/decisions"
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "index.md").read_text())
    assert listed == sorted(p.name for p in folder.glob("0*.md"))


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "zensical.toml").read_text()
    for page in pages():
        if page.is_relative_to(ROOT / "docs"):
            assert f'"{page.relative_to(ROOT / "docs")}"' in navigation, name_of(page)
