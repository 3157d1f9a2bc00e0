"""up, down, status."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Annotated

import typer

from alveary.cli.common import NO_PLATFORM, AsJson, StateDir, err, show, state_folder, target_row


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background.")] = False,
    state_dir: StateDir = None,
    port: Annotated[
        int | None, typer.Option(help="First of 19 consecutive ports; 0: whatever is free. Default 7460, then as before.")
    ] = None,
    separate: Annotated[bool, typer.Option(help="Each service as a process of its own.")] = False,
    lease_seconds: Annotated[float, typer.Option(help="Silence after which a node is lost.")] = 30.0,
    metrics_port: Annotated[int, typer.Option(help="Serve Prometheus metrics here; with --separate five ports from here. 0: none.")] = 0,
    runtime: Annotated[
        str, typer.Option(help="process: virtual environments; docker: containers. Default: as before, at first process.")
    ] = "",
    bind: Annotated[
        str | None,
        typer.Option(
            help="This machine's address, by which others reach it (`alveary node join`); '': none. Default: as before. Not encrypted."
        ),
    ] = None,
) -> None:
    """Start the whole platform on this machine."""
    from alveary.local.layout import Layout
    from alveary.local.stack import Stack, own_addresses, status

    if runtime not in ("", "process", "docker"):
        raise typer.BadParameter(f"--runtime {runtime!r}: process or docker")
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
                err.print(log.read_text().strip(), markup=False, highlight=False)
                raise typer.Exit(child.returncode or 1)
            found = status(folder)
            if found and found["supervisor"] == child.pid and "ready" in log.read_text():
                print(log.read_text().strip())
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
        raise typer.BadParameter(f"--bind {layout.bind}: this machine has {', '.join(own_addresses())}")
    stack = Stack(layout, lambda text: print(text, flush=True))
    stack.acquire()
    try:
        stack.start()
    except BaseException:
        stack.stop()
        raise
    print(f"ready after {time.monotonic() - started:.1f} s at {layout.endpoint}; config: {folder / 'config.json'}", flush=True)
    stack.run()


def down(state_dir: StateDir = None) -> None:
    """Stop the platform on this machine. Runs under way are attempted again after the next `up`."""
    import psutil

    from alveary.local.stack import status

    folder = state_folder(state_dir)
    found = status(folder)
    if found is None:
        err.print(f"no stack runs in {folder}", markup=False)
        raise typer.Exit(NO_PLATFORM)
    process = psutil.Process(found["supervisor"])
    process.terminate()
    process.wait(60)
    print("stopped")


def status_command(state_dir: StateDir = None, as_json: AsJson = False) -> None:
    """Say whether the platform runs, and what it has to do."""
    from alveary.local.stack import status

    folder = state_folder(state_dir)
    found = status(folder)
    if found is None:
        err.print(f"no stack runs in {folder}: start one with `alveary up`", markup=False)
        raise typer.Exit(NO_PLATFORM)
    from alveary.workspace import Workspace

    targets = list(Workspace.from_config(folder / "config.json").compute_targets.values())
    found["targets"] = [target_row(t._found) for t in targets]
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"running at {found['endpoint']}: " + ", ".join(f"{n} (pid {p})" for n, p in found["pids"].items()))
    show(found["targets"], ("name", "state", "nodes", "running", "waiting"), False)
