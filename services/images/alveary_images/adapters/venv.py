"""The venv builder: its image is a lock, that is pins with hashes, and the wheels built from source."""

from __future__ import annotations

import platform
from pathlib import Path

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.objectstore import ObjectStore
from alveary_images.adapters import horovod
from alveary_images.adapters.builder import Build, Lock, Say
from alveary_images.adapters.resolve import BuildFailed, resolve

# Fields that ask for a container.
_CONTAINER = ("conda_packages", "apt_packages", "base_image", "dockerfile", "image")


class VenvBuilder:
    """Resolves; the nodes install."""

    kind = "venv"

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def build(self, environment: c.Environment, which: Build, say: Say) -> Lock:
        """See Builder."""
        asked = [name for name in _CONTAINER if getattr(environment, name)]
        if asked:
            raise BuildFailed(
                f"{', '.join(asked)} need container images, and this platform makes virtual environments: "
                "start it with `alveary up --runtime docker` or with docker compose, or leave them out"
            )
        if environment.user_managed:
            await say(f"user managed: nothing is built, {environment.interpreter or 'the node’s own python'} is used")
            return Lock(which.digest, self.kind, environment.python_version)

        async def special(work: Path, requirements: str, python: str) -> dict[str, str] | None:
            base = " ".join([*platform.libc_ver(), platform.machine()])
            return await horovod.wheel(work, requirements, python, base, self._store, say, horovod.on_this_machine)

        found = await resolve(environment, which.workspace, self._store, say, special)
        return Lock(which.digest, self.kind, found.python_version, found.requirements, found.wheels, found.packages)

    async def remove(self, image: str) -> None:
        """A lock takes no room worth speaking of."""
