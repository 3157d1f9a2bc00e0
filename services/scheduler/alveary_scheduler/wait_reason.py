"""Why a run is queued: the value that events carry, and the one place that renders it to a sentence. Pure."""

from __future__ import annotations

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_scheduler.core.requests import Request, describe
from alveary_scheduler.core.resources import ResourceVector
from alveary_scheduler.resources import resources_of, shape_of


def reason_for(code: c.WaitCode.ValueType, request: Request, target: str) -> c.WaitReason:
    """A reason with what the request asks for; the caller adds the fields of its code."""
    return c.WaitReason(
        code=code,
        target=target,
        shape=resources_of(request.shape),
        node_labels=dict(sorted(request.shape.labels)),
        node_count=request.count,
        min_node_count=request.min_count,
    )


def limit_of(limit: ResourceVector) -> c.ResourceLimit:
    """A quota as a message; unlimited parts are unset."""
    return c.ResourceLimit(cpu_milli=limit.cpu_milli, memory_bytes=limit.memory, gpu_milli=limit.gpu_milli)


def render(reason: c.WaitReason) -> str:
    """The reason as a sentence that a user can act on."""
    match reason.code:
        case c.WAIT_CODE_UNSPECIFIED:
            return ""
        case c.WAIT_CODE_TARGET_DELETED:
            return f"its compute target {reason.target!r} was deleted: cancel the run, or create the target again"
        case c.WAIT_CODE_PROVIDER_UNAVAILABLE:
            return reason.detail
        case c.WAIT_CODE_PROVISIONING:
            return _provisioning(reason)
        case c.WAIT_CODE_RETRY_DELAY:
            return f"its next attempt starts in {reason.seconds:.0f} s at the earliest, as its retry policy says"
        case c.WAIT_CODE_QUOTA:
            obstacle = f"it would exceed the quota of {_limit(reason)}; wait for other runs of its own to end, or ask for a larger quota"
        case c.WAIT_CODE_CORDONED:
            obstacle = _cordoned(reason)
        case c.WAIT_CODE_NO_NODES:
            obstacle = f"no node has joined {reason.target}; start a trainer for it"
        case c.WAIT_CODE_NO_SUCH_NODE:
            obstacle = _no_such_node(reason)
        case _:
            obstacle = _in_use(reason)
    return f"waits for {_request(reason)}: {obstacle}"


def _request(reason: c.WaitReason) -> str:
    return describe(shape_of(reason.shape, reason.node_labels), reason.node_count, reason.min_node_count)


def _limit(reason: c.WaitReason) -> str:
    limit = reason.limit
    return str(
        ResourceVector(
            limit.cpu_milli if limit.HasField("cpu_milli") else None,
            limit.memory_bytes if limit.HasField("memory_bytes") else None,
            limit.gpu_milli if limit.HasField("gpu_milli") else None,
        )
    )


def _provisioning(reason: c.WaitReason) -> str:
    if reason.target_kind == c.TARGET_KIND_RAY:
        return f"Ray is asked for {_request(reason)}; if no node of the cluster has that free, its autoscaler starts one"
    return f"{reason.target} is starting a node for it ({_request(reason)})"


def _cordoned(reason: c.WaitReason) -> str:
    if reason.cordoned_nodes == 1:
        return f"node {reason.node} takes no new runs: {reason.detail}"
    return f"{reason.cordoned_nodes} of the {reason.nodes} nodes of {reason.target} take no new runs: {reason.detail}"


def _no_such_node(reason: c.WaitReason) -> str:
    if reason.target_kind == c.TARGET_KIND_NODES:
        text = f"none of the {reason.nodes} nodes of {reason.target} has that much, even when empty"
        return f"{text}; start another trainer for {reason.target}, or ask for less"
    return f"no node of {reason.target} is like that, nor would a new one be; ask for less, or use another target"


def _in_use(reason: c.WaitReason) -> str:
    if reason.target_kind == c.TARGET_KIND_RAY:
        text = f"{reason.target} has as many nodes as its maximum of {reason.max_nodes} allows"
        return f"{text}; raise max_nodes, use another target, or wait"
    if reason.target_kind == c.TARGET_KIND_NODES:
        text = f"the {reason.nodes} nodes of {reason.target} are in use by earlier runs, or reserved for them"
        return f"{text}; start another trainer for it, or wait"
    text = f"the nodes of {reason.target} are in use by earlier runs, or reserved for them, and it has its maximum of {reason.max_nodes}"
    return f"{text}; raise max_nodes, use another target, or wait"
