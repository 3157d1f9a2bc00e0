"""conda packages: solved and installed by rattler, into a folder that becomes /opt/conda of an image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import rattler
from rattler.exceptions import (
    FetchRepoDataError,
    GatewayError,
    InstallerError,
    InvalidChannelError,
    InvalidMatchSpecError,
    InvalidUrlError,
    SolverError,
)

from alveary_images.adapters.dockerfile import CONDA
from alveary_images.adapters.resolve import BuildFailed

SOLVE_SECONDS = 900.0
_PREFIX = "conda:"
_REFUSED = (SolverError, GatewayError, FetchRepoDataError, InstallerError, InvalidChannelError, InvalidMatchSpecError, InvalidUrlError)


async def install(
    specs: Sequence[str], channels: Sequence[str], prefix: Path, say: Callable[[str], Awaitable[None]], locked: Sequence[str] = ()
) -> list[str]:
    """Fill `prefix` so that it works as /opt/conda; returns what was installed, as "conda:name=version=build".

    `locked` is such a list of an earlier solve: then that very set is installed.

    Raises:
        BuildFailed: the solver's own words.
    """
    wanted = [exact(p.removeprefix(_PREFIX)) for p in locked if p.startswith(_PREFIX)] or list(specs)
    sources = [rattler.Channel(channel) for channel in channels or ["conda-forge"]]
    await say(f"solving {len(wanted)} conda packages from {', '.join(channels or ['conda-forge'])}")
    try:
        async with asyncio.timeout(SOLVE_SECONDS):
            records = await rattler.solve(
                sources, [rattler.MatchSpec(s) for s in wanted], platforms=["linux-64", "noarch"],
                virtual_packages=rattler.VirtualPackage.detect(),
            )  # fmt: skip
            await say(f"installing {len(records)} conda packages")
            # The files name the prefix that they will have in the image.
            await rattler.install(records, prefix, alternative_target_prefix=CONDA, show_progress=False)
    except _REFUSED as error:
        raise BuildFailed(f"conda: {error}") from error
    except TimeoutError as error:
        raise BuildFailed(f"conda: not solved within {SOLVE_SECONDS:g} s") from error
    return sorted(f"{_PREFIX}{r.name.normalized}={r.version}={r.build}" for r in records)


def exact(pin: str) -> str:
    """The match spec of "name=version=build"."""
    name, version, build = pin.split("=", 2)
    return f"{name} =={version} {build}"
