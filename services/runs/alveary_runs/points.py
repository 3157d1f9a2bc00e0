"""Points of a metric as columns: how they are stored, and thinned for a plot."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from alveary_contracts.runs.v1 import runs_pb2 as pb

# The step of a point that has none.
NO_STEP = -(2**63)
# Points of a full chunk, and bytes of what does not fit into columns that make a chunk full as well.
CHUNK, CHUNK_EXTRA_BYTES = 4096, 1 << 20
_HEADER = struct.Struct("<BIIQ")  # flags, points, extras, bytes when decompressed
_COMPRESSED, _STEPS = 1, 2
_SMALL = 512
# What a full chunk looks like, to draw many chunks without reading them: the extremes of so many stretches.
SUMMARIES = 16
SUMMARY = np.dtype([("value", "<f8"), ("time", "<i8"), ("step", "<i8")])


@dataclass
class Columns:
    """Points in the order in which they arrived. `times`: µs since 1970.

    `extra` holds, by index, a MetricPoint without name, time and step for what is more than a number: its description, or
    another value. The value of a point that is no number is NaN.
    """

    values: NDArray[np.float64]
    times: NDArray[np.int64]
    steps: NDArray[np.int64]
    extra: dict[int, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(cls, values: Sequence[float], times: Sequence[int], steps: Sequence[int], extra: dict[int, bytes]) -> Columns:
        """From lists."""
        return cls(np.array(values, "<f8"), np.array(times, "<i8"), np.array(steps, "<i8"), extra)

    def slice(self, start: int, stop: int) -> Columns:
        """Points from `start` to before `stop`."""
        extra = {i - start: data for i, data in self.extra.items() if start <= i < stop}
        return Columns(self.values[start:stop], self.times[start:stop], self.steps[start:stop], extra)

    def take(self, indexes: NDArray[np.int64]) -> Columns:
        """The points at rising `indexes`."""
        extra = {}
        if self.extra:
            extra = {place: self.extra[i] for place, i in enumerate(indexes.tolist()) if i in self.extra}
        return Columns(self.values[indexes], self.times[indexes], self.steps[indexes], extra)

    def encode(self) -> bytes:
        """As `decode` reads it."""
        flags = 0
        parts = [self.values.astype("<f8").tobytes(), _deltas(self.times)]
        if len(self.steps) and (self.steps != NO_STEP).any():
            flags |= _STEPS
            parts.append(_deltas(self.steps))
        extra = sorted(self.extra.items())
        if extra:
            parts += [np.array([i for i, _ in extra], "<u4").tobytes(), np.array([len(d) for _, d in extra], "<u4").tobytes()]
            parts += [data for _, data in extra]
        body = b"".join(parts)
        size = len(body)
        if size > _SMALL:
            flags |= _COMPRESSED
            body = zstandard.ZstdCompressor(level=1).compress(body)
        return _HEADER.pack(flags, len(self), len(extra), size) + body

    @classmethod
    def decode(cls, data: bytes) -> Columns:
        """The inverse of `encode`."""
        flags, count, extras, size = _HEADER.unpack_from(data)
        body = data[_HEADER.size :]
        if flags & _COMPRESSED:
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=size)
        place = 0

        def column(kind: str, length: int) -> NDArray[np.int64]:
            nonlocal place
            found = np.frombuffer(body, kind, length, place)
            place += found.nbytes
            return found

        values = column("<f8", count)
        times = np.cumsum(column("<i8", count), dtype="<i8")
        steps = np.cumsum(column("<i8", count), dtype="<i8") if flags & _STEPS else np.full(count, NO_STEP, "<i8")
        extra = {}
        if extras:
            indexes, lengths = column("<u4", extras).tolist(), column("<u4", extras).tolist()
            for index, length in zip(indexes, lengths):
                extra[index] = bytes(body[place : place + length])
                place += length
        return cls(values, times, steps, extra)  # type: ignore[arg-type]

    def summary(self) -> bytes:
        """Records of SUMMARY: the first point, the last, and the extremes of SUMMARIES stretches."""
        indexes = thin(self.values, 2 * SUMMARIES + 2)
        found = np.zeros(len(indexes), SUMMARY)
        found["value"], found["time"], found["step"] = self.values[indexes], self.times[indexes], self.steps[indexes]
        return found.tobytes()

    def points(self, name: str) -> Iterator[pb.MetricPoint]:
        """As messages."""
        for index, (value, time, step) in enumerate(zip(self.values.tolist(), self.times.tolist(), self.steps.tolist())):
            point = pb.MetricPoint()
            if index in self.extra:
                point.ParseFromString(self.extra[index])
            point.name = name
            point.time.seconds, point.time.nanos = time // 1_000_000, time % 1_000_000 * 1000
            if step != NO_STEP:
                point.step = step
            if point.WhichOneof("value") is None:
                point.scalar = value
            yield point


def _deltas(column: NDArray[np.int64]) -> bytes:
    # Differences wrap around as int64 does, and their sums wrap back.
    return np.diff(column, prepend=np.int64(0)).astype("<i8").tobytes()


def concatenate(parts: Sequence[Columns]) -> Columns:
    """One behind the other."""
    extra: dict[int, bytes] = {}
    base = 0
    for part in parts:
        extra.update({base + i: data for i, data in part.extra.items()})
        base += len(part)
    values = np.concatenate([p.values for p in parts]) if parts else np.empty(0, "<f8")
    times = np.concatenate([p.times for p in parts]) if parts else np.empty(0, "<i8")
    steps = np.concatenate([p.steps for p in parts]) if parts else np.empty(0, "<i8")
    return Columns(values, times, steps, extra)


def full(columns: Columns) -> int:
    """How many points at the beginning make a full chunk; 0: there are too few."""
    size = 0
    for index in sorted(columns.extra):
        size += len(columns.extra[index])
        if size >= CHUNK_EXTRA_BYTES:
            return min(index + 1, CHUNK)
    return CHUNK if len(columns) >= CHUNK else 0


def thin(values: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Indexes of at most `most` (4 or more) points that draw as all do: the first, the last, and the extremes of equal stretches.

    NaN is left out where its stretch has numbers. Min/max per bucket, as in "Visualization-Oriented Data Aggregation" (VLDB 2014, M4).
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    buckets = max((most - 2) // 2, 1)
    width = -(-count // buckets)
    rows = -(-count // width)
    padded = np.full(rows * width, np.nan)
    padded[:count] = values
    table = padded.reshape(rows, width)
    missing = np.isnan(table)
    starts = np.arange(rows) * width
    low = np.where(missing, np.inf, table).argmin(1) + starts
    high = np.where(missing, -np.inf, table).argmax(1) + starts
    found = np.unique(np.concatenate([[0], low, high, [count - 1]]))
    return found[found < count]
