"""Fixtures of tests that need a docker daemon. tests/docker.sh provides one; without it they fail, they never skip."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bcrypt
import docker
import pytest
import urllib3
from support import Embedded, embedded

from alveary.local.layout import Ports
from alveary.workspace import Workspace


@pytest.fixture(scope="session")
def daemon() -> Iterator[docker.APIClient]:
    """The daemon that DOCKER_HOST names."""
    api = docker.APIClient(timeout=60, **docker.utils.kwargs_from_env())
    api.ping()
    yield api
    api.close()


@dataclass
class Registry:
    """A registry that asks for a password."""

    host: str
    user: str
    password: str


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """CNCF distribution, as Debian packages it."""
    folder = tmp_path_factory.mktemp("registry")
    port = Ports.choose(0).grpc
    hashed = bcrypt.hashpw(b"quite-secret", bcrypt.gensalt(4)).decode()
    (folder / "htpasswd").write_text(f"alveary:{hashed}\n")
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n  delete:\n    enabled: true\n"
        f"http:\n  addr: 127.0.0.1:{port}\nauth:\n  htpasswd:\n    realm: test\n    path: {folder}/htpasswd\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                if urllib3.request("GET", f"http://127.0.0.1:{port}/v2/", retries=False, timeout=1.0).status == 401:
                    break
            except urllib3.exceptions.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
        yield Registry(f"127.0.0.1:{port}", "alveary", "quite-secret")
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def containers(tmp_path_factory: pytest.TempPathFactory, registry: Registry, daemon: docker.APIClient) -> Iterator[Embedded]:
    """An embedded stack that builds images, pushes them to the registry, and runs containers."""
    settings = {
        "ALVEARY_REGISTRY": registry.host, "ALVEARY_REGISTRY_USER": registry.user, "ALVEARY_REGISTRY_PASSWORD": registry.password,
    }  # fmt: skip
    os.environ.update(settings)
    try:
        with embedded(tmp_path_factory.mktemp("containers"), runtime="docker") as stack:
            yield stack
    finally:
        for name in settings:
            del os.environ[name]


@pytest.fixture(scope="session")
def workspace(containers: Embedded) -> Workspace:
    """Its workspace."""
    return containers.workspace()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder
