"""A TCP proxy for tests: a link that is slow, and one that is cut."""

from __future__ import annotations

import asyncio
import threading


class Proxy:
    """Forwards connections on a port of the loopback to another port of it.

    `delay` seconds are added to each direction, now and whenever the attribute is changed; `cut` ends what is connected, and
    while `down` is set new connections are refused.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self._target, self.delay, self.down = target, delay, False
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        ready = threading.Event()

        async def begin() -> None:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        beginning = self._loop.create_task(begin())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert ready.wait(10), beginning

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self.down:
                raise ConnectionRefusedError
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # what is behind the link is down: so is the link
            writer.transport.abort()
            return
        pair = {writer, other_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))
        finally:
            self._writers -= pair

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
        task.add_done_callback(self._tasks.discard)
        try:
            while data := await reader.read(1 << 16):
                await queue.put((self._loop.time() + self.delay, data))
        except ConnectionError:
            data = b""
        await queue.put((self._loop.time(), b""))
        await asyncio.gather(task, return_exceptions=True)

    def cut(self) -> None:
        """End every connection that there is."""

        def work() -> None:
            for writer in self._writers:
                writer.transport.abort()

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
