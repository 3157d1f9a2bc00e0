"""What machines that join are told, and who may."""

from __future__ import annotations

from typing import Any

import pytest

from alveary_core import auth
from alveary_core.errors import FailedPrecondition, PermissionDenied
from alveary_scheduler.joining import Joining
from alveary_scheduler.settings import SchedulerSettings

TRAINER = {"ALVEARY_NATS_PASSWORD": "n", "ALVEARY_REGISTRY": "127.0.0.1:5000", "ALVEARY_TOKEN_SECRET": "never", "HOME": "/root"}


def joining(**more: Any) -> Joining:
    known: dict[str, Any] = {"join_endpoint": "hive:1", "join_nats_url": "tls://hive:2", "join_s3_endpoint": "hive:1"} | more
    return Joining(SchedulerSettings(token_secret="x" * 32, **known), TRAINER)  # type: ignore[arg-type]


def test_a_trainer_is_told_what_it_needs_and_no_more() -> None:
    told = joining(join_tls=True, join_image_registry="hive:1").environment("w", "far")
    assert told["ALVEARY_ENDPOINT_TLS"] == "true" and told["ALVEARY_REGISTRY_AT"] == "hive:1" and told["ALVEARY_TARGET"] == "far"
    assert told["ALVEARY_NATS_PASSWORD"] == "n" and told["ALVEARY_REGISTRY"] == "127.0.0.1:5000"
    assert not {"ALVEARY_TOKEN_SECRET", "HOME"} & set(told)


def test_a_join_token_names_its_target_and_other_tokens_none() -> None:
    one = joining()
    assert one.target(auth.verify("x" * 32, one.token("w", "far", 60))) == "far"
    with pytest.raises(PermissionDenied, match="no join token"):
        one.target(auth.Principal("owner", "w", "owner"))


def test_where_nodes_of_ray_could_not_join_they_are_refused() -> None:
    joining().require_ray()
    with pytest.raises(FailedPrecondition, match="does not say where"):
        joining(join_endpoint="").require_ray()
    with pytest.raises(FailedPrecondition, match="do not speak TLS"):
        joining(join_tls=True).require_ray()
