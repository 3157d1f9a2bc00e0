"""uv with this machine's pip settings: index, extra indexes, find-links, constraints, certificates.

Runs as a script too (`python uv.py install ARGS...`), for the Makefile: so this module needs the standard library
alone.
"""

from __future__ import annotations

import asyncio
import configparser
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

# pip's option -> uv's variable (https://docs.astral.sh/uv/reference/environment/)
_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}


def pip_settings() -> dict[str, str]:
    """pip's own settings as it would read them: its files, later ones first to yield, then PIP_* variables."""
    files = [Path(d) / "pip/pip.conf" for d in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if d]
    files.append(Path("/etc/pip.conf"))
    given = os.environ.get("XDG_CONFIG_HOME")
    try:
        home = Path.home()
    except RuntimeError:  # a user without a name and without HOME has no files of its own
        files += [Path(given) / "pip/pip.conf"] if given else []
    else:
        files += [home / ".pip/pip.conf", Path(given or home / ".config") / "pip/pip.conf"]
    files.append(Path(sys.prefix) / "pip.conf")
    if os.environ.get("PIP_CONFIG_FILE"):
        files.append(Path(os.environ["PIP_CONFIG_FILE"]))
    found: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file)
        except (configparser.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: pip's settings cannot be read: {error}") from error
        for section in ("global", "install"):
            if parser.has_section(section):
                found.update({k: " ".join(v.split()) for k, v in parser.items(section) if k in _VARIABLES})
    for option in _VARIABLES:
        value = os.environ.get("PIP_" + option.upper().replace("-", "_"))
        if value:
            found[option] = " ".join(value.split())
    return found


def clean_environment() -> dict[str, str]:
    """This process's environment without what is Alveary's own: a package's build runs foreign code."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ALVEARY_")}


def uv_environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """Environment for a uv process. What UV_* says already wins over what pip says."""
    env = clean_environment() if base is None else dict(base)
    for option, value in pip_settings().items():
        # Of its lists uv separates this one by commas, the others by spaces as pip does.
        env.setdefault(_VARIABLES[option], value.replace(" ", ",") if option == "find-links" else value)
    # pip takes the best version of all indexes; uv would take the first index that knows the name.
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    return env


def uv_binary() -> str:
    """Path of uv: the one of this environment.

    Raises:
        FileNotFoundError: it is not installed.
    """
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise FileNotFoundError("uv is not installed: pip install uv")
    return found


async def find_python(version: str) -> str | None:
    """An interpreter of this machine for `version` ("3.12", "3.12.1"), as a path; None: there is none.

    uv by itself knows the interpreters on the PATH and its own. The one that the platform runs on may be neither: a pyenv,
    conda or own build that was started by its path. So that one serves its own version, and what uv finds the others.
    """
    if version in (".".join(map(str, sys.version_info[:parts])) for parts in (2, 3)):
        return sys.executable
    process = await asyncio.create_subprocess_exec(
        uv_binary(), "python", "find", "--system", "--no-python-downloads", version, env=uv_environment(),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            found, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return found.decode().strip() if process.returncode == 0 else None


async def python_for(version: str, say: Callable[[str], Awaitable[None]]) -> str:
    """What to give uv as `--python`: an interpreter of this machine, else `version` itself, which uv downloads; `say` is told so."""
    found = await find_python(version)
    if found is None:
        own = ".".join(map(str, sys.version_info[:3]))
        await say(f"Python {version} is not on this machine (the platform runs on {own}, and the PATH has none): it is downloaded")
    return found or version


if __name__ == "__main__":
    os.execve(uv_binary(), ["uv", *sys.argv[1:]], uv_environment())
