"""A service that closes ends, whatever hangs meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import nats.errors
import pytest

from alveary_core import service as module
from alveary_core.service import Service
from alveary_core.settings import CoreSettings


class Connection:
    """A connection to a message bus that is away."""

    closed = False

    async def drain(self) -> None:
        raise nats.errors.ConnectionReconnectingError

    async def close(self) -> None:
        self.closed = True


async def test_no_step_of_closing_holds_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSING", 0.05)
    service = Service("test", CoreSettings())
    connection = Connection()
    service.connection = connection  # type: ignore[assignment]
    closed: list[str] = []
    service.store = SimpleNamespace(close=lambda: closed.append("store"))  # type: ignore[assignment]

    def closer(name: str, work: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        async def close() -> None:
            await work()
            closed.append(name)

        return close

    service.on_close(closer("quick", lambda: asyncio.sleep(0)))
    service.on_close(closer("hangs", lambda: asyncio.Event().wait()))
    async with asyncio.timeout(20):
        await service.close()
    assert closed == ["quick", "store"] and connection.closed


def test_a_process_that_cannot_close_is_ended() -> None:
    code = "import time; from alveary_core.service import leave_within; leave_within(0.1); time.sleep(120)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70
    assert "close.abandoned" in done.stdout + done.stderr and "time.sleep" not in done.stdout
