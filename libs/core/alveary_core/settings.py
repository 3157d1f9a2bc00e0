"""What a service is told from outside: environment variables ALVEARY_*, see each field."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class MetricLimits(BaseSettings):
    """How much one run may log: what is beyond is refused with a sentence, in the script and outside."""

    model_config = SettingsConfigDict(env_prefix="ALVEARY_", env_ignore_empty=True, extra="ignore")

    # Names, and points of all names together, all attempts included.
    metric_names: int = Field(default=10_000, ge=1)
    metric_points: int = Field(default=20_000_000, ge=1)


class CoreSettings(BaseSettings):
    """Common to all services. Secrets are SecretStr, so that printing settings shows none."""

    model_config = SettingsConfigDict(env_prefix="ALVEARY_", env_ignore_empty=True, extra="ignore")

    # PEM file of authorities that are believed beside the public ones, where the message bus or the object store speaks TLS.
    ca: Path | None = None
    # nats://, or tls:// where the server takes TLS from the first byte.
    nats_url: str = "nats://127.0.0.1:4222"
    nats_user: str = ""
    nats_password: SecretStr = SecretStr("")
    s3_endpoint: str = "127.0.0.1:9000"
    s3_secure: bool = False
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")
    # Host and port that clients reach the object store at, for presigned URLs; empty: s3_endpoint.
    s3_public_endpoint: str = ""
    s3_public_secure: bool = False
    # Off where the object store is set up beforehand, and a service's key may not create buckets.
    create_buckets: bool = True
    token_secret: SecretStr = SecretStr("")
    listen: str = "127.0.0.1:0"
    # Port of the Prometheus metrics; 0: none.
    metrics_port: int = 0
    state_dir: Path = Path(".alveary")
    log_level: str = "info"
    # What is kept free of a disk, the smaller of the two: with less, a node takes no new runs and a service no new uploads,
    # and with less than half of it the run that fills the disk is ended. 0: nothing.
    disk_reserve_bytes: int = Field(default=2**30, ge=0)
    disk_reserve_fraction: float = Field(default=0.05, ge=0.0, le=0.5)
    # How long a node may be silent before it is lost, and how long a trainer goes on unanswered, seconds.
    lease_seconds: float = Field(default=30.0, ge=1.0)
    beat_seconds: float = Field(default=1.0, gt=0.0)
    # When the events of a final run are replaced by one, seconds after its end; and how often that is looked at.
    compact_after_seconds: float = Field(default=7 * 86400.0, ge=0.0)
    compact_interval_seconds: float = Field(default=600.0, gt=0.0)
