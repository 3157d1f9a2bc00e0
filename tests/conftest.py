"""Fixtures. Every pytest-xdist worker has servers and a stack of its own."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import RUNTIME, Embedded, debian, embedded, servers

from alveary.local.layout import Layout
from alveary.workspace import Workspace
from alveary_core.eventlog import connect, ensure_streams


@pytest.fixture(scope="session")
def bare_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    """nats-server with the streams, and the object store."""

    async def prepared(layout: Layout) -> None:
        connection = await connect(f"nats://127.0.0.1:{layout.ports.nats}", "runs", layout.secrets["runs"], "tests")
        await ensure_streams(connection)
        await connection.close()

    with servers(tmp_path_factory.mktemp("servers")) as layout:
        asyncio.run(prepared(layout))
        yield layout


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    """An embedded stack that tests share; a test that breaks things starts one of its own."""
    with embedded(tmp_path_factory.mktemp("stack"), runtime=RUNTIME) as running:
        yield running


@pytest.fixture(scope="session")
def workspace(stack: Embedded) -> Workspace:
    """The shared stack's workspace."""
    return stack.workspace()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def mpirun() -> None:
    """Open MPI."""
    debian("openmpi-bin", lambda: shutil.which("mpirun") is not None)
