"""Where the platform is: config.json. Standard library alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from alveary.errors import AlvearyError


@dataclass(frozen=True)
class Config:
    """What a client needs to know."""

    endpoint: str
    token: str = field(repr=False)
    workspace: str = "default"
    # Services that are elsewhere than at `endpoint`.
    endpoints: dict[str, str] = field(default_factory=dict)
    # use_gpu on a target without GPUs runs on CPUs, with a warning, instead of being refused.
    allow_cpu_fallback: bool = False
    # Encrypted; `ca` is the PEM of the authority that signed the platform's certificate, empty: the system's.
    tls: bool = False
    ca: str = ""
    nats_url: str = ""
    nats_user: str = ""
    nats_password: str = field(default="", repr=False)
    source: str = "arguments"


def default_state_dir() -> Path:
    """$ALVEARY_HOME, or ~/.alveary."""
    return Path(os.environ.get("ALVEARY_HOME") or Path.home() / ".alveary")


def find(path: str | os.PathLike[str] | None = None) -> Path:
    """The config: the given file or folder; else $ALVEARY_CONFIG; else config.json or .alveary/config.json here or in a
    folder above; else the one that `alveary up` wrote.

    Raises:
        AlvearyError: there is none.
    """
    given = path or os.environ.get("ALVEARY_CONFIG")
    if given:
        file = Path(given)
        file = file / "config.json" if file.is_dir() else file
        if not file.exists():
            raise AlvearyError(f"there is no config at {file}: start a platform with `alveary up`, which writes one", "NOT_FOUND")
        return file
    here = Path.cwd()
    for folder in (here, *here.parents):
        for file in (folder / "config.json", folder / ".alveary" / "config.json"):
            if file.exists() and "endpoint" in file.read_text():
                return file
    file = default_state_dir() / "config.json"
    if file.exists():
        return file
    raise AlvearyError(
        f"no config.json in {here} or above, and none at {file}: start a platform with `alveary up`, which writes one", "NOT_FOUND"
    )


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read a config.

    Raises:
        AlvearyError: there is none, or it cannot be read.
    """
    file = find(path)
    try:
        data = json.loads(file.read_text())
        known = {k: v for k, v in data.items() if k in Config.__dataclass_fields__}
        return Config(**known | {"source": str(file)})
    except (ValueError, TypeError) as error:
        raise AlvearyError(f"{file} is no config of this platform: {error}", "INVALID_ARGUMENT") from error
