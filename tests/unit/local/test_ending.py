"""Processes that have ended count as ended, also where nobody reaps them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

from alveary.local.stack import _end, _has_ended


def test_a_zombie_has_ended() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        assert _has_ended(psutil.Process(child), 30.0), "it is a zombie until this test reaps it"
        begun = time.monotonic()
        _end([psutil.Process(child)], patience=20.0)
        assert time.monotonic() - begun < 20.0
    finally:
        os.waitpid(child, 0)


def test_what_ignores_sigterm_is_killed() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    with process.stdout:
        _end([process], patience=0.2)
        assert process.wait(30) == -signal.SIGKILL
