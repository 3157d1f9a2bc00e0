"""The command line against a platform of canned answers: what it imports, shows, accepts and says."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import grpc
import pytest

import alveary
from alveary.cli import app
from alveary.cli.lazy import LazyGroup
from alveary.cli.run_submit import submit
from alveary.text import width
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.logs.v1 import logs_pb2, logs_pb2_grpc
from alveary_contracts.registry.v1 import registry_pb2, registry_pb2_grpc
from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_contracts.runs.v1 import runs_pb2_grpc
from alveary_contracts.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

# What is paid for by those alone who use it: transfers, ignore files, settings, pictures of progress, other services.
HEAVY = {"google", "grpc", "asyncio", "ssl", "urllib3", "pathspec", "pydantic", "rich", "typer", "yaml", "minio", "nats", "psutil", "numpy"}


class Runs(runs_pb2_grpc.RunServiceServicer):
    """Answers with what a test put in `runs`, newest first, and `series`; whoever watches waits until the server stops."""

    def __init__(self) -> None:
        self.runs: list[pb.Run] = []
        self.series: list[pb.MetricSeries] = []
        self.asked: list[Any] = []
        self.stopped = threading.Event()
        # How far the read model is behind, as the platform words it.
        self.behind = ""
        # Ids by which calls named a run, other than GetRun, which takes a prefix.
        self.named: list[str] = []

    def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        self.asked.append(request)
        if self.behind:
            context.set_trailing_metadata((("alveary-behind", self.behind),))
        return pb.ListRunsResponse(runs=self.runs[: request.page_size])

    def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=next(r for r in self.runs if r.id.startswith(request.run_id)))

    def SubmitRun(self, request: pb.SubmitRunRequest, context: Any) -> pb.SubmitRunResponse:
        self.named += [request.spec.resume_from, request.spec.parent_run_id]
        return pb.SubmitRunResponse(run=self.runs[0])

    def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        self.named.append(request.run_id)
        return pb.CancelRunResponse(run=self.runs[0])

    def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        self.named.append(request.run_id)
        return pb.DeleteRunResponse()

    def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        self.named.append(request.run_id)
        return pb.GetMetricsResponse(series=[s for s in self.series if request.name in ("", s.name)])

    def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Iterator[pb.WatchRunResponse]:
        self.named.append(request.run_id)
        yield pb.WatchRunResponse(run=self.runs[0])
        if self.runs[0].state != c.RUN_STATE_FAILED:
            self.stopped.wait(60)

    def ListFiles(self, request: pb.ListFilesRequest, context: Any) -> pb.ListFilesResponse:
        self.named.append(request.run_id)
        if request.prefix == "none":
            return pb.ListFilesResponse()
        return pb.ListFilesResponse(files=[c.FileLink(file=c.FileEntry(path="outputs/m.pt", size=2_000_000))])


class Logs(logs_pb2_grpc.LogServiceServicer):
    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def Tail(self, request: logs_pb2.TailRequest, context: Any) -> Iterator[logs_pb2.TailResponse]:
        self.runs.named.append(request.run_id)
        if request.follow and self.runs.runs[0].state != c.RUN_STATE_FAILED:
            self.runs.stopped.wait(60)
        yield from ()

    def Read(self, request: logs_pb2.ReadRequest, context: Any) -> logs_pb2.ReadResponse:
        self.runs.named.append(request.run_id)
        return logs_pb2.ReadResponse()

    def Search(self, request: logs_pb2.SearchRequest, context: Any) -> logs_pb2.SearchResponse:
        self.runs.named.append(request.run_id)
        return logs_pb2.SearchResponse()


class Queue(scheduler_pb2_grpc.QueueServiceServicer):
    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def ExplainRun(self, request: scheduler_pb2.ExplainRunRequest, context: Any) -> scheduler_pb2.ExplainRunResponse:
        self.runs.named.append(request.run_id)
        return scheduler_pb2.ExplainRunResponse(waits_for="a node")


class Models(registry_pb2_grpc.ModelServiceServicer):
    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def PrepareModel(self, request: registry_pb2.PrepareModelRequest, context: Any) -> registry_pb2.PrepareModelResponse:
        self.runs.named.append(request.run_output.run_id)
        return registry_pb2.PrepareModelResponse()

    def RegisterModel(self, request: registry_pb2.RegisterModelRequest, context: Any) -> registry_pb2.RegisterModelResponse:
        self.runs.named.append(request.run_output.run_id)
        return registry_pb2.RegisterModelResponse(model=registry_pb2.ModelVersion(name="birds", version=4))

    def ListModels(self, request: registry_pb2.ListModelsRequest, context: Any) -> registry_pb2.ListModelsResponse:
        return registry_pb2.ListModelsResponse(models=[registry_pb2.ModelVersion(name="birds", version=3)])


class Platform:
    """A gRPC server, and the command line as a process that talks to it."""

    def __init__(self, folder: Path) -> None:
        self.service = Runs()
        self.server = grpc.server(ThreadPoolExecutor(4))
        runs_pb2_grpc.add_RunServiceServicer_to_server(self.service, self.server)
        logs_pb2_grpc.add_LogServiceServicer_to_server(Logs(self.service), self.server)
        registry_pb2_grpc.add_ModelServiceServicer_to_server(Models(self.service), self.server)
        scheduler_pb2_grpc.add_QueueServiceServicer_to_server(Queue(self.service), self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.config = folder / "config.json"
        self.config.write_text(json.dumps({"endpoint": f"127.0.0.1:{port}", "token": "t"}))
        self.environment = os.environ | {"ALVEARY_CONFIG": str(self.config)}
        self.environment.pop("COLUMNS", None)

    def stop(self) -> None:
        self.service.stopped.set()
        self.server.stop(None).wait()

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, timeout=60)

    def piped(self, *words: str) -> str:
        """What a command prints into a pipe."""
        command = [sys.executable, "-m", "alveary.cli", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    def shown(self, *words: str, columns: int = 80) -> list[str]:
        """The lines that a command shows on a terminal, as they are sent to it, without their ends."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen([sys.executable, "-m", "alveary.cli", *words], env=self.environment, stdout=theirs, stderr=theirs)
        os.close(theirs)
        data = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:  # EIO: the other side is closed
            while got := terminal.read(65536):
                data += got
        assert process.wait(60) == 0, data
        return data.decode().removesuffix("\r\n").split("\r\n")


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path)
    yield made
    made.stop()


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


# ---- what users wrote is shown, not obeyed --------------------------------------------------------------------------

NASTY = [
    "lr[/x]", "[red]alarm[/red]", "[link=http://x]y", "\x1b[2J\x1b[31mred", "a\rb", "two\nlines", "tab\there", "bell\x07", "\x9b31m", "x\x85y",
    "\u202egnp.exe", "\u2028line", "back\x08\x08", "nul\x00", "日本語の名前", "e\u0301", "👩\u200d🔬", "{braces} %s %(x)s", "-x", "",
]  # fmt: skip
STYLE = re.compile("\x1b\\[1m|\x1b\\[0m")


def run_named(place: int, name: str, **fields: Any) -> pb.Run:
    tail = hashlib.sha256(str(place).encode()).hexdigest().upper()[:16]
    made = pb.Run(id=f"01JDXA6Z1N{tail}", display_name=name, state=c.RUN_STATE_FAILED, reason=f"because {name}", **fields)
    made.spec.experiment, made.spec.compute_target = name or "none", "local"
    made.submitted_at.FromSeconds(1_700_000_000)
    made.started_at.FromSeconds(1_700_000_060)
    made.ended_at.FromSeconds(1_700_000_260)
    return made


@pytest.mark.parametrize("words", [["list"], ["list", "--wide"], ["show"], ["compare"]])
def test_names_are_neither_markup_nor_commands_to_the_terminal(platform: Platform, words: list[str]) -> None:
    platform.service.runs = [run_named(i, name, tags={"k": name}) for i, name in enumerate(NASTY)]
    for run in platform.service.runs:
        run.exit.last_lines.append(run.display_name)
    ids = [run.id for run in platform.service.runs]
    arguments = {"show": [[i] for i in ids[:8]], "compare": [ids]}.get(words[0], [[]])
    for more in arguments:
        lines = platform.shown("run", *words, *more)
        for line in lines:
            text = STYLE.sub("", line)
            assert not [letter for letter in text if unicodedata.category(letter) in ("Cc", "Zl", "Zp") or letter == "\u202e"], line
    if words[0] == "list":
        assert len(lines) == len(NASTY) + 1
        assert all("lr[/x]" in line or "01JDXA6Z1N" not in line for line in lines[1:2])


def test_in_a_pipe_each_run_is_a_line_and_each_value_a_field(platform: Platform) -> None:
    platform.service.runs = [run_named(i, name) for i, name in enumerate(NASTY)]
    lines = platform.piped("run", "list", "--metric", "loss").removesuffix("\n").split("\n")
    assert [line.split("\t")[0] for line in lines] == [run.id for run in platform.service.runs]
    assert {line.count("\t") for line in lines} == {8}
    assert lines[0].split("\t")[5:7] == ["2023-11-14T22:13:20.000Z", "200.000"]


# ---- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lists_fit_the_terminal_and_their_ids_can_be_typed(platform: Platform, columns: int) -> None:
    names = ["short", "n" * 200, "日本語の名前" * 9]
    platform.service.runs = [run_named(i * 7, name, metrics={"loss": 0.12345678, "acc": math.nan}) for i, name in enumerate(names)]
    platform.service.runs.append(run_named(8, "neighbour"))
    lines = [STYLE.sub("", line) for line in platform.shown("run", "list", "--metric", "loss", "--metric", "acc", columns=columns)]
    assert all(width(line) <= columns for line in lines), lines
    assert "0.1235" in lines[1] and "nan" in lines[1] and "3m20s" in lines[1] and "Failed" in lines[1]
    ids = [run.id for run in platform.service.runs]
    for line in lines[1:]:
        assert len([i for i in ids if i.startswith(line.split()[0])]) == 1


def test_options_become_a_filter_that_quotes_what_it_is_given(platform: Platform) -> None:
    platform.piped(
        "run",
        "list",
        "-e",
        'say "hi"\\',
        "--state",
        "Failed",
        "--tag",
        "k=v w",
        "--filter",
        "metrics.loss < 1",
        "--order-by",
        "metrics.loss",
    )
    (asked,) = platform.service.asked
    assert asked.filter == 'state = "Failed" AND experiment = "say \\"hi\\"\\\\" AND tags."k" = "v w" AND metrics.loss < 1'
    assert asked.order_by == "metrics.loss"


def test_a_run_is_shown_with_what_one_asks_next(platform: Platform) -> None:
    run = run_named(1, "first", metrics={"loss": 0.25}, number=4, nodes=["local-0"], attempt=2, submitted_by="me", image_digest="ab" * 32)
    run.spec.entry_script, run.spec.max_attempts, run.spec.node_count = "train.py", 3, 2
    run.spec.arguments[:] = ["--lr", "0.1", "two words"]
    run.spec.resources.cpus, run.spec.resources.gpus = 2, 1
    run.spec.environment.name = "torch"
    run.spec.environment.pip_packages[:] = ["torch", "numpy"]
    run.exit.exit_code, run.exit.reason = 3, c.EXIT_REASON_EXITED
    platform.service.runs = [run]
    sheet = dict(re.findall(r"^(\w*) *(.*)$", platform.piped("run", "show", run.id[:12]), re.MULTILINE))
    assert sheet["id"] == run.id and sheet["experiment"] == "first #4" and sheet["exit"] == "exited, code 3"
    assert sheet["took"] == "3m20s" and "after 1m00s" in sheet["started"] and sheet["attempt"] == "2 of 3"
    assert sheet["arguments"] == "--lr 0.1 'two words'" and sheet["resources"] == "2 CPUs, 1 GPU, 2 nodes"
    assert sheet["environment"] == f"torch: torch, numpy (image {'ab' * 6})" and sheet["target"] == "local on local-0"
    assert sheet["outputs"] == "1 file, 2.0 MB" and sheet["models"] == "birds:3" and sheet["metrics"] == "loss = 0.25"
    assert sheet["log"] == f"alveary run logs {run.id[:12]}"


def test_metrics_of_a_run_and_the_points_of_one(platform: Platform) -> None:
    platform.service.runs = [run_named(1, "first")]
    loss = [pb.MetricPoint(name="loss", step=i, scalar=v) for i, v in enumerate((1.0, 0.25, 0.5))]
    note = [pb.MetricPoint(name="note", text="x\x1b[31m")]
    platform.service.series = [pb.MetricSeries(name="loss", points=loss), pb.MetricSeries(name="note", points=note)]
    assert platform.piped("run", "metrics", "01JDXA6Z1N") == "loss\t3\t2\t0.5\t0.25\t1.0\nnote\t1\t\tx\\x1b[31m\t\t\n"
    assert [line.split("\t")[::2] for line in platform.piped("run", "metrics", "01JDXA6Z1N", "loss").splitlines()] == [
        ["0", "1.0"], ["1", "0.25"], ["2", "0.5"]
    ]  # fmt: skip


def test_runs_are_compared_by_what_differs(platform: Platform) -> None:
    runs = [run_named(i, "same", metrics={"loss": loss, "acc": 1}) for i, loss in enumerate((0.5, 0.25))]
    runs[0].spec.arguments[:] = ["--lr=0.1", "--layers", "3", "4", "--fast"]
    runs[1].spec.arguments[:] = ["--lr", "0.2", "--layers", "3", "4"]
    platform.service.runs = runs
    lines = [line.split("\t") for line in platform.piped("run", "compare", runs[0].id, runs[1].id).splitlines()]
    assert lines == [["argument --lr", "0.1", "0.2"], ["argument --fast", "given", ""], ["loss", "0.5", "0.25"]]


def test_ctrl_c_while_following_says_how_to_go_on_and_leaves_the_run_alone(platform: Platform) -> None:
    run = pb.Run(id="01JDXA6Z1N0000000000000001", state=c.RUN_STATE_RUNNING)
    platform.service.runs = [run]
    command = [sys.executable, "-m", "alveary.cli", "run", "watch", run.id]
    process = subprocess.Popen(command, env=platform.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "[Running]\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the run goes on" in said and f"alveary run watch {run.id}" in said and f"alveary run cancel {run.id}" in said
    assert "Traceback" not in said


# ---- what is the script's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["train.py", "--epochs", "3"], ["train.py", "--epochs", "3"]),
        (["-f", "train.py", "-x", "--help", "--follow", "-t", "9"], ["train.py", "-x", "--help", "--follow", "-t", "9"]),
        (["--name", "n", "--", "train.py", "--", "--name", "m"], ["train.py", "--", "--name", "m"]),
        (["--command", "python", "-c", "print(1)"], ["python", "-c", "print(1)"]),
        (["--", "-odd.py", "--version"], ["-odd.py", "--version"]),
    ],
)
def test_what_follows_the_script_is_the_scripts(words: list[str], command: list[str]) -> None:
    assert submit.make_context("submit", list(words)).params["command"] == tuple(command)


def test_completion_is_printed_for_each_shell_and_completes(platform: Platform) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert "_ALVEARY_COMPLETE" in platform.piped("completion", shell)
    platform.environment |= {"_ALVEARY_COMPLETE": "bash_complete", "COMP_WORDS": "alveary run s", "COMP_CWORD": "2"}
    assert platform.piped().split() == ["plain,submit", "plain,show"]


def test_the_version_is_told(platform: Platform) -> None:
    assert platform.piped("--version") == f"alveary {alveary.__version__}\n"


def test_what_was_typed_is_not_obeyed_either(platform: Platform) -> None:
    for words in (["a\x1b[31mb"], ["run", "list", "--a\x1b[31mb"], ["run", "list", "--limit", "1\x1b[2J"], ["run", "compare", "\x1b[31m"]):
        command = [sys.executable, "-m", "alveary.cli", *words]
        done = subprocess.run(command, env=platform.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "\x1b" not in done.stderr, done.stderr


def test_a_script_that_is_not_there_is_said_before_anything_is_uploaded(platform: Platform, tmp_path: Path) -> None:
    for name in ("train.py", "tools/trainer.py"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).touch()
    command = [sys.executable, "-m", "alveary.cli", "run", "submit", "-s", str(tmp_path / "source"), "trian.py"]
    done = subprocess.run(command, env=platform.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"{tmp_path / 'source'} has no 'trian.py': it has train.py" in done.stderr


def test_a_list_from_a_read_model_that_is_behind_says_so_once(platform: Platform) -> None:
    platform.service.runs = [run_named(1, "first")]
    platform.service.behind = "RunsProjection at 12000 of 130000"
    for words in (["run", "list"], ["run", "list", "--json"]):
        command = [sys.executable, "-m", "alveary.cli", *words]
        done = subprocess.run(command, env=platform.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and platform.service.runs[0].id in done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("note: ") and "out of date" in line and platform.service.behind in line


def test_a_client_warns_once_that_what_it_is_told_may_be_out_of_date(platform: Platform) -> None:
    platform.service.behind = "RunsProjection at 1 of 2"
    done = platform.python("""
from alveary import Workspace
workspace = Workspace.from_config()
for _ in range(3):
    workspace._call(workspace._client.runs.list())
""")
    assert done.stderr.count("RunsProjection at 1 of 2") == 1 and "AlvearyWarning" in done.stderr


# Every command that takes a run's id, with what else it needs.
BY_PREFIX = [
    "run show ID", "run metrics ID", "run why ID", "run watch ID", "run cancel ID", "run delete ID --yes", "run files ID",
    "run download ID none", "run compare ID ID", "model register birds outputs --run ID",
    "run logs ID", "run logs ID --newest 3", "run logs ID --grep x", "run logs ID --since 1h",
]  # fmt: skip


@pytest.mark.parametrize("command", BY_PREFIX)
def test_every_command_takes_a_unique_prefix_of_a_runs_id(platform: Platform, command: str) -> None:
    run = run_named(1, "first")
    platform.service.runs = [run]
    line = [sys.executable, "-m", "alveary.cli", *command.replace("ID", run.id[:12]).split()]
    done = subprocess.run(line, env=platform.environment, capture_output=True, text=True, timeout=60)
    expected = {"watch": 3, "download": 1}.get(command.split()[1], 0)
    assert done.returncode == expected, done.stderr
    assert set(platform.service.named) == ({run.id} if "compare" not in command else set())


def test_commands_that_take_a_runs_id_are_all_tried() -> None:
    takes = {
        path.removeprefix("alveary ")
        for path, command in every(app)
        for parameter in command.params
        if parameter.name in ("run_id", "run_ids") or (parameter.name == "run" and isinstance(parameter, click.Option))
    }
    assert takes == {" ".join(command.split()[:2]) for command in BY_PREFIX}
