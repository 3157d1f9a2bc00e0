"""Each wait reason as a sentence."""

from __future__ import annotations

import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_scheduler.core.requests import Request
from alveary_scheduler.core.resources import ResourceVector, Shape
from alveary_scheduler.wait_reason import limit_of, reason_for, render

REQUEST = Request("r", "w", "u", Shape(2000, 1 << 30, 1, 500, frozenset(["A"]), frozenset([("zone", "z")])), 1, count=2, min_count=1)
ASKED = "2 nodes of 2 CPU + 1.0 GiB + 0.5 GPU (A) + zone=z (at least 1)"


@pytest.mark.parametrize(
    ("code", "fields", "sentence"),
    [
        ("UNSPECIFIED", {}, ""),
        ("TARGET_DELETED", {}, "its compute target 't' was deleted: cancel the run, or create the target again"),
        ("PROVIDER_UNAVAILABLE", {"detail": "no answer"}, "no answer"),
        ("RETRY_DELAY", {"seconds": 4.6}, "its next attempt starts in 5 s at the earliest, as its retry policy says"),
        (
            "QUOTA",
            {"limit": limit_of(ResourceVector(1500, None, 0))},
            f"waits for {ASKED}: it would exceed the quota of 1.5 CPU + 0 GPU; wait for other runs of its own to end, "
            "or ask for a larger quota",
        ),
        ("CORDONED", {"cordoned_nodes": 1, "node": "n", "detail": "disk full"}, f"waits for {ASKED}: node n takes no new runs: disk full"),
        (
            "CORDONED",
            {"cordoned_nodes": 2, "nodes": 3, "node": "n", "detail": "disk full"},
            f"waits for {ASKED}: 2 of the 3 nodes of t take no new runs: disk full",
        ),
        ("NO_NODES", {}, f"waits for {ASKED}: no node has joined t; start a trainer for it"),
        (
            "NO_SUCH_NODE",
            {"target_kind": c.TARGET_KIND_NODES, "nodes": 3},
            f"waits for {ASKED}: none of the 3 nodes of t has that much, even when empty; start another trainer for t, or ask for less",
        ),
        (
            "NO_SUCH_NODE",
            {"target_kind": c.TARGET_KIND_LOCAL},
            f"waits for {ASKED}: no node of t is like that, nor would a new one be; ask for less, or use another target",
        ),
        (
            "IN_USE",
            {"target_kind": c.TARGET_KIND_LOCAL, "max_nodes": 4},
            f"waits for {ASKED}: the nodes of t are in use by earlier runs, or reserved for them, and it has its maximum of 4; "
            "raise max_nodes, use another target, or wait",
        ),
        (
            "IN_USE",
            {"target_kind": c.TARGET_KIND_NODES, "nodes": 3},
            f"waits for {ASKED}: the 3 nodes of t are in use by earlier runs, or reserved for them; start another trainer for it, or wait",
        ),
        (
            "IN_USE",
            {"target_kind": c.TARGET_KIND_RAY, "max_nodes": 4},
            f"waits for {ASKED}: t has as many nodes as its maximum of 4 allows; raise max_nodes, use another target, or wait",
        ),
        ("PROVISIONING", {"target_kind": c.TARGET_KIND_LOCAL}, f"t is starting a node for it ({ASKED})"),
        (
            "PROVISIONING",
            {"target_kind": c.TARGET_KIND_RAY},
            f"Ray is asked for {ASKED}; if no node of the cluster has that free, its autoscaler starts one",
        ),
    ],
)
def test_a_reason_is_rendered_from_its_fields_alone(code: str, fields: dict[str, object], sentence: str) -> None:
    reason = reason_for(c.WaitCode.Value(f"WAIT_CODE_{code}"), REQUEST, "t")
    reason.MergeFrom(c.WaitReason(**fields))  # type: ignore[arg-type]
    assert render(reason) == sentence


@pytest.mark.parametrize("code", c.WaitCode.values()[1:])
def test_every_code_has_a_sentence(code: c.WaitCode.ValueType) -> None:
    assert render(c.WaitReason(code=code, detail="x"))
