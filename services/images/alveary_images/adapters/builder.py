"""The port of builders: an environment becomes something that a trainer can stage."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Protocol

from alveary_contracts.common.v1 import common_pb2 as c

Say = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Lock:
    """What a build leaves in the object store under `digests.lock_key`; trainers read it."""

    digest: str
    builder: str
    python_version: str = ""
    requirements: str = ""
    wheels: list[dict[str, str]] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    # Of a container image: its reference by content digest, its python, its bytes.
    image: str = ""
    python: str = ""
    size: int = 0

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps(asdict(self), sort_keys=True).encode()


@dataclass(frozen=True)
class Build:
    """Which image a build is for, and a `name` that no other build has.

    The name is in the image, so that no two builds make the same content: removing one never takes another's.
    """

    workspace: str
    digest: str
    name: str


class Builder(Protocol):
    """Cancel the task that builds to stop it: nothing of it survives."""

    kind: str

    async def build(self, environment: c.Environment, which: Build, say: Say) -> Lock:
        """Build an environment; `say` takes the lines of the prepare log.

        Raises:
            BuildFailed: with the words of the tool that failed.
        """
        ...

    async def remove(self, image: str) -> None:
        """Give back what a lock's `image` takes, wherever this builder put it."""
        ...
