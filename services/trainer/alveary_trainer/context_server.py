"""What a training script may ask, over a Unix socket of its attempt: JSON lines, one object each.

The socket is the identity: whoever reaches it is this attempt and no other, and no message can name another run.
Metrics are one-way; everything else carries an `id` and is answered {"id", "ok"} or {"id", "error"}.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from alveary_contracts.runs.v1 import runs_pb2 as pb
from alveary_core import telemetry
from alveary_trainer.shipper import Shipper

MAX_LINE = 16 << 20
Ask = Callable[[dict[str, Any]], Awaitable[Any]]


class ContextServer:
    """The socket of one attempt."""

    def __init__(self, path: Path, run_id: str, metrics: Shipper, asks: dict[str, Ask]) -> None:
        self._path, self._run_id, self._metrics, self._asks = path, run_id, metrics, asks
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; only this user may connect."""
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_LINE)
        self._path.chmod(0o600)

    async def finish(self, patience: float = 10.0) -> None:
        """The processes are gone: read what they left in the socket, then close."""
        if self._connections:
            await asyncio.wait(self._connections, timeout=patience)
        if self._server:
            self._server.close()
        for task in self._connections:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while line := await reader.readline():
                await self._metrics.room()
                answer = await self._take(line)
                if answer is not None:
                    writer.write(json.dumps(answer).encode() + b"\n")
                    await writer.drain()
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            telemetry.logger().info("context.closed", run=self._run_id, error=str(error))
        finally:
            self._connections.discard(task)
            writer.close()

    async def _take(self, line: bytes) -> dict[str, Any] | None:
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not an object")
        except ValueError as error:
            return {"id": None, "error": f"not a JSON object: {error}"}
        ident = message.get("id")
        if message.get("run_id", self._run_id) != self._run_id:
            return {"id": ident, "error": f"this socket speaks for run {self._run_id} alone, not for {message['run_id']}"}
        op = message.get("op")
        try:
            if op == "metric":
                self._metrics.add(point(message))
                return None
            if op == "flush":
                await self._metrics.flush(float(message.get("timeout", 60)))
                return {"id": ident, "ok": True}
            if op not in self._asks:
                return {"id": ident, "error": f"there is no operation {op!r}"}
            return {"id": ident, "ok": await self._asks[op](message)}
        except Exception as error:
            telemetry.logger().info("context.refused", run=self._run_id, op=op, error=str(error))
            return {"id": ident, "error": str(error) or type(error).__name__}


def point(message: dict[str, Any]) -> pb.MetricPoint:
    """A metric point from its JSON.

    Raises:
        ValueError, KeyError: it is none.
    """
    name = message["name"]
    if not isinstance(name, str) or not name or len(name) > 256:
        raise ValueError("a metric needs a name of 1 to 256 characters")
    made = pb.MetricPoint(name=name, description=str(message.get("description", "")))
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
            made.text = str(value)
        case _:
            raise ValueError(f"there is no kind of metric {kind!r}")
    return made
