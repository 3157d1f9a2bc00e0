"""What an attempt sends to the message bus: log lines, metric points, and the trainer's own lines in the run's system log."""

from __future__ import annotations

from alveary_contracts.logs.v1 import logs_pb2
from alveary_contracts.names import token
from alveary_trainer.assignment import Assignment
from alveary_trainer.shipper import Shipper, log_chunk, metric_batch

_MAX_SYSTEM_LINE_BYTES = 64 << 10


class AttemptLogs:
    """The streams of one node's part of an attempt."""

    def __init__(self, assignment: Assignment) -> None:
        js = assignment.node.log.js
        run = f"{token(assignment.workspace)}.{token(assignment.run_id)}"
        # Of several nodes, each says who it is.
        self._prefix = f"{assignment.allocation.node}: " if assignment.node_count > 1 else ""
        self._attempt = assignment.number
        self.lines = Shipper(js, f"alveary-logs.{run}", log_chunk, self.log_system_line, "log lines")
        self.metrics = Shipper(js, f"alveary-metrics.{run}", metric_batch(self._attempt), self.log_system_line, "metric points")

    def log_system_line(self, text: str) -> None:
        """Add a line of the trainer's own to the run's stream `system`."""
        data = f"{self._prefix}{text}".encode(errors="backslashreplace")[:_MAX_SYSTEM_LINE_BYTES]
        line = logs_pb2.LogLine(stream="system", attempt=self._attempt, data=data)
        line.time.GetCurrentTime()
        self.lines.add(line)

    async def finish(self, stalled_seconds: float) -> None:
        """Return when all that was added is stored, or lost because the bus took nothing for `stalled_seconds`."""
        await self.lines.finish(stalled_seconds)
        await self.metrics.finish(stalled_seconds)

    def losses(self) -> list[str]:
        """A sentence for each kind of data that was lost."""
        counts = ((self.lines.lost, "log lines"), (self.metrics.lost, "metric points"))
        return [f"{count:,} {what} were lost: the message bus did not take them" for count, what in counts if count]
