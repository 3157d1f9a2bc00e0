"""What a training script may ask, over a Unix socket of its attempt: JSON lines, one object each.

The socket is the identity: a process that reaches it acts for this attempt and no other, and no message can name another run.
Metrics are one-way; everything else carries an `id` and is answered {"id", "ok"} or {"id", "error"}, with {"id", "working"} every
few seconds before that where it takes longer. A metric that is refused is answered {"id": null, "error"}; one with an `id` is
answered in any case.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import telemetry
from alveary_core.metrics import MetricBudget
from alveary_trainer.shipper import Shipper, TooLarge

# Longest message, bytes of JSON.
MAX_LINE = 8 << 20
# Messages beyond this are parsed on a thread.
_LARGE = 128 << 10
_WORKING_SECONDS = 15.0
# Answers that nobody asked for are left out while so many bytes wait to be read.
_UNREAD = 64 << 10
_MAX_REFUSALS_LOGGED = 20
_NAME = re.compile(rb'"name": ?"((?:[^"\\]|\\.){1,1536})"')
Ask = Callable[[dict[str, Any]], Awaitable[Any]]


class ContextServer:
    """The socket of one attempt."""

    def __init__(
        self, path: Path, run_id: str, metrics: Shipper, asks: dict[str, Ask], log: Callable[[str], None] = lambda _: None,
        budget: MetricBudget | None = None,
    ) -> None:  # fmt: skip
        """`log` is told of what was refused, a bounded number of times."""
        self._path, self._run_id, self._metrics, self._asks, self._log = path, run_id, metrics, asks, log
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._refusals = 0
        self._budget = budget or MetricBudget()

    async def start(self) -> None:
        """Listen; only this user may connect."""
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_LINE)
        self._path.chmod(0o600)

    async def finish(self, timeout: float = 10.0) -> None:
        """The processes are gone: read what they left in the socket, then close."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=timeout)
        if self._server:
            self._server.close()
        for task in self._connections:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (line := await self._line(reader)) is not None:
                await self._metrics.room()
                answer = await self._take(line, writer)
                if answer is None:
                    continue
                if answer["id"] is None and writer.transport.get_write_buffer_size() > _UNREAD:
                    continue  # nobody reads them
                writer.write(json.dumps(answer).encode() + b"\n")
                if answer["id"] is not None:
                    await writer.drain()
        except ConnectionError as error:
            telemetry.logger().info("context.closed", run=self._run_id, error=str(error))
        finally:
            self._connections.discard(task)
            writer.close()

    async def _line(self, reader: asyncio.StreamReader) -> bytes | TooLarge | None:
        """The next line, or why it is not taken; None: there is no more."""
        try:
            return await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial or None
        except asyncio.LimitOverrunError as error:
            head, size = await reader.read(4096), 4096
            over = error
            while True:  # to the end of the line
                size += len(await reader.read(max(over.consumed, 1)))
                try:
                    size += len(await reader.readuntil(b"\n"))
                    break
                except asyncio.LimitOverrunError as again:
                    over = again
                except asyncio.IncompleteReadError:
                    break
            found = _NAME.search(head)
            name = found.group(1).decode(errors="replace") if found else ""
            what = f"metric {name!r}" if name else "a message"
            return TooLarge(f"{what} is refused: it has about {size:,} bytes, and a message may have {MAX_LINE:,}")

    async def _take(self, line: bytes | TooLarge, writer: asyncio.StreamWriter) -> dict[str, Any] | None:
        if isinstance(line, TooLarge):
            return self._refuse(None, line)
        try:
            message = json.loads(line) if len(line) < _LARGE else await asyncio.to_thread(json.loads, line)
            if not isinstance(message, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            return {"id": None, "error": f"not a JSON object: {error}"}
        ident = message.get("id")
        if message.get("run_id", self._run_id) != self._run_id:
            return {"id": ident, "error": f"this socket speaks for run {self._run_id} alone, not for {message['run_id']}"}
        op = message.get("op")
        try:
            if op == "metric":
                made = point(message) if len(line) < _LARGE else await asyncio.to_thread(point, message)
                self._budget.take(made.name)
                self._metrics.add(made)
                return {"id": ident, "ok": True} if ident is not None else None
            if op == "flush":
                await self._metrics.flush(float(message.get("timeout", 60)))
                return {"id": ident, "ok": True}
            if op not in self._asks:
                return {"id": ident, "error": f"there is no operation {op!r}"}
            async with _working(ident, writer):
                return {"id": ident, "ok": await self._asks[op](message)}
        except Exception as error:  # whatever a message makes of us: its sender is told, and the next one is taken
            if op == "metric":
                return self._refuse(
                    ident, ValueError(f"metric {str(message.get('name'))[:256]!r} is refused: {error or type(error).__name__}")
                )
            telemetry.logger().info("context.refused", run=self._run_id, op=op, error=str(error))
            return {"id": ident, "error": str(error) or type(error).__name__}

    def _refuse(self, ident: object, error: Exception) -> dict[str, Any]:
        self._refusals += 1
        if self._refusals <= _MAX_REFUSALS_LOGGED:
            more = "; further refusals are not logged" if self._refusals == _MAX_REFUSALS_LOGGED else ""
            self._log(f"{error}{more}")
        return {"id": ident, "error": str(error)}


@contextlib.asynccontextmanager
async def _working(ident: object, writer: asyncio.StreamWriter) -> Any:
    """Let who asked know every few seconds that it is being worked on."""

    async def report() -> None:
        while True:
            await asyncio.sleep(_WORKING_SECONDS)
            writer.write(json.dumps({"id": ident, "working": True}).encode() + b"\n")

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def point(message: dict[str, Any]) -> pb.MetricPoint:
    """A metric point from its JSON.

    Raises:
        ValueError, KeyError: it is none.
    """
    name = message["name"]
    if not isinstance(name, str) or not name or len(name) > 256:
        raise ValueError("a metric needs a name of 1 to 256 characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError("its name is not UTF-8")
    made = pb.MetricPoint(name=name, description=str(message.get("description", "")).encode(errors="backslashreplace").decode())
    at = float(message["time"])
    made.time.FromNanoseconds(int(at * 1e6) * 1000)
    if message.get("step") is not None:
        made.step = int(message["step"])
    kind, value = message["kind"], message["value"]
    match kind:
        case "scalar":
            made.scalar = float(value) if value is not None else math.nan
        case "list":
            made.list.values[:] = [float(v) for v in value]
        case "row":
            made.row_json = json.dumps(value)
        case "table":
            made.table_json = json.dumps(value)
        case "image":
            made.image_path = str(value)
        case "text":
            made.text = str(value).encode(errors="backslashreplace").decode()
        case _:
            raise ValueError(f"there is no kind of metric {kind!r}")
    return made
