"""A daemon that prunes for somebody else must not fail a build that went well."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import docker.errors
import pytest
import requests

from alveary_images.adapters.docker_build import prune


def refusal(status: HTTPStatus) -> docker.errors.APIError:
    response = requests.Response()
    response.status_code = status
    return docker.errors.APIError("a prune operation is already running", response)


class Daemon:
    """Refuses as often as it is told."""

    def __init__(self, *refusals: HTTPStatus) -> None:
        self.refusals, self.calls = list(refusals), 0

    def prune_images(self, filters: dict[str, Any]) -> None:
        self.calls += 1
        if self.refusals:
            raise refusal(self.refusals.pop(0))


def test_a_busy_daemon_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon(HTTPStatus.CONFLICT, HTTPStatus.CONFLICT)
    prune(daemon, {}, (0, 0, 0))  # type: ignore[arg-type]
    assert daemon.calls == 3 and not capsys.readouterr().out


def test_one_that_stays_busy_is_left_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon(*[HTTPStatus.CONFLICT] * 9)
    prune(daemon, {}, (0, 0))  # type: ignore[arg-type]
    assert daemon.calls == 3 and "left to the next build" in capsys.readouterr().out


def test_any_other_refusal_is_an_error() -> None:
    with pytest.raises(docker.errors.APIError):
        prune(Daemon(HTTPStatus.INTERNAL_SERVER_ERROR), {})  # type: ignore[arg-type]
