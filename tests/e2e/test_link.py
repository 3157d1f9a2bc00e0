"""A link with 200 ms of added latency, and one that is cut: submissions, logs and watching go through."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Embedded, finished, submit, tail, wait_for_state

from alveary import Workspace, config

DELAY = 0.2


class Proxy:
    """A TCP proxy that holds everything back for DELAY, each way, and can cut all connections."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        ready = threading.Event()

        async def begin() -> None:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.create_task(begin())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, other_writer}
        await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await queue.get()
                await asyncio.sleep(max(0.0, at - self._loop.time()))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        task = asyncio.create_task(deliver())
        self._tasks.add(task)
        try:
            while data := await reader.read(1 << 16):
                await queue.put((self._loop.time() + DELAY, data))
        except ConnectionError:
            data = b""
        await queue.put((self._loop.time(), b""))
        await asyncio.gather(task, return_exceptions=True)

    def cut(self) -> None:
        """End every connection that there is."""

        def work() -> None:
            for writer in self._writers:
                writer.transport.abort()
            self._writers.clear()

        self._loop.call_soon_threadsafe(work)

    def close(self) -> None:
        """End connections, tasks, the loop and its thread, in that order."""
        self.cut()

        async def end() -> None:
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def proxy(stack: Embedded) -> Iterator[Proxy]:
    port = int(json.loads(stack.config.read_text())["endpoint"].rpartition(":")[2])
    opened = Proxy(port)
    yield opened
    opened.close()


@pytest.fixture
def far(stack: Embedded, proxy: Proxy) -> Workspace:
    found = config.load(stack.config)
    return Workspace(config.Config(f"127.0.0.1:{proxy.port}", found.token))


def test_submissions_over_a_slow_link_all_go_through(far: Workspace, source: Path) -> None:
    runs = [submit(far, source, "print('far away')") for _ in range(5)]
    for run in runs:
        finished(run)
    assert [x.line.data for x in tail(runs[0], follow=True, streams=("stdout",))] == [b"far away"]


def test_a_follower_whose_connection_is_cut_misses_nothing_and_sees_nothing_twice(far: Workspace, proxy: Proxy, source: Path) -> None:
    run = submit(far, source, """
        import time
        for i in range(60):
            print(i, flush=True)
            time.sleep(0.05)
        """)  # fmt: skip
    wait_for_state(run, "Running", "Finalizing", "Completed")
    seen: list[int] = []

    async def follow() -> None:
        async for one in far._client.tail(run.id, streams=("stdout",)):
            seen.append(int(one.line.data))
            if len(seen) in (5, 30):
                proxy.cut()

    far._call(follow())
    assert seen == list(range(60))
    finished(run)
