"""up, down, status."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

from alveary.cli.common import NO_PLATFORM, json_option, print_json, say, state_dir_option, state_folder, target_row
from alveary.cli.table import show


@click.command()
@click.option("--detach", "-d", is_flag=True, help="Go on in the background.")
@state_dir_option
@click.option("--port", type=int, help="First of 19 consecutive ports; 0: whatever is free. Default 7460, then as before.")
@click.option("--separate", is_flag=True, help="Each service as a process of its own.")
@click.option("--lease-seconds", default=30.0, show_default=True, help="Silence after which a node is lost.")
@click.option("--metrics-port", default=0, help="Serve Prometheus metrics here; with --separate five ports from here. 0: none.")
@click.option("--runtime", default="", help="process: virtual environments; docker: containers. Default: as before, at first process.")
@click.option(
    "--bind", help="This machine's address, by which others reach it (`alveary node join`); '': none. Default: as before. Not encrypted."
)
def up(
    detach: bool, state_dir: Path | None, port: int | None, separate: bool, lease_seconds: float, metrics_port: int, runtime: str,
    bind: str | None,
) -> None:  # fmt: skip
    """Start the whole platform on this machine."""
    from alveary.local.layout import Layout
    from alveary.local.stack import Stack, own_addresses, status

    if runtime not in ("", "process", "docker"):
        raise click.BadParameter(f"--runtime {runtime!r}: process or docker")
    folder = state_folder(state_dir)
    if detach:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [sys.executable, "-m", "alveary.cli", "up", "--state-dir", str(folder), "--lease-seconds", str(lease_seconds)]
        command += ["--port", str(port)] if port is not None else []
        command += ["--separate"] if separate else []
        command += ["--metrics-port", str(metrics_port)]
        command += ["--runtime", runtime] if runtime else []
        command += ["--bind", bind] if bind is not None else []
        log = folder / "up.log"
        with log.open("wb") as opened:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=opened, stderr=opened, start_new_session=True)
        while True:
            if child.poll() is not None:
                say(log.read_text().strip())
                raise click.exceptions.Exit(child.returncode or 1)
            found = status(folder)
            if found and found["supervisor"] == child.pid and "ready" in log.read_text():
                click.echo(log.read_text().strip())
                return
            time.sleep(0.05)
    started = time.monotonic()
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
    stack = Stack(layout, click.echo)
    stack.acquire()
    try:
        stack.start()
    except BaseException:
        stack.stop()
        raise
    click.echo(f"ready after {time.monotonic() - started:.1f} s at {layout.endpoint}; config: {folder / 'config.json'}")
    stack.run()


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
    process.wait(60)
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

    targets = list(Workspace.from_config(folder / "config.json").compute_targets.values())
    found["targets"] = [target_row(t._found) for t in targets]
    if as_json:
        print_json(found)
        return
    click.echo(f"running at {found['endpoint']}: " + ", ".join(f"{n} (pid {p})" for n, p in found["pids"].items()))
    show(found["targets"], ("name", "state", "nodes", "running", "waiting"), False)
