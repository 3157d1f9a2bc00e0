"""What a stranger's script prints, logs and writes, seen while it runs and afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support import Embedded, finished, let_go, lines, submit, tail, until

from alveary import Run, Workspace

SCRIPT = r"""
    import os, sys, time
    from alveary import Run
    run = Run.get_context()
    open("logs/train.log", "w").write("in a log file\n")
    print("in a log file", flush=True)
    open("logs/events.out.tfevents.1.host", "wb").write(b"\x18\0\0\0\0\0\0\0" + b"scalars")
    open("logs/last.ckpt", "wb").write(bytes(range(256)) * 4000)
    run.log("report", "x" * 10_000_000)
    run.log("train/loss", 0.5, step=1)
    run.log("odd", [1])
    sys.stderr.write("\r 10%|#         |\r 20%|##        |"); sys.stderr.flush()
    sys.stdout.write("continue? [y/N] "); sys.stdout.flush()
    while not os.path.exists("go"):
        time.sleep(0.05)
    sys.stderr.write("\r100%|##########|\n"); sys.stderr.flush()
    print("yes")
    open(b"outputs/caf\xe9.txt", "w").write("x")
    os.makedirs("outputs/epoch3"); open("outputs/epoch3/w", "w").write("weights"); os.symlink("epoch3", "outputs/best")
    """


def shown(run: Run) -> list[Any]:
    client = run._workspace._client
    return list(run._workspace._call(client.logs.read(run.id, limit=100, streams=["stdout", "stderr"])).lines)


def test_what_is_seen_of_a_script(stack: Embedded, workspace: Workspace, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = submit(workspace, source, SCRIPT)
    following = threading.Thread(target=run.wait_for_completion, kwargs={"show_output": True})
    following.start()
    cli = subprocess.Popen(
        [sys.executable, "-m", "alveary.cli", "run", "logs", "--follow", run.id], env={"ALVEARY_CONFIG": str(stack.config), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    # While it runs: the bar, the prompt, what is refused, and the files that are no logs.
    unfinished = {("stderr", b" 20%|##        |"), ("stdout", b"continue? [y/N] ")}
    until(
        lambda: {(x.line.stream, x.line.data) for x in shown(run) if x.line.provisional} == unfinished, "the bar and the prompt are shown"
    )
    until(lambda: any("log('report') is left out" in line for line in lines(run, "stderr")), "the report is refused on stderr")
    until(lambda: {"logs/events.out.tfevents.1.host", "logs/last.ckpt"} <= set(run.get_file_names()), "what is no text is synced")
    assert not [x for x in tail(run) if x.line.provisional], "only who asks for them gets them"
    let_go(stack, run)
    finished(run)
    following.join(60)
    printed, _ = cli.communicate(timeout=60)
    # Afterwards: whole lines, once.
    assert lines(run) == ["in a log file", "continue? [y/N] yes"] and lines(run, "logs/train.log") == ["in a log file"]
    stderr = lines(run, "stderr")
    assert stderr[-1] == "100%|##########|" and len(stderr) == 3 and "log('odd') is left out" in stderr[1]
    assert not {x.line.stream for x in tail(run)} & {"logs/events.out.tfevents.1.host", "logs/last.ckpt"}
    assert any("log('report') is left out" in line and "1,048,576" in line for line in lines(run, "system"))
    assert run.get_metrics() == {"train/loss": 0.5}
    files = set(run.get_file_names())
    assert {"outputs/best/w", "outputs/epoch3/w", "outputs/caf%E9.txt", "logs/last.ckpt"} <= files
    run.download_file("outputs/best/w", str(source / "w"))
    assert (source / "w").read_text() == "weights"
    # What followers saw.
    out, err = capfd.readouterr()
    assert out.count("in a log file") == 1, "stdout and stderr, not what is in ./logs as well"
    assert "continue? [y/N] yes" in out and "100%|##########|" in err and " 20%|##" in out
    assert "continue? [y/N] yes" in printed and " 20%|##" in printed and "100%|###" in printed


def test_last_lines_are_text(workspace: Workspace, source: Path) -> None:
    code = r"""
        import sys
        sys.stderr.write("\r 1%\r\x1b[31m99%\x1b[0m\n"); sys.stdout.write("no end"); sys.exit(3)
        """
    details = finished(submit(workspace, source, code), "Failed")
    assert set(details["exit"]["last_lines"]) == {"99%", "no end"}
