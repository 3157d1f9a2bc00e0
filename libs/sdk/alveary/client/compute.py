"""Compute targets, their nodes, and why runs wait for them."""

from __future__ import annotations

import builtins

from alveary.client.connection import Connection
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb


class Compute:
    """`client.compute`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._targets = connection.stubs.compute
        self._nodes = connection.stubs.nodes
        self._queue = connection.stubs.queue

    async def get(self, name: str) -> pb.Target:
        """A compute target."""
        reply: pb.GetTargetResponse = await self._connection.call(self._targets.GetTarget, pb.GetTargetRequest(name=name))
        return reply.target

    async def list(self) -> builtins.list[pb.Target]:
        """All compute targets of the workspace."""
        reply = await self._connection.call(self._targets.ListTargets, pb.ListTargetsRequest())
        return [*reply.targets]

    async def create(self, name: str, spec: ev.ComputeSpec) -> pb.Target:
        """A new target, or the one that has this name and specification already."""
        request = pb.CreateTargetRequest(name=name, spec=spec)
        reply: pb.CreateTargetResponse = await self._connection.call(self._targets.CreateTarget, request)
        return reply.target

    async def update(self, name: str, spec: ev.ComputeSpec) -> pb.Target:
        """The target, with another specification; its runs go on."""
        request = pb.UpdateTargetRequest(name=name, spec=spec)
        reply: pb.UpdateTargetResponse = await self._connection.call(self._targets.UpdateTarget, request)
        return reply.target

    async def delete(self, name: str) -> None:
        """Delete a target.

        Raises:
            AlvearyError: runs use it or wait for it.
        """
        await self._connection.call(self._targets.DeleteTarget, pb.DeleteTargetRequest(name=name))

    async def nodes(self, target: str = "") -> builtins.list[pb.Node]:
        """Nodes of one target, or of all."""
        reply = await self._connection.call(self._nodes.ListNodes, pb.ListNodesRequest(target=target))
        return [*reply.nodes]

    async def drain_node(self, node: str, reason: str = "") -> None:
        """Place nothing more on a node; what runs there runs to its end."""
        await self._connection.call(self._nodes.DrainNode, pb.DrainNodeRequest(node=node, reason=reason))

    async def create_join_token(self, target: str, valid_seconds: float) -> pb.CreateJoinTokenResponse:
        """Endpoint and token with which machines become nodes of a target of kind "nodes"."""
        request = pb.CreateJoinTokenRequest(target=target, valid_seconds=valid_seconds)
        reply: pb.CreateJoinTokenResponse = await self._connection.call(self._nodes.CreateJoinToken, request)
        return reply

    async def explain_run(self, run_id: str) -> pb.ExplainRunResponse:
        """Why a run is queued.

        Raises:
            AlvearyError: NOT_FOUND when it does not wait for a place.
        """
        reply: pb.ExplainRunResponse = await self._connection.call(self._queue.ExplainRun, pb.ExplainRunRequest(run_id=run_id))
        return reply
