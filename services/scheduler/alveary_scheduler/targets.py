"""Specifications of compute targets: defaults, and one validator for each kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.names import name_problem
from alveary_core.errors import InvalidArgument
from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.providers.local import machine
from alveary_scheduler.providers.ray import installed

MAX_LOCAL_NODES = 64
MAX_NODES = 10_000
# Azure ML's default.
_DEFAULT_MAX_NODES = 4
_ADDRESS = re.compile(r"(ray://)?[A-Za-z0-9_.-]+:\d{1,5}")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")

# (field, sentence)
Faults = Iterator[tuple[str, str]]


def kind_name(kind: c.TargetKind.ValueType) -> str:
    """A kind as users write it: "local", "nodes" or "ray"."""
    return c.TargetKind.Name(kind).removeprefix("TARGET_KIND_").lower()


def kind_of(name: str) -> c.TargetKind.ValueType:
    """The kind of a name.

    Raises:
        ValueError: there is none of that name.
    """
    return c.TargetKind.Value(f"TARGET_KIND_{name.upper()}")


def validate_and_default(name: str, asked: ev.ComputeSpec, default_kind: c.TargetKind.ValueType = c.TARGET_KIND_LOCAL) -> ev.ComputeSpec:
    """The specification with defaults filled in.

    `default_kind` is that of the platform; where it is not LOCAL, the platform starts no trainers itself.

    Raises:
        InvalidArgument: with every fault of name and specification.
    """
    spec = _with_defaults(asked, default_kind)
    faults = [*_common_faults(name, spec)]
    if default_kind != c.TARGET_KIND_LOCAL and spec.kind == c.TARGET_KIND_LOCAL:
        faults.append(("spec.kind", "'local': this platform starts no trainers by itself; use 'nodes', and start trainers for the target"))
    faults += _VALIDATORS.get(spec.kind, _unknown_faults)(spec)
    if faults:
        raise InvalidArgument(*faults)
    return spec


def _with_defaults(asked: ev.ComputeSpec, default_kind: c.TargetKind.ValueType) -> ev.ComputeSpec:
    spec = ev.ComputeSpec()
    spec.CopyFrom(asked)
    spec.kind = asked.kind or default_kind
    spec.max_nodes = asked.max_nodes or (MAX_NODES if spec.kind == c.TARGET_KIND_NODES else _DEFAULT_MAX_NODES)
    spec.vm_priority = asked.vm_priority or "dedicated"
    spec.network = asked.network or ("none" if asked.multi_tenant else "bridge")
    given = asked.HasField("node_resources")
    if spec.kind == c.TARGET_KIND_LOCAL or (spec.kind == c.TARGET_KIND_NODES and given):
        here, _ = machine(spec.max_nodes)
        spec.node_resources.cpus = asked.node_resources.cpus or here.cpus
        spec.node_resources.memory_bytes = asked.node_resources.memory_bytes or here.memory_bytes
        spec.node_resources.gpus = asked.node_resources.gpus if given else here.gpus
    return spec


def _common_faults(name: str, spec: ev.ComputeSpec) -> Faults:
    if problem := name_problem(name):
        yield "name", problem
    if spec.placement_policy and spec.placement_policy not in POLICIES:
        yield "spec.placement_policy", f"{spec.placement_policy!r}: one of {', '.join(sorted(POLICIES))}"
    users = [quota.user for quota in spec.quotas]
    for quota in spec.quotas:
        if quota.weight < 0 or users.count(quota.user) > 1:
            yield "spec.quotas", f"user {quota.user!r}: one quota each, with a weight above 0"
    if not _NETWORK.fullmatch(spec.network) or spec.network == "host":
        yield "spec.network", f"{spec.network[:80]!r}: 'none', 'bridge' or the name of a docker network"
    for field in ("cooldown_seconds", "idle_seconds_before_scaledown"):
        if getattr(spec, field) < 0:
            yield f"spec.{field}", "cannot be negative"
    if spec.vm_priority not in ("dedicated", "lowpriority"):
        yield "spec.vm_priority", f"{spec.vm_priority!r}: 'dedicated' or 'lowpriority'"


def _local_faults(spec: ev.ComputeSpec) -> Faults:
    yield from _node_count_faults(spec, MAX_LOCAL_NODES)
    yield from _address_faults(spec)
    here, _ = machine(spec.max_nodes)
    want = spec.node_resources
    beyond = want.cpus > here.cpus or want.memory_bytes > here.memory_bytes or want.gpus > here.gpus
    if beyond or min(want.cpus, want.memory_bytes, want.gpus) < 0:
        gib = here.memory_bytes / 2**30
        yield "spec.node_resources", f"this machine can give a node {here.cpus:g} CPUs, {gib:.1f} GiB and {here.gpus} GPUs"


def _nodes_faults(spec: ev.ComputeSpec) -> Faults:
    yield from _node_count_faults(spec, MAX_NODES)
    yield from _address_faults(spec)


def _ray_faults(spec: ev.ComputeSpec) -> Faults:
    yield from _node_count_faults(spec, MAX_NODES)
    if not _ADDRESS.fullmatch(spec.address):
        yield "spec.address", f"{spec.address!r}: the Ray cluster's 'host:port' or 'ray://host:port'"
    if spec.min_nodes:
        yield "spec.min_nodes", f"{spec.min_nodes}: Ray targets keep no idle nodes, so min_nodes must be 0"
    if spec.HasField("node_resources"):
        yield "spec.node_resources", "nodes of a Ray target are as large as each run asks for: leave it out"
    if not installed():
        yield "spec.kind", "'ray': Ray is not installed beside the scheduler: pip install 'alveary-scheduler[ray]'"


def _node_count_faults(spec: ev.ComputeSpec, limit: int) -> Faults:
    if not 0 <= spec.min_nodes <= spec.max_nodes <= limit:
        yield "spec.max_nodes", f"0 <= min_nodes ({spec.min_nodes}) <= max_nodes ({spec.max_nodes}) <= {limit} must hold"


def _address_faults(spec: ev.ComputeSpec) -> Faults:
    if spec.address:
        yield "spec.address", f"only targets of kind 'ray' have one, and this is of kind {kind_name(spec.kind)!r}"


def _unknown_faults(spec: ev.ComputeSpec) -> Faults:
    yield "spec.kind", f"{spec.kind}: 'local' (this machine), 'nodes' (machines that join) or 'ray' (an existing Ray cluster)"


_VALIDATORS: Mapping[c.TargetKind.ValueType, Callable[[ev.ComputeSpec], Faults]] = {
    c.TARGET_KIND_UNSPECIFIED: _unknown_faults,
    c.TARGET_KIND_LOCAL: _local_faults,
    c.TARGET_KIND_NODES: _nodes_faults,
    c.TARGET_KIND_RAY: _ray_faults,
}
