"""up, down, status."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alveary.cli.common import NO_PLATFORM, enum_word, json_option, print_json, say, state_dir_option, state_folder, target_row
from alveary.cli.table import show
from alveary.errors import AlvearyError

if TYPE_CHECKING:
    from alveary.workspace import Workspace


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Go on in the background.")
@state_dir_option
@click.option(
    "--port", type=click.IntRange(0, 65535 - 18), help="First of 19 consecutive ports; 0: whatever is free. Default 7460, then as before."
)
@click.option("--separate", is_flag=True, help="Each service as a process of its own.")
@click.option(
    "--lease-seconds", type=click.FloatRange(1.0, 86400.0), default=30.0, show_default=True, help="Silence after which a node is lost."
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535 - 5),
    default=0,
    help="Serve Prometheus metrics here; with --separate six ports from here. 0: none.",
)
@click.option("--runtime", default="", help="process: virtual environments; docker: containers. Default: as before, at first process.")
@click.option(
    "--bind", help="This machine's address, by which others reach it (`alveary node join`); '': none. Default: as before. Not encrypted."
)
@click.option("--log", hidden=True, type=click.Path(path_type=Path), help="Where to speak once it is ready (for --detach).")
def up(
    detach: bool,
    state_dir: Path | None,
    port: int | None,
    separate: bool,
    lease_seconds: float,
    metrics_port: int,
    runtime: str,
    bind: str | None,
    log: Path | None,
) -> None:
    """Start the whole platform on this machine."""
    from alveary.local.layout import Layout
    from alveary.local.stack import Stack, own_addresses, usable

    if runtime not in ("", "process", "docker"):
        raise click.BadParameter(f"--runtime {runtime!r}: process or docker")
    folder = state_folder(state_dir)
    if detach:
        options = ["--lease-seconds", str(lease_seconds), "--metrics-port", str(metrics_port)]
        options += ["--port", str(port)] if port is not None else []
        options += ["--separate"] if separate else []
        options += ["--runtime", runtime] if runtime else []
        options += ["--bind", bind] if bind is not None else []
        _up_in_background(folder, options)
        return
    if lease_seconds != lease_seconds:
        raise click.BadParameter("--lease-seconds nan: a number of seconds from 1 on")
    started = time.monotonic()
    voice = _Voice(log)
    usable()
    try:
        layout = Layout.open(
            folder,
            port,
            lease_seconds=lease_seconds,
            beat_seconds=min(1.0, lease_seconds / 5),
            separate=separate,
            metrics_port=metrics_port,
            runtime=runtime,
            bind=bind,
        )
        if layout.bind and not layout.bind.startswith("127.") and layout.bind not in own_addresses():
            raise click.BadParameter(f"--bind {layout.bind}: this machine has {', '.join(own_addresses())}")
        stack = Stack(layout, voice)
        stack.acquire()
        try:
            stack.start()
        except BaseException:
            stack.stop()
            raise
    except OSError as error:
        raise AlvearyError(
            f"the stack in {folder} cannot be started: {error}; `alveary doctor --state-dir {folder}` looks at this machine"
        ) from error
    voice(f"ready after {time.monotonic() - started:.1f} s at {layout.endpoint}; config: {folder / 'config.json'}")
    voice.alone()
    stack.run()


class _Voice:
    """Says what the supervisor has to say on its output and, where given, in a log. Neither can make it fail."""

    def __init__(self, log: Path | None) -> None:
        self._log = log

    def __call__(self, text: str) -> None:
        line = f"{text}\n".encode()
        with contextlib.suppress(OSError):  # the listener is gone, or the disk is full
            os.write(1, line)
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("ab") as opened:
                opened.write(line)

    def alone(self) -> None:
        """Whoever started it leaves: from now on the output, and what Python itself prints, go to the log alone."""
        if self._log is None:
            return
        try:
            output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError:
            output = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        self._log = None


def _up_in_background(folder: Path, options: list[str]) -> None:
    """Start `alveary up` as a process of its own, and return once it is ready.

    It speaks through a pipe until then: its log is on a disk that may be full.

    Raises:
        click.exceptions.Exit: it ended; what it said is on stderr.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise AlvearyError(f"the state directory {folder} cannot be made: {error}") from error
    log = folder / "up.log"
    command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(folder), "--log", str(log), *options]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert child.stdout is not None
    said: list[str] = []
    for raw in child.stdout:  # ends when the child ends, or turns to its log
        said.append(raw.decode(errors="replace").rstrip())
        if said[-1].startswith("ready after"):
            click.echo(said[-1])
            return
        if said[-1].startswith("still starting"):
            say(said[-1])
    say("\n".join(said) or f"`alveary up` ended with code {child.wait()}, and said nothing")
    raise click.exceptions.Exit(child.wait() or 1)


@click.command()
@state_dir_option
def down(state_dir: Path | None) -> None:
    """Stop the platform on this machine. Runs under way are attempted again after the next `up`."""
    import psutil

    from alveary.local import stack

    folder = state_folder(state_dir)
    found = stack.status(folder)
    if found is None:
        say(f"no stack runs in {folder}")
        raise click.exceptions.Exit(NO_PLATFORM)
    process = psutil.Process(found["supervisor"])
    process.terminate()
    try:
        process.wait(90)
    except psutil.TimeoutExpired:
        raise AlvearyError(f"the stack (pid {process.pid}) is still stopping after 90 s: see {folder / 'logs'}, and try again") from None
    click.echo("stopped")


@click.command()
@state_dir_option
@json_option
def status(state_dir: Path | None, as_json: bool) -> None:
    """Say whether the platform runs, and what it has to do."""
    from alveary.local import stack

    folder = state_folder(state_dir)
    found = stack.status(folder)
    if found is None:
        say(f"no stack runs in {folder}: start one with `alveary up`")
        raise click.exceptions.Exit(NO_PLATFORM)
    from alveary.workspace import Workspace

    workspace = Workspace.from_config(folder / "config.json")
    found["targets"] = [target_row(t._found) for t in workspace.compute_targets.values()]
    found["platform"], found["nodes"] = _ask(workspace)
    found["collected"] = _collected(folder)
    if as_json:
        print_json(found)
        return
    click.echo(f"running at {found['endpoint']}: " + ", ".join(f"{n} (pid {p})" for n, p in found["pids"].items()))
    for line in _platform_lines(found["platform"], found["nodes"], found.get("trouble", "")):
        click.echo(line)
    if found["collected"]:
        click.echo(_collected_line(found["collected"]))
    show(found["targets"], ("name", "state", "nodes", "running", "waiting"), False)


def _collected(folder: Path) -> dict[str, Any]:
    """What the last `alveary admin gc` found; empty: there was none."""
    try:
        return dict(json.loads((folder / "services" / "collected.json").read_text()))
    except FileNotFoundError:
        return {}


def _collected_line(collected: dict[str, Any]) -> str:
    objects, size = (sum(k[name] for k in collected["kinds"]) for name in ("objects", "bytes"))
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(collected["at"]))
    verb = "could be removed" if collected["dry_run"] else "were removed"
    return f"unused files: {objects} objects of {size / 1e6:.1f} MB {verb} at {day} (`alveary admin gc`)"


def _ask(workspace: Workspace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The platform's own word on itself, and its nodes."""
    from alveary_contracts.runs.v1 import runs_pb2
    from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

    client = workspace._client
    letters = workspace._call(client.call(client.stubs.dead_letters.CountDeadLetters, runs_pb2.CountDeadLettersRequest()))
    said = workspace._call(client.call(client.stubs.nodes.GetStatus, pb.GetStatusRequest()))
    nodes = workspace._call(client.call(client.stubs.nodes.ListNodes, pb.ListNodesRequest())).nodes
    platform = {
        "version": said.version,
        "hostname": said.hostname,
        "clock_ahead_seconds": round(said.time.ToNanoseconds() / 1e9 - time.time(), 1),
        "disk_free_bytes": said.disk_free_bytes,
        "disk_total_bytes": said.disk_total_bytes,
        "disk_reserve_bytes": said.disk_reserve_bytes,
        "trouble": said.trouble,
        "dead_letters": letters.count,
    }
    rows = [
        {
            "node": n.id,
            "target": n.target,
            "state": enum_word(n, "state"),
            "runs": len(n.run_ids),
            "disk_free_bytes": n.disk_free_bytes,
            "disk_total_bytes": n.disk_total_bytes,
            "trouble": n.cordon_reason,
        }
        for n in nodes
    ]
    return platform, rows


def _platform_lines(platform: dict[str, Any], nodes: list[dict[str, Any]], trouble: str) -> list[str]:
    free, total = platform["disk_free_bytes"] / 2**30, platform["disk_total_bytes"] / 2**30
    lines = [f"version {platform['version']}; {free:.1f} of {total:.1f} GiB are free on its disk"]
    if abs(platform["clock_ahead_seconds"]) > 60:
        lines.append(f"its clock differs by {platform['clock_ahead_seconds']:+.0f} s from this one's")
    if platform["dead_letters"]:
        lines.append(f"{platform['dead_letters']} events could not be handled: `alveary admin dead-letters list` shows them")
    cordoned = [n for n in nodes if n["state"] != "ready"]
    lines.append(f"nodes: {len(nodes)}" + "".join(f"; {n['node']} is {n['state']}" for n in cordoned))
    seen = dict.fromkeys([trouble, platform["trouble"], *(n["trouble"] for n in nodes)])
    lines += [f"trouble: {text}" for text in seen if text]
    return lines
