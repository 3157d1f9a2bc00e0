"""Where the platform is: config.json. Standard library alone."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from alveary.errors import AlvearyError, NoPlatform


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
    """$ALVEARY_HOME, or ~/.alveary.

    Raises:
        AlvearyError: there is no home directory.
    """
    given = os.environ.get("ALVEARY_HOME")
    try:
        return Path(given) if given else Path.home() / ".alveary"
    except RuntimeError as error:
        raise AlvearyError(
            f"there is no home directory ({error}): set HOME, or ALVEARY_HOME to where the platform is to keep its files",
            "FAILED_PRECONDITION",
        ) from error


def find(path: str | os.PathLike[str] | None = None) -> Path:
    """The config: the given file or folder; else $ALVEARY_CONFIG; else config.json or .alveary/config.json here or in a
    folder above; else the one that `alveary up` wrote.

    A config.json here or above that is another program's is passed over: ours is an object with an "endpoint".

    Raises:
        AlvearyError: there is none.
    """
    given = path or os.environ.get("ALVEARY_CONFIG")
    if given:
        file = Path(given)
        file = file / "config.json" if file.is_dir() else file
        if not file.exists():
            of = "" if path else " (from $ALVEARY_CONFIG)"
            raise NoPlatform(f"there is no config at {file}{of}: start a platform with `alveary up`, which writes one", "NOT_FOUND")
        return file
    here = Path.cwd()
    for folder in (here, *here.parents):
        for file in (folder / "config.json", folder / ".alveary" / "config.json"):
            if _is_ours(file):
                return file
    file = default_state_dir() / "config.json"
    if file.exists():
        return file
    raise NoPlatform(
        f"no config.json in {here} or above, and none at {file}: start a platform with `alveary up`, which writes one", "NOT_FOUND"
    )


def _is_ours(file: Path) -> bool:
    """Whether a file may be a config of ours: many programs have a config.json. A damaged one of ours is: it is to be named."""
    try:
        return b'"endpoint"' in file.read_bytes()
    except OSError:  # not there, a folder, or not for us to read
        return False


_ENDPOINT = re.compile(r"(?!https?:)[^\s/]+:\d{1,5}|unix:\S+")
# A file that is larger is no config.
_MAX_CONFIG_BYTES = 1 << 20


def holds_token(file: Path) -> bool:
    """Whether a file is a config of ours, under whatever name, with the token that it needs."""
    try:
        data = json.loads(file.read_bytes()) if file.suffix == ".json" and file.stat().st_size <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError):
        return False
    if not isinstance(data, dict):
        return False
    endpoint = data.get("endpoint")
    return isinstance(endpoint, str) and bool(_ENDPOINT.fullmatch(endpoint)) and bool(data.get("token"))


def holds_secrets(folder: Path) -> bool:
    """Whether a folder is the state directory of a platform: `alveary up` writes its secrets into stack.json there."""
    file = folder / "stack.json"
    try:
        data = json.loads(file.read_bytes()) if file.is_file() and file.stat().st_size <= _MAX_CONFIG_BYTES else None
    except (OSError, ValueError):
        return False
    secrets = data.get("secrets") if isinstance(data, dict) and "ports" in data else None
    return isinstance(secrets, dict) and "tokens" in secrets


_TYPES = {"endpoint": str, "token": str, "workspace": str, "endpoints": dict, "allow_cpu_fallback": bool, "tls": bool, "ca": str}


def load(path: str | os.PathLike[str] | None = None) -> Config:
    """Read a config.

    Raises:
        AlvearyError: there is none, or it cannot be read; the text names the file and what is wrong with it.
    """
    file = find(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise _bad(file, f"line {error.lineno}, column {error.colno} is not JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(file, getattr(error, "strerror", None) or "it is not text in UTF-8") from error
    if not isinstance(data, dict):
        raise _bad(file, "it is not a JSON object")
    missing = [name for name in ("endpoint", "token") if not data.get(name)]
    if missing:
        raise _bad(file, f"it has no {' and no '.join(missing)}")
    for name, kind in _TYPES.items():
        if name in data and not isinstance(data[name], kind):
            raise _bad(file, f"{name} is {json.dumps(data[name])[:80]}, where {_NAMES[kind]} is expected")
    for name, at in {"endpoint": data["endpoint"], **data.get("endpoints", {})}.items():
        if not isinstance(at, str) or not _ENDPOINT.fullmatch(at):
            raise _bad(file, f"the endpoint {at!r} of {name} is not HOST:PORT (without http://)")
    if not (data["token"].isascii() and data["token"].isprintable()) or " " in data["token"]:
        raise _bad(file, "its token holds characters that no token has (a line break or blank, perhaps)")
    if data.get("ca") and "BEGIN CERTIFICATE" not in data["ca"]:
        raise _bad(file, "ca is no certificate in PEM: the text of the file is expected, not its name")
    known = {k: v for k, v in data.items() if k in Config.__dataclass_fields__}
    return Config(**known | {"source": str(file)})


_NAMES = {str: "text", dict: "an object", bool: "true or false"}


def _bad(file: Path, what: str) -> AlvearyError:
    return AlvearyError(
        f"{file} cannot be used: {what}. `alveary up` writes a config.json; ALVEARY_CONFIG names another file", "INVALID_ARGUMENT"
    )
