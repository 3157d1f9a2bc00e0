"""Between the resources of the contracts and the shapes of the core. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_scheduler.core.fairness import Quota
from alveary_scheduler.core.requests import Account
from alveary_scheduler.core.resources import UNLIMITED, WHOLE, ResourceVector, Shape

_MAX_CPUS = 1e6


def milli(value: float) -> int:
    """Thousandths, limited to 0 and a million CPUs; 0 for NaN."""
    return 0 if math.isnan(value) else round(min(max(value, 0.0), _MAX_CPUS) * 1000)


def shape_of(resources: c.Resources, labels: Mapping[str, str]) -> Shape:
    """What each node of a run gives to it."""
    gpus = 1 if resources.gpu_milli else resources.gpus
    return Shape(
        milli(resources.cpus),
        resources.memory_bytes,
        gpus,
        resources.gpu_milli or WHOLE,
        frozenset(resources.gpu_models) if gpus else frozenset(),
        frozenset(labels.items()),
    )


def resources_of(shape: Shape) -> c.Resources:
    """The inverse, without labels."""
    return c.Resources(
        cpus=shape.cpu_milli / 1000,
        memory_bytes=shape.memory,
        gpus=shape.gpus,
        gpu_milli=shape.gpu_milli if shape.shares else 0,
        gpu_models=sorted(shape.models),
    )


def quotas_of(workspace: str, spec: ev.ComputeSpec) -> dict[Account, Quota]:
    """The quotas of a target, by account; a maximum of 0 is none, but for GPUs where they are forbidden."""
    found = {}
    for one in spec.quotas:
        maximum = UNLIMITED
        if one.HasField("maximum") or one.forbid_gpus:
            limit = one.maximum
            maximum = ResourceVector(
                milli(limit.cpus) or None, limit.memory_bytes or None, 0 if one.forbid_gpus else limit.gpus * WHOLE or None
            )
        guaranteed = None
        if one.HasField("guaranteed"):
            guaranteed = ResourceVector(milli(one.guaranteed.cpus), one.guaranteed.memory_bytes or None, one.guaranteed.gpus * WHOLE)
        found[workspace, one.user] = Quota(one.weight or 1.0, guaranteed, maximum)
    return found
