"""What the scheduler is told from outside, beside the core settings."""

from __future__ import annotations

from typing import Literal

from alveary_core.settings import CoreSettings


class SchedulerSettings(CoreSettings):
    """ALVEARY_* variables; see each field."""

    # Kind of targets that name none. Where it is "nodes", this scheduler starts no trainers, and "local" is refused.
    default_kind: Literal["local", "nodes"] = "local"
    # A target of kind "nodes" that is made at the start, where it is missing; empty: none.
    default_target: str = ""
    default_workspace: str = "default"
    # How machines elsewhere reach this platform; empty: they do not. Of trainers' variables (ALVEARY_TRAINER_*), those that
    # name credentials are handed to whoever has a join token.
    join_endpoint: str = ""
    # Other services, where they are not behind one endpoint.
    join_runs_endpoint: str = ""
    join_registry_endpoint: str = ""
    join_nats_url: str = ""
    join_s3_endpoint: str = ""
    join_s3_secure: bool = False
    # The endpoints above speak TLS.
    join_tls: bool = False
    # host:port at which their docker daemons reach the registry of images, where its name is another here.
    join_image_registry: str = ""
