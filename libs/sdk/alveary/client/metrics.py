"""Metrics of runs: log from outside, read as series or as plain values."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from alveary.client.connection import CALL_TIMEOUT_SECONDS, Connection
from alveary_contracts.runs.v1 import runs_pb2 as pb


class Metrics:
    """`client.metrics`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = connection.stubs.runs

    async def log(self, run_id: str, name: str, value: float, step: int | None = None, description: str = "") -> None:
        """Log one number from outside the run, with the time of this machine.

        Raises:
            AlvearyError: it is refused. It is not repeated: a point that is sent twice counts twice.
        """
        point = pb.MetricPoint(name=name, scalar=value, step=step, description=description)
        point.time.GetCurrentTime()

        async def requests() -> AsyncIterator[pb.LogMetricsRequest]:
            yield pb.LogMetricsRequest(run_id=run_id, points=[point])

        try:
            await self._connection.open_stream(self._stub.LogMetrics, requests(), timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise self._connection.translate(error) from error

    async def pages(self, run_id: str, name: str = "", recursive: bool = False, **options: Any) -> AsyncIterator[pb.MetricSeries]:
        """Stretches of a run's metrics, page by page; `options`: max_points, attempt, columns of GetMetricsRequest."""
        request = pb.GetMetricsRequest(run_id=run_id, name=name, recursive=recursive, **options)
        async for page in self._connection.pages(self._stub.GetMetrics, request):
            for series in page.series:
                yield series

    async def series(
        self, run_id: str, name: str = "", recursive: bool = False, max_points: int = 0, attempt: int = 0
    ) -> list[pb.MetricSeries]:
        """A run's metrics, one element for each name and run.

        Args:
            recursive: also those of its child runs.
            max_points: as many points draw what all would; 0: all.
            attempt: only what this attempt logged; 0: what counts in the end.
        """
        found: dict[tuple[str, str], pb.MetricSeries] = {}
        async for part in self.pages(run_id, name, recursive, max_points=max_points, attempt=attempt):
            key = (part.run_id, part.name)
            if key in found:
                found[key].points.extend(part.points)
                found[key].attempt = part.attempt
                found[key].point_count = part.point_count
            else:
                found[key] = part
        return list(found.values())

    async def values(self, run_id: str, name: str = "", recursive: bool = False, max_points: int = 0) -> dict[str, Any]:
        """Values by name: a metric that was logged once is a value, one that was logged repeatedly a list."""
        collected = _Values()
        async for series in self.pages(run_id, name, recursive, max_points=max_points, columns=True):
            collected.add(series)
        return collected.result()


class _Values:
    """Values by name, collected from pages of series."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._tables: dict[str, dict[str, list[Any]]] = {}

    def add(self, series: pb.MetricSeries) -> None:
        values = self._values.setdefault(series.name, [])
        values += series.columns.values
        for point in series.points:
            kind = point.WhichOneof("value")
            if kind == "list":
                values += point.list.values
            elif kind in ("row_json", "table_json"):
                self._add_columns(series.name, kind, getattr(point, kind))
            elif kind is not None:
                values.append(getattr(point, kind))

    def _add_columns(self, name: str, kind: str, text: str) -> None:
        columns = self._tables.setdefault(name, {})
        for column, value in json.loads(text).items():
            is_column = kind == "table_json" and isinstance(value, list)
            columns.setdefault(column, []).extend(value if is_column else [value])

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in self._values.items():
            if name in self._tables:
                found[name] = {column: _one_or_all(cells) for column, cells in self._tables[name].items()}
            elif values:
                found[name] = _one_or_all(values)
        return found


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
