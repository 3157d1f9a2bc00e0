"""Settings of the scheduler, beside the core settings."""

from __future__ import annotations

from typing import Literal

from alveary_core.settings import CoreSettings


class SchedulerSettings(CoreSettings):
    """Of the scheduler."""

    # Kind of targets that name none. With "nodes", this scheduler starts no trainers and refuses "local".
    default_kind: Literal["local", "nodes"] = "local"
    # A target of kind "nodes" that is created at the start if it is missing; empty: none.
    default_target: str = ""
    # Workspace of that target.
    default_workspace: str = "default"
    # host:port at which other machines reach the scheduler; empty: they cannot join. A machine with a join token also gets
    # those of the trainers' variables (ALVEARY_TRAINER_*) that name credentials.
    join_endpoint: str = ""
    # host:port of the runs service, where not all services have one endpoint.
    join_runs_endpoint: str = ""
    # host:port of the registry, likewise.
    join_registry_endpoint: str = ""
    # URL at which other machines reach the message bus.
    join_nats_url: str = ""
    # host:port at which other machines reach the object store.
    join_s3_endpoint: str = ""
    # Whether that endpoint speaks TLS.
    join_s3_secure: bool = False
    # Whether the gRPC endpoints above speak TLS.
    join_tls: bool = False
    # host:port at which docker daemons of other machines reach the registry of images, if not by its name here.
    join_image_registry: str = ""
