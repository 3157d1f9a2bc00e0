"""Clusters of the `ray` kind, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_scheduler.core.resources import Shape
from alveary_scheduler.providers.ray import RayNodes

T = ("w", "t")


async def test_a_target_that_was_created_again_with_another_address_gets_another_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drive(self: RayNodes, key: Any, cluster: Any) -> None:
        driven.append(cluster.address)

    driven: list[str] = []
    monkeypatch.setattr(RayNodes, "_drive", drive)
    nodes = RayNodes(tmp_path, lambda *key: ("hive:1", "token"), lambda: None)
    await nodes.tend({T: ev.ComputeSpec(address="old:1")}, set())
    nodes.provision_group(T, "r", Shape(1000, 0), 2, True)
    await nodes.tend({T: ev.ComputeSpec(address="old:1")}, set())
    assert nodes.coming(T, set()) == {"r": 2}, "the same address: the same cluster"
    await nodes.tend({T: ev.ComputeSpec(address="new:1")}, set())
    assert nodes.coming(T, set()) == {}
    await nodes.close()
    assert driven[0] == "old:1" and nodes._clusters[T].address == "new:1"
