"""Settings of the images service, beside the core settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from alveary_core.settings import CoreSettings


class ImagesSettings(CoreSettings):
    """Of the images service."""

    # "venv": locks that nodes install. "docker": container images.
    builder: Literal["venv", "docker"] = "venv"
    # Image that environments are built on; {python} is their Python version.
    base_image: str = "python:{python}-slim-bookworm"
    # host:port of the registry that images are pushed to; empty: they stay with the daemon, which then must be the
    # trainers' as well.
    registry: str = ""
    # User of that registry; empty: it asks for none.
    registry_user: str = ""
    # Password of that user.
    registry_password: SecretStr = SecretStr("")
    # Whether that registry speaks TLS.
    registry_secure: bool = False
    # host:port at which this service itself reaches it, where that is another; empty: `registry`.
    registry_api: str = ""
    # Network of the steps of a build; empty: the daemon's default.
    build_network: str = ""
    # Seconds; a build that takes longer is stopped and fails.
    build_seconds: float = Field(default=3600.0, gt=0.0)
    # Images that no run used for this many days are removed.
    images_days: float = Field(default=90.0, gt=0.0)
    # Bytes of all images together; beyond them, the longest unused are removed.
    images_bytes: int = Field(default=200 * 2**30, gt=0)
    # Seconds between two removals.
    collect_seconds: float = Field(default=3600.0, gt=0.0)
