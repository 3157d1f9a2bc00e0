"""The generated stubs of every service, each imported when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import grpc.aio

from alveary._lazy import LazyModule
from alveary_contracts.runs.v1 import runs_pb2_grpc

# A list of runs is to cost no more than a list of runs.
if TYPE_CHECKING:
    from alveary_contracts.images.v1 import images_pb2_grpc
    from alveary_contracts.logs.v1 import logs_pb2_grpc
    from alveary_contracts.registry.v1 import registry_pb2_grpc
    from alveary_contracts.scheduler.v1 import scheduler_pb2_grpc
else:
    images_pb2_grpc = LazyModule("alveary_contracts.images.v1.images_pb2_grpc")
    logs_pb2_grpc = LazyModule("alveary_contracts.logs.v1.logs_pb2_grpc")
    registry_pb2_grpc = LazyModule("alveary_contracts.registry.v1.registry_pb2_grpc")
    scheduler_pb2_grpc = LazyModule("alveary_contracts.scheduler.v1.scheduler_pb2_grpc")


class Stubs:
    """One stub for each gRPC service. `channel_of` gives the channel to a service by its name."""

    def __init__(self, channel_of: Callable[[str], grpc.aio.Channel]) -> None:
        self._channel_of = channel_of

    @cached_property
    def runs(self) -> runs_pb2_grpc.RunServiceAsyncStub:
        return runs_pb2_grpc.RunServiceStub(self._channel_of("runs"))

    @cached_property
    def experiments(self) -> runs_pb2_grpc.ExperimentServiceAsyncStub:
        return runs_pb2_grpc.ExperimentServiceStub(self._channel_of("runs"))

    @cached_property
    def workspaces(self) -> runs_pb2_grpc.WorkspaceServiceAsyncStub:
        return runs_pb2_grpc.WorkspaceServiceStub(self._channel_of("runs"))

    @cached_property
    def events(self) -> runs_pb2_grpc.EventServiceAsyncStub:
        return runs_pb2_grpc.EventServiceStub(self._channel_of("runs"))

    @cached_property
    def dead_letters(self) -> runs_pb2_grpc.DeadLetterServiceAsyncStub:
        return runs_pb2_grpc.DeadLetterServiceStub(self._channel_of("runs"))

    @cached_property
    def images(self) -> images_pb2_grpc.ImageServiceAsyncStub:
        return images_pb2_grpc.ImageServiceStub(self._channel_of("images"))

    @cached_property
    def compute(self) -> scheduler_pb2_grpc.ComputeServiceAsyncStub:
        return scheduler_pb2_grpc.ComputeServiceStub(self._channel_of("scheduler"))

    @cached_property
    def nodes(self) -> scheduler_pb2_grpc.NodeServiceAsyncStub:
        return scheduler_pb2_grpc.NodeServiceStub(self._channel_of("scheduler"))

    @cached_property
    def queue(self) -> scheduler_pb2_grpc.QueueServiceAsyncStub:
        return scheduler_pb2_grpc.QueueServiceStub(self._channel_of("scheduler"))

    @cached_property
    def logs(self) -> logs_pb2_grpc.LogServiceAsyncStub:
        return logs_pb2_grpc.LogServiceStub(self._channel_of("logs"))

    @cached_property
    def models(self) -> registry_pb2_grpc.ModelServiceAsyncStub:
        return registry_pb2_grpc.ModelServiceStub(self._channel_of("registry"))

    @cached_property
    def datasets(self) -> registry_pb2_grpc.DatasetServiceAsyncStub:
        return registry_pb2_grpc.DatasetServiceStub(self._channel_of("registry"))
