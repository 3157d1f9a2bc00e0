"""Event loops that are never blocked: what the monitor measures, what the guard refuses."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import time

import pytest

from alveary_core.stalls import Monitor


async def test_a_blocked_loop_is_measured_and_its_stack_is_known() -> None:
    told: asyncio.Future[tuple[float, float, str]] = asyncio.get_running_loop().create_future()
    monitor = Monitor(asyncio.get_running_loop(), lambda *stall: None if told.done() else told.set_result(stall))
    monitor.start()

    def hold_the_loop_up() -> None:
        deadline = time.monotonic() + 30
        while not monitor._stack and time.monotonic() < deadline:
            time.sleep(0.01)

    await asyncio.sleep(0)
    hold_the_loop_up()
    seconds, cpu, stack = await asyncio.wait_for(told, 30)
    monitor.stop()
    assert seconds > 0.1
    assert monitor.longest >= seconds
    assert cpu < seconds  # it slept
    assert "hold_the_loop_up" in stack


async def test_a_free_loop_has_no_stack_to_show() -> None:
    monitor = Monitor(asyncio.get_running_loop(), lambda *stall: pytest.fail(str(stall)))
    monitor._record(0.0, 0.01)
    monitor._record(1.0, 0.5)
    monitor._record(2.0, 0.2)
    assert monitor._recent[0] == (1.0, 0.5)  # the longest of the last minute
    monitor._record(61.5, 0.0)
    assert monitor._recent[0] == (2.0, 0.2)
    assert monitor.longest == 0.5


GUARDED = """
import asyncio, shutil, socket, subprocess, sys, time
from alveary_core.stalls import BlockingCall, refuse_blocking_calls

refuse_blocking_calls()
refuse_blocking_calls()
time.sleep(0)  # no loop runs

async def main():
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    blocking = [
        lambda: time.sleep(0),
        lambda: socket.create_connection(("127.0.0.1", port)),
        lambda: subprocess.run(["true"]),
        lambda: shutil.rmtree("/nonexistent", ignore_errors=False),
        lambda: socket.getaddrinfo("localhost", 1),
    ]
    for call in blocking:
        try:
            call()
        except BlockingCall as error:
            print("refused", str(error).split()[0])
        else:
            print("allowed")
    await asyncio.to_thread(time.sleep, 0)
    process = await asyncio.create_subprocess_exec("true")
    print(await process.wait())
    reader, writer = await asyncio.open_connection("localhost", port)
    writer.close()
    server.close()

asyncio.run(main())
"""


def test_the_guard_refuses_what_blocks_a_loop_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(GUARDED)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused = ["time.sleep", "socket.getaddrinfo", "subprocess.Popen.wait", "shutil.rmtree", "socket.getaddrinfo"]
    assert done.stdout.split("\n")[:6] == [*(f"refused {name}" for name in refused), "0"]
