"""Compute targets."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alveary.errors import AlvearyError, ComputeTargetException
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

if TYPE_CHECKING:
    from alveary.session import Session


def _target_kind(name: str) -> c.TargetKind.ValueType:
    if not name:
        return c.TARGET_KIND_UNSPECIFIED
    try:
        return c.TargetKind.Value(f"TARGET_KIND_{name.upper()}")
    except ValueError:
        sentence = f"kind {name!r}: 'local' (this machine), 'nodes' (machines that join) or 'ray' (an existing Ray cluster)"
        raise ComputeTargetException(sentence, "INVALID_ARGUMENT") from None


class ComputeTarget:
    """Where runs run. `ComputeTarget(workspace, name)` finds one."""

    def __init__(self, workspace: Session, name: str) -> None:
        self.workspace, self.name = workspace, name
        try:
            self.refresh_state()
        except AlvearyError as error:
            if error.code == "NOT_FOUND":
                raise ComputeTargetException(str(error), error.code) from error
            raise

    @classmethod
    def _of(cls, workspace: Session, found: pb.Target) -> ComputeTarget:
        target = AmlCompute.__new__(AmlCompute)
        target.workspace, target.name, target._found = workspace, found.name, found
        return target

    def refresh_state(self) -> None:
        """Look again."""
        self._found = self.workspace._call(self.workspace._client.compute.get(self.name))

    @property
    def node_resources(self) -> c.Resources:
        """What one node has."""
        return self._found.spec.node_resources

    @property
    def provisioning_state(self) -> str:
        """ "Succeeded", or "Resizing" while nodes come or go."""
        return self._found.state

    def __repr__(self) -> str:
        return f"ComputeTarget({self.name}, {self._found.current_nodes} of {self._found.spec.max_nodes} nodes)"

    @classmethod
    def create(cls, workspace: Session, name: str, provisioning_configuration: ev.ComputeSpec) -> ComputeTarget:
        """Create a target; one of the same name and specification is taken as it is.

        Raises:
            ComputeTargetException: the name is taken by another one, or the specification cannot be met.
        """
        try:
            return cls._of(workspace, workspace._call(workspace._client.compute.create(name, provisioning_configuration)))
        except AlvearyError as error:
            raise ComputeTargetException(str(error), error.code) from error

    @staticmethod
    def list(workspace: Session) -> builtins.list[ComputeTarget]:
        """All targets of a workspace."""
        return [ComputeTarget._of(workspace, target) for target in workspace._call(workspace._client.compute.list())]

    def wait_for_completion(
        self,
        show_output: bool = False,
        min_node_count: int | None = None,
        timeout_in_minutes: float = 20,
        is_delete_operation: bool = False,
    ) -> None:
        """Wait until it has its min_nodes (or min_node_count) nodes; with is_delete_operation, until it is gone.

        Raises:
            ComputeTargetException: not within the time, or it is gone.
        """
        deadline = time.monotonic() + timeout_in_minutes * 60
        wanted = self._found.spec.min_nodes if min_node_count is None else min_node_count
        while True:
            try:
                self.refresh_state()
            except AlvearyError as error:
                if error.code != "NOT_FOUND":
                    raise
                if is_delete_operation:
                    return
                raise ComputeTargetException(str(error), error.code) from error
            if self._found.current_nodes >= wanted and not is_delete_operation:
                if show_output:
                    print(f"Succeeded: {self.name} has {self._found.current_nodes} nodes", file=sys.stderr)
                return
            if time.monotonic() > deadline:
                state = "is still there" if is_delete_operation else f"has {self._found.current_nodes} of {wanted} nodes"
                raise ComputeTargetException(f"{self.name} {state} after {timeout_in_minutes:g} minutes", "DEADLINE_EXCEEDED")
            time.sleep(0.1)

    def get_status(self) -> pb.Target:
        """Its present state."""
        self.refresh_state()
        return self._found

    def delete(self) -> None:
        """Delete it.

        Raises:
            AlvearyError: runs use it or wait for it.
        """
        self.workspace._call(self.workspace._client.compute.delete(self.name))

    def update(
        self,
        min_nodes: int | None = None,
        max_nodes: int | None = None,
        idle_seconds_before_scaledown: float | None = None,
        *,
        cooldown_seconds: float | None = None,
        quotas: Sequence[Quota] | None = None,
        description: str | None = None,
    ) -> None:
        """Change what is given; the rest stays. Runs go on.

        Raises:
            ComputeTargetException: the target cannot be so.
        """
        self.refresh_state()
        spec = ev.ComputeSpec()
        spec.CopyFrom(self._found.spec)
        given = {
            "min_nodes": min_nodes,
            "max_nodes": max_nodes,
            "idle_seconds_before_scaledown": idle_seconds_before_scaledown,
            "cooldown_seconds": cooldown_seconds,
            "description": description,
        }
        for name, value in given.items():
            if value is not None:
                setattr(spec, name, value)
        if quotas is not None:
            del spec.quotas[:]
            spec.quotas.extend(q._proto() for q in quotas)
        try:
            self._found = self.workspace._call(self.workspace._client.compute.update(self.name, spec))
        except AlvearyError as error:
            raise ComputeTargetException(str(error), error.code) from error

    def list_nodes(self) -> builtins.list[pb.Node]:
        """Its nodes."""
        return self.workspace._call(self.workspace._client.compute.nodes(self.name))

    def create_join_token(self, valid_seconds: float = 86400.0) -> tuple[str, str]:
        """(endpoint, token) for `alveary node join`, with which machines become nodes of this target; of kind "nodes".

        Raises:
            AlvearyError: it starts its nodes itself, or the platform can be reached from its own machine alone.
        """
        made = self.workspace._call(self.workspace._client.compute.create_join_token(self.name, valid_seconds))
        return made.endpoint, made.token


@dataclass
class Quota:
    """What a user (empty: the workspace) may hold of a target, and keeps when others want more.

    `guaranteed` and `maximum` have keys cpus, memory_gb and gpus; what is left out of a maximum is not limited.
    """

    user: str = ""
    weight: float = 1.0
    guaranteed: Mapping[str, float] | None = None
    maximum: Mapping[str, float] | None = None

    def _proto(self) -> ev.Quota:
        found = ev.Quota(user=self.user, weight=self.weight)
        for name, part in (("guaranteed", self.guaranteed), ("maximum", self.maximum)):
            if part is None:
                continue
            if unknown := set(part) - {"cpus", "memory_gb", "gpus"}:
                raise ComputeTargetException(f"{name}: {', '.join(sorted(unknown))}: use cpus, memory_gb and gpus", "INVALID_ARGUMENT")
            amount = c.Resources(
                cpus=part.get("cpus", 0), memory_bytes=int(part.get("memory_gb", 0) * 2**30), gpus=int(part.get("gpus", 0))
            )
            getattr(found, name).CopyFrom(amount)
            if name == "maximum" and part.get("gpus") == 0:
                found.forbid_gpus = True
        return found


class AmlCompute(ComputeTarget):
    """A target whose nodes come and go with the work."""

    @staticmethod
    def provisioning_configuration(
        vm_size: str = "",
        vm_priority: str = "dedicated",
        min_nodes: int = 0,
        max_nodes: int | None = None,
        idle_seconds_before_scaledown: float = 1800,
        admin_username: str | None = None,
        admin_user_password: str | None = None,
        admin_user_ssh_key: str | None = None,
        vnet_resourcegroup_name: str | None = None,
        vnet_name: str | None = None,
        subnet_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        description: str | None = None,
        remote_login_port_public_access: str = "NotSpecified",
        identity_type: str | None = None,
        identity_id: Any = None,
        location: str | None = None,
        enable_node_public_ip: bool | None = None,
        *,
        cpus: float = 0,
        memory_gb: float = 0,
        gpus: int | None = None,
        network: str = "",
        multi_tenant: bool = False,
        kind: str = "",
        placement_policy: str = "",
        gpu_sharing: bool = False,
        quotas: Sequence[Quota] = (),
        address: str = "",
        cooldown_seconds: float = 0,
    ) -> ev.ComputeSpec:
        """What to create. A node has this machine's CPUs, memory and its share of the GPUs, unless cpus, memory_gb or gpus say less.

        `network` is that of containers: "none", "bridge" or a docker network's name; the default is "none" for a target
        that is `multi_tenant`, else "bridge". `kind` is "local", "nodes" (machines that join with `alveary node join`) or
        "ray" (the Ray cluster at `address`). After nodes came or went, none is let go for `cooldown_seconds`. `gpu_sharing`
        lets runs ask for a part of a GPU. Runs of a "lowpriority" target may have to make room for others.

        Raises:
            ComputeTargetException: something that only makes sense in Azure was asked for, or an unknown kind.
        """
        azure = {
            "admin_username": admin_username,
            "admin_user_password": admin_user_password,
            "admin_user_ssh_key": admin_user_ssh_key,
            "vnet_resourcegroup_name": vnet_resourcegroup_name,
            "vnet_name": vnet_name,
            "subnet_name": subnet_name,
            "identity_type": identity_type,
            "identity_id": identity_id,
            "location": location,
            "enable_node_public_ip": enable_node_public_ip,
        }
        for name, value in azure.items():
            if value is not None:
                raise ComputeTargetException(f"{name} only makes sense in Azure: leave it out", "INVALID_ARGUMENT")
        if remote_login_port_public_access not in ("NotSpecified", "Disabled"):
            raise ComputeTargetException("remote_login_port_public_access: nodes open no port for logins; leave it out", "INVALID_ARGUMENT")
        spec = ev.ComputeSpec(
            vm_size=vm_size,
            vm_priority=vm_priority,
            min_nodes=min_nodes,
            max_nodes=max_nodes or 0,
            idle_seconds_before_scaledown=idle_seconds_before_scaledown,
            tags=tags,
            description=description or "",
            network=network,
            multi_tenant=multi_tenant,
            kind=_target_kind(kind),
            placement_policy=placement_policy,
            gpu_sharing=gpu_sharing,
            quotas=[q._proto() for q in quotas],
            address=address,
            cooldown_seconds=cooldown_seconds,
        )
        if cpus or memory_gb or gpus is not None:
            if gpus is None:
                gpus = 0
            spec.node_resources.CopyFrom(c.Resources(cpus=cpus, memory_bytes=int(memory_gb * 2**30), gpus=gpus))
        return spec
