"""A connection to one workspace, for synchronous callers: what Workspace and everything in it have in common."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from alveary import _loop, config
from alveary.aio import Client

T = TypeVar("T")


class Session:
    """A connection to a platform, in one workspace. Users make a Workspace, which is one."""

    def __init__(self, settings: config.Config) -> None:
        self._config = settings

        async def make() -> Client:
            return Client(settings)

        self._client = _loop.run(make())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine of the client, waited for.

        Raises:
            AlvearyError: what the coroutine raises; or this process was forked from one that uses the platform.
        """
        return _loop.run(work)

    def get_run(self, run_id: str) -> Any:
        """A run by its id, or by a unique prefix of it. Workspace has it, and knows the class."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The workspace's name."""
        return self._config.workspace

    def get_details(self) -> dict[str, str]:
        """Name, version of the platform, and who the caller is."""
        from alveary_contracts.runs.v1 import runs_pb2

        stub = self._client.stubs.workspaces
        found = self._call(self._client.call(stub.GetWorkspace, runs_pb2.GetWorkspaceRequest()))
        return {"name": found.name, "version": found.version, "subject": found.subject, "role": found.role}

    def write_config(self, path: str | None = None, file_name: str = "config.json") -> str:
        """Write .alveary/config.json below `path` (mode 0600: it holds a token); returns the file."""
        folder = Path(path or ".") / ".alveary"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / file_name
        text = config.find(self._config.source).read_text()
        file.touch(mode=0o600)
        file.chmod(0o600)
        file.write_text(text)
        return str(file)
