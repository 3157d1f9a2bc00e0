"""What machines need to become nodes: join tokens, and what is handed to those who have one."""

from __future__ import annotations

from collections.abc import Mapping

from alveary_core import auth
from alveary_core.auth import Principal
from alveary_core.errors import FailedPrecondition, PermissionDenied
from alveary_scheduler.settings import SchedulerSettings

DAY, YEAR = 86400.0, 366 * 86400.0
_SUBJECT = "join/"
# What trainers of this machine have that those of others need as well.
_SHARED = (
    "ALVEARY_NATS_USER", "ALVEARY_NATS_PASSWORD", "ALVEARY_S3_ACCESS_KEY", "ALVEARY_S3_SECRET_KEY", "ALVEARY_LEASE_SECONDS",
    "ALVEARY_BEAT_SECONDS", "ALVEARY_RUNTIME", "ALVEARY_REGISTRY", "ALVEARY_REGISTRY_USER", "ALVEARY_REGISTRY_PASSWORD",
)  # fmt: skip


class Joining:
    """Issues join tokens, and takes them."""

    def __init__(self, settings: SchedulerSettings, trainers: Mapping[str, str]) -> None:
        self._settings, self._trainers = settings, trainers

    @property
    def endpoint(self) -> str:
        """Where machines reach the platform.

        Raises:
            FailedPrecondition: this platform was not told where it is.
        """
        s = self._settings
        if not (s.join_endpoint and s.join_nats_url and s.join_s3_endpoint):
            raise FailedPrecondition(
                "this platform does not say where others reach it: set ALVEARY_JOIN_ENDPOINT, ALVEARY_JOIN_NATS_URL and "
                "ALVEARY_JOIN_S3_ENDPOINT of the scheduler, and its ALVEARY_TRAINER_* (docs/compose.md)", "platform/join",
            )  # fmt: skip
        return s.join_endpoint

    def require_ray(self) -> None:
        """Make sure that nodes of Ray clusters, which are told an endpoint and a token alone, could join.

        Raises:
            FailedPrecondition: they could not; see also `endpoint`.
        """
        if self.endpoint and self._settings.join_tls:
            raise FailedPrecondition(
                "nodes of a Ray cluster do not speak TLS to the platform, and this one is reached with nothing else: use targets of "
                "kind 'nodes' (`alveary node token`)", "platform/join",
            )  # fmt: skip

    def admit(self, workspace: str, target: str) -> tuple[str, str]:
        """(endpoint, join token) for a machine that joins a target soon.

        Raises:
            FailedPrecondition: see `endpoint`.
        """
        return self.endpoint, self.token(workspace, target, DAY)

    def token(self, workspace: str, target: str, seconds: float) -> str:
        """A token that makes nodes of `target`."""
        secret = self._settings.token_secret.get_secret_value()
        return auth.issue(secret, Principal(f"{_SUBJECT}{target}", workspace, "joiner"), seconds)

    def target(self, who: Principal) -> str:
        """The target that the holder of a token may join.

        Raises:
            PermissionDenied: it is no join token.
        """
        if not who.subject.startswith(_SUBJECT):
            raise PermissionDenied(f"the token of {who.subject} is no join token: `alveary node token TARGET` makes one")
        return who.subject.removeprefix(_SUBJECT)

    def environment(self, workspace: str, target: str) -> dict[str, str]:
        """ALVEARY_* variables of a trainer elsewhere."""
        s = self._settings
        token = auth.issue(s.token_secret.get_secret_value(), Principal("node", workspace, "writer"))
        return {name: self._trainers[name] for name in _SHARED if name in self._trainers} | {
            "ALVEARY_WORKSPACE": workspace, "ALVEARY_TARGET": target, "ALVEARY_NODE_TOKEN": token,
            "ALVEARY_ENDPOINT": s.join_runs_endpoint or self.endpoint, "ALVEARY_REGISTRY_ENDPOINT": s.join_registry_endpoint or self.endpoint,
            "ALVEARY_NATS_URL": s.join_nats_url, "ALVEARY_S3_ENDPOINT": s.join_s3_endpoint,
            "ALVEARY_S3_SECURE": str(s.join_s3_secure).lower(), "ALVEARY_ENDPOINT_TLS": str(s.join_tls).lower(),
            "ALVEARY_REGISTRY_AT": s.join_image_registry,
        }  # fmt: skip
