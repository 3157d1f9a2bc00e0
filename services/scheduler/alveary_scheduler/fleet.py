"""The nodes of all targets, through the providers of their kinds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Key
from alveary_scheduler.event_writer import EventWriter
from alveary_scheduler.plan import ProvisionGroup, ReleaseGroup, Scale
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.providers import NodeProvider
from alveary_scheduler.state import State, TargetKey

_NO_PROVIDER = NodeProvider()


class Fleet:
    """Carries out decisions about nodes, and says which are on their way."""

    def __init__(
        self, projection: SchedulerProjection, writer: EventWriter, providers: Mapping[c.TargetKind.ValueType, NodeProvider]
    ) -> None:
        self._projection = projection
        self._writer = writer
        self._providers = providers
        # Nodes that were told to end, or are about to be.
        self.leaving: set[str] = set()
        # When nodes of a target came or went last, of the monotonic clock.
        self._resized: dict[TargetKey, float] = {}

    @property
    def _state(self) -> State:
        return self._projection.state

    def _provider(self, key: TargetKey) -> NodeProvider:
        return self._providers.get(self._state.targets[key].spec.kind, _NO_PROVIDER)

    def _joined(self, key: TargetKey) -> list[str]:
        return [node.id for node in self._state.nodes.values() if (node.workspace, node.target) == key]

    async def tend(self) -> None:
        """Have each provider keep alive what is wanted."""
        for kind, provider in self._providers.items():
            specs = {key: target.spec for key, target in self._state.targets.items() if target.spec.kind == kind}
            await provider.tend(specs, self.leaving)

    def left(self, node: str) -> None:
        """A node has said that it ends."""
        self.leaving.discard(node)
        for provider in self._providers.values():
            provider.left(node)

    def lost(self, node: str) -> None:
        """A node is silent."""
        for provider in self._providers.values():
            provider.lost(node)

    async def close(self) -> None:
        """Close the providers; nodes go on."""
        for provider in self._providers.values():
            await provider.close()

    # ---- what the plan is made with -------------------------------------------------------------------------------

    def desired(self, key: TargetKey) -> int:
        """How many nodes a target has or is getting."""
        provider = self._provider(key) if key in self._state.targets else _NO_PROVIDER
        if provider.scales:
            return len([node for node in provider.wanted(key) if node not in self.leaving])
        return len(self._joined(key)) + sum(provider.coming(key, set(self._state.nodes)).values())

    def starting(self) -> dict[TargetKey, int]:
        """How many nodes of each target are started and have not joined."""
        joined = self._state.nodes.keys()
        return {
            key: len([node for node in self._provider(key).wanted(key) if node not in joined and node not in self.leaving])
            for key in self._state.targets
        }

    def coming(self) -> dict[TargetKey, Mapping[str, int]]:
        """What is provisioned for single runs."""
        joined = set(self._state.nodes)
        return {key: self._provider(key).coming(key, joined) for key in self._state.targets}

    def troubles(self) -> dict[TargetKey, str]:
        """Targets that no nodes can be had for, and why."""
        return {key: trouble for key in self._state.targets if (trouble := self._provider(key).trouble(key))}

    def cool(self, key: TargetKey) -> bool:
        """Whether the last change of a target's size is longer ago than its cooldown."""
        target = self._state.targets.get(key)
        return time.monotonic() - self._resized.get(key, 0.0) >= (target.spec.cooldown_seconds if target else 0.0)

    # ---- decisions ------------------------------------------------------------------------------------------------

    def provision_group(self, decision: ProvisionGroup) -> None:
        """Start a group of nodes for a run."""
        key = (decision.workspace, decision.target)
        self._provider(key).provision_group(key, decision.run, decision.shape, decision.count, decision.spread)
        self._resized[key] = time.monotonic()

    def release_group(self, decision: ReleaseGroup) -> None:
        """Give up the group of a run."""
        key = (decision.workspace, decision.target)
        self._provider(key).release_group(key, decision.run)

    async def scale(self, decision: Scale) -> None:
        """Start nodes, or drain idle ones, until a target has as many as were decided."""
        key = (decision.workspace, decision.target)
        provider = self._provider(key)
        present = provider.wanted(key) if provider.scales else self._joined(key)
        scaling = ev.TargetScaling(desired_nodes=decision.nodes, reason=decision.reason)
        if decision.nodes > len(present):
            await self._writer.append(Key(decision.workspace, "target", decision.target), scaling)
            self._resized[key] = time.monotonic()
            provider.scale_up(key, self._state.targets[key].spec, decision.nodes)
            return
        busy = {node for placed in self._state.placed.values() for node, _ in placed.nodes}
        idle = [node for node in self._joined(key) if node not in busy and node not in self.leaving]
        surplus = max(len(present) - decision.nodes, 0)
        doomed = sorted(idle, reverse=True)[:surplus]
        if doomed:
            await self._writer.append(Key(decision.workspace, "target", decision.target), scaling)
            self._resized[key] = time.monotonic()
        for node in doomed:
            self.leaving.add(node)
            await self._writer.append(Key(decision.workspace, "node", node), ev.NodeDraining(reason=decision.reason))
