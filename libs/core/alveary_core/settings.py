"""What a service is told from outside: environment variables ALVEARY_*, see each field."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class MetricLimits(BaseSettings):
    """How much one run may log. What exceeds it is refused with an explanation, in the script and outside."""

    model_config = SettingsConfigDict(env_prefix="ALVEARY_", env_ignore_empty=True, extra="ignore")

    # Names of metrics of a run, in all of its attempts.
    metric_names: int = Field(default=10_000, ge=1)
    # Points of a run, of all names and attempts together.
    metric_points: int = Field(default=20_000_000, ge=1)


class CoreSettings(BaseSettings):
    """Common to all services. Secrets are SecretStr, so printed settings show none."""

    model_config = SettingsConfigDict(env_prefix="ALVEARY_", env_ignore_empty=True, extra="ignore")

    # PEM file of certificate authorities that are trusted beside the public ones, for the message bus and the object store.
    ca: Path | None = None
    # nats://, or tls:// where the server takes TLS from the first byte.
    nats_url: str = "nats://127.0.0.1:4222"
    # The service's own user; its permissions are in alveary_core/access.py.
    nats_user: str = ""
    # Password of that user.
    nats_password: SecretStr = SecretStr("")
    # host:port of the object store's S3 API.
    s3_endpoint: str = "127.0.0.1:9000"
    # Whether that endpoint speaks TLS.
    s3_secure: bool = False
    # The service's own key; what it opens is in alveary_core/access.py.
    s3_access_key: SecretStr = SecretStr("")
    # Secret of that key.
    s3_secret_key: SecretStr = SecretStr("")
    # host:port at which clients reach the object store, for presigned URLs; empty: s3_endpoint.
    s3_public_endpoint: str = ""
    # Whether that endpoint speaks TLS.
    s3_public_secure: bool = False
    # False where the object store is set up beforehand, and a service's key may not create buckets.
    create_buckets: bool = True
    # Signs and verifies tokens; the same for all services.
    token_secret: SecretStr = SecretStr("")
    # host:port of the gRPC server; port 0: any free one.
    listen: str = "127.0.0.1:0"
    # Port of the Prometheus metrics; 0: none.
    metrics_port: int = 0
    # Folder of read models and temporary files.
    state_dir: Path = Path(".alveary")
    # debug, info, warning or error.
    log_level: str = "info"
    # Bytes that are kept free on a disk; the smaller of this and the fraction counts. With less, a node takes no new runs and a
    # service no new uploads; with less than half, the run that fills the disk is ended. 0: nothing is kept free.
    disk_reserve_bytes: int = Field(default=2**30, ge=0)
    # The same as a fraction of the disk.
    disk_reserve_fraction: float = Field(default=0.05, ge=0.0, le=0.5)
    # Seconds: how long a node may be silent before it is lost, and how long a trainer goes on without an answer.
    lease_seconds: float = Field(default=30.0, ge=1.0)
    # Seconds between two heartbeats of a node.
    beat_seconds: float = Field(default=1.0, gt=0.0)
    # Seconds after the end of a run when its events are replaced by one.
    compact_after_seconds: float = Field(default=7 * 86400.0, ge=0.0)
    # Seconds between two looks for such runs.
    compact_interval_seconds: float = Field(default=600.0, gt=0.0)
