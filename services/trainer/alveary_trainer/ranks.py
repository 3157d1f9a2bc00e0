"""The ranks of one node: their output, line by line, and how each of them ended. See adapters/rank.py for the other side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from alveary_core import telemetry
from alveary_trainer.lines import Lines
from alveary_trainer.rank_state import Rank
from alveary_trainer.shipper import Shipper, pump

# (host, command) -> exit code; runs what mpirun wants started on another node, or raises ValueError.
Launch = Callable[[str, str], Awaitable[int]]
_BACKLOG = 1024


class Ranks:
    """Listens at `folder`/ranks.sock."""

    def __init__(self, folder: Path, shipper: Shipper, attempt: int, launch: Launch) -> None:
        self._folder, self._shipper, self._attempt, self._launch = folder, shipper, attempt, launch
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._live: dict[Rank, socket.socket] = {}
        self._asked, self._over = False, asyncio.Event()
        self.ranks: dict[int, Rank] = {}

    def ask(self) -> bool:
        """Ask the main process of each rank to end, once; those that begin later do not begin. False: none lives here.

        Their launcher is not asked: see adapters/rank.py.
        """
        first, self._asked = not self._asked, True
        asked = False
        for rank, connection in list(self._live.items()):
            if rank.ended_at:
                continue
            asked = True
            if first:
                with contextlib.suppress(OSError):  # it is gone, and the launcher sees it
                    connection.send(b"stop")
        return asked

    def start(self, argv: list[str], cwd: str) -> None:
        """Take connections of ranks, each of which is to run `argv` in `cwd`."""
        (self._folder / "rank.json").write_text(json.dumps({"argv": argv, "cwd": cwd}))
        self._listener.bind(str(self._folder / "ranks.sock"))
        (self._folder / "ranks.sock").chmod(0o600)
        self._listener.listen(_BACKLOG)
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            task = asyncio.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            with connection:
                await _readable(connection)
                data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
                hello = json.loads(data)
                if "launch" in hello:
                    answer = json.dumps(await self._launched(hello)).encode()
                    with contextlib.suppress(ConnectionError):  # mpirun ended its agent
                        await loop.sock_sendall(connection, answer)
                    return
                await self._rank(connection, hello, descriptors)
        except (OSError, ValueError, KeyError) as error:
            telemetry.logger().warning("rank.lost", error=str(error) or type(error).__name__)

    async def _rank(self, connection: socket.socket, hello: Mapping[str, Any], descriptors: list[int]) -> None:
        loop = asyncio.get_running_loop()
        rank = Rank(int(hello["rank"]), int(hello["restarts"]))
        self.ranks[rank.number] = rank
        pumps = []
        for descriptor, name in zip(descriptors, ("stdout", "stderr"), strict=True):
            os.set_blocking(descriptor, False)
            lines = Lines(self._shipper, name, rank.number, self._attempt, rank.tail)
            pumps.append(asyncio.create_task(pump(descriptor, lines, self._shipper, self._over)))
        try:
            if self._asked:
                rank.stopped, rank.ended_at = True, time.time()
                await loop.sock_sendall(connection, b"stop")
                await asyncio.gather(*pumps)
                return
            self._live[rank] = connection
            await loop.sock_sendall(connection, b"go")
            data = await loop.sock_recv(connection, 1 << 16)
            ended = json.loads(data) if data else {"signal": signal.SIGKILL, "stopped": True}
            rank.exit_code, rank.signal = ended.get("exit_code"), ended.get("signal")
            rank.stopped, rank.ended_at, rank.problem = bool(ended["stopped"]), time.time(), str(ended.get("problem", ""))
            with contextlib.suppress(OSError):
                await loop.sock_sendall(connection, b"noted")
            await asyncio.gather(*pumps)
        except ConnectionError:
            rank.signal, rank.stopped, rank.ended_at = signal.SIGKILL, True, time.time()
            await asyncio.gather(*pumps)
        finally:
            self._live.pop(rank, None)
            for task in pumps:
                task.cancel()

    async def _launched(self, hello: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"exit_code": await self._launch(str(hello["launch"]), str(hello["command"]))}
        except ValueError as error:
            return {"error": str(error), "exit_code": 1}

    async def finish(self, timeout: float = 10.0) -> None:
        """The processes are gone: read what they left, then close."""
        self._over.set()
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        self._listener.close()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=timeout)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(connection)
