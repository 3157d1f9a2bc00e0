"""The synchronous classes wait for coroutines on a thread of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from alveary import _loop


def test_ctrl_c_is_seen_whichever_thread_the_kernel_gives_it_to() -> None:
    code = """
import asyncio, signal, threading
from alveary import _loop

async def work():
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    await asyncio.sleep(600)

try:
    _loop.run(work())
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done


def test_a_time_limit_of_the_work_itself_is_raised() -> None:
    async def late() -> None:
        raise TimeoutError("the work's own")

    with pytest.raises(TimeoutError, match="the work's own"):
        _loop.run(late())


def test_work_that_takes_longer_than_a_look_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loop, "_LOOK_SECONDS", 0.01)

    async def slow() -> int:
        await asyncio.sleep(0.1)
        return 7

    assert _loop.run(slow()) == 7
