"""The command line against a platform of canned answers: what it imports, shows, accepts and says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import pytest

from alveary.cli import app
from alveary.cli.lazy import LazyGroup
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc

# What is paid for by those alone who use it: transfers, ignore files, settings, pictures of progress, other services.
HEAVY = {"google", "grpc", "asyncio", "ssl", "urllib3", "pathspec", "pydantic", "rich", "typer", "yaml", "minio", "nats", "psutil", "numpy"}


class Runs(runs_pb2_grpc.RunServiceServicer):
    """Answers with what a test put in `runs`, newest first."""

    def __init__(self) -> None:
        self.runs: list[pb.Run] = []

    def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        return pb.ListRunsResponse(runs=self.runs[: request.page_size])


class Platform:
    """A gRPC server, and the command line as a process that talks to it."""

    def __init__(self, folder: Path) -> None:
        self.service = Runs()
        self.server = grpc.server(ThreadPoolExecutor(2))
        runs_pb2_grpc.add_RunServiceServicer_to_server(self.service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.config = folder / "config.json"
        self.config.write_text(json.dumps({"endpoint": f"127.0.0.1:{port}", "token": "t"}))

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"ALVEARY_CONFIG": str(self.config)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path)
    yield made
    made.server.stop(None)


def imported(platform: Platform, *words: str) -> set[str]:
    """Packages that a command imports."""
    code = f"""
import sys
sys.argv = ["alveary", *{words!r}]
from alveary.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("IMPORTED", *sys.modules)
"""
    done = platform.python(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["run", "--help"], ["run", "list", "--help"], ["run", "submit", "--help"], ["up", "--help"]]
)
def test_help_imports_nothing_that_talks_to_a_platform(platform: Platform, words: list[str]) -> None:
    assert not {m.partition(".")[0] for m in imported(platform, *words)} & HEAVY


def test_a_list_of_runs_imports_what_it_needs_and_no_more(platform: Platform) -> None:
    platform.service.runs = [pb.Run(id="01JDXA6Z1N0000000000000001")]
    modules = imported(platform, "run", "list")
    assert not {m.partition(".")[0] for m in modules} & (HEAVY - {"google", "grpc", "asyncio", "ssl"})
    contracts = {m for m in modules if m.startswith("alveary_contracts.") and m.count(".") == 3}
    assert contracts == {
        f"alveary_contracts.{m}" for m in ("common.v1.common_pb2", "runs.v1.runs_pb2", "runs.v1.runs_pb2_grpc")
    }  # fmt: skip
    assert not modules & {f"alveary.{m}" for m in ("estimator", "compute", "transfer", "source", "progress", "local", "environment")}


def groups(group: LazyGroup) -> Iterator[tuple[str, click.Command, str]]:
    """Every command that is loaded when it is used: its name, itself, and what help says of it unloaded."""
    context = click.Context(group)
    for name, (_, text) in group.lazy.items():
        command = group.get_command(context, name)
        assert command is not None
        yield name, command, text
        if isinstance(command, LazyGroup):
            yield from groups(command)


def test_help_of_a_group_says_what_its_commands_say_of_themselves() -> None:
    for name, command, text in groups(app):
        assert command.name == name
        assert (command.help or "").startswith(text.rstrip(".")), name


def every(command: click.Command, path: str = "alveary") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from every(found, f"{path} {name}")


def test_every_command_has_help_that_fits_a_terminal() -> None:
    for path, command in every(app):
        text = command.get_help(click.Context(command, info_name=path, max_content_width=80, terminal_width=80))
        assert command.help, path
        assert all(len(line) <= 80 for line in text.splitlines()), text
