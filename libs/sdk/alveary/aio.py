"""The asynchronous client: its areas, composed; the synchronous classes are a thin facade over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alveary._lazy import LazyModule
from alveary.client.connection import CALL_TIMEOUT_SECONDS, Connection
from alveary.client.runs import Runs
from alveary.client.states import state_name
from alveary.client.stubs import Stubs
from alveary.config import Config

# Each area is imported when it is first used: a list of runs is to cost no more than a list of runs.
if TYPE_CHECKING:
    from alveary import transfer
    from alveary.client import compute as _compute
    from alveary.client import datasets as _datasets
    from alveary.client import events as _events
    from alveary.client import logs as _logs
    from alveary.client import metrics as _metrics
    from alveary.client import models as _models
    from alveary_contracts.logs.v1 import logs_pb2
else:
    _compute = LazyModule("alveary.client.compute")
    _datasets = LazyModule("alveary.client.datasets")
    _events = LazyModule("alveary.client.events")
    _logs = LazyModule("alveary.client.logs")
    _metrics = LazyModule("alveary.client.metrics")
    _models = LazyModule("alveary.client.models")


class Client:
    """Talks to a platform. Make it inside a running loop; `await close()` it.

    Every call has a deadline; calls that may be repeated are, with backoff, while the platform is unavailable. In a process that
    was forked after a client was made, every call raises AlvearyError.
    """

    def __init__(self, config: Config) -> None:
        self._connection = Connection(config)
        self.config = config

    @cached_property
    def runs(self) -> Runs:
        """Runs, and what they stored."""
        return Runs(self._connection)

    @cached_property
    def metrics(self) -> _metrics.Metrics:
        """What runs logged."""
        return _metrics.Metrics(self._connection)

    @cached_property
    def logs(self) -> _logs.Logs:
        """Log lines of runs."""
        return _logs.Logs(self._connection)

    @cached_property
    def models(self) -> _models.Models:
        """Registered models."""
        return _models.Models(self._connection)

    @cached_property
    def datasets(self) -> _datasets.Datasets:
        """Datasets."""
        return _datasets.Datasets(self._connection)

    @cached_property
    def compute(self) -> _compute.Compute:
        """Compute targets, nodes, and the queue."""
        return _compute.Compute(self._connection)

    @cached_property
    def events(self) -> _events.Events:
        """Events as they happen."""
        return _events.Events(self._connection)

    @cached_property
    def dead_letters(self) -> _events.DeadLetters:
        """Events that a service could not handle."""
        return _events.DeadLetters(self._connection)

    @property
    def transfers(self) -> transfer.Transfers:
        """Uploads and downloads of files."""
        return self._connection.transfers

    @property
    def stubs(self) -> Stubs:
        """The generated stubs of all services, for `call`: what the areas do not offer."""
        return self._connection.stubs

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        """Metadata of every call, the caller's token among it."""
        return self._connection.metadata

    async def call(self, method: Any, request: Any, *, timeout: float = CALL_TIMEOUT_SECONDS) -> Any:
        """The answer to one unary call of a stub, repeated while the platform is unavailable; see `Connection.call`.

        Raises:
            AlvearyError: the platform refused, or did not answer in time.
        """
        return await self._connection.call(method, request, timeout=timeout)

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def follow_run(
        self,
        run_id: str,
        on_line: Callable[[logs_pb2.LogLine], None],
        on_state: Callable[[str, str], None],
        streams: Sequence[str] = (),
    ) -> None:
        """Report states and log lines of rank 0 as they come, provisional ones too, until the run is final and its log complete.

        Args:
            on_state: called with a state's name and the reason that the run gives for it.
        """

        async def follow_states() -> None:
            last = ("", "")
            async for run in self.runs.watch(run_id):
                now = (state_name(run.state), run.reason)
                if now != last:
                    on_state(*now)
                last = now

        async def follow_lines() -> None:
            async for one in self.logs.tail(run_id, streams=streams, rank=0, provisional=True):
                on_line(one.line)

        await asyncio.gather(follow_states(), follow_lines())
