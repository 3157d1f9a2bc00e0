"""Requirements become pins with hashes, and wheels of what has only a source."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import lock_digest, lock_key
from alveary_core import scratch
from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_core.uv import clean_environment, find_python, python_for, uv_binary, uv_environment

Say = Callable[[str], Awaitable[None]]
BUCKET = "images"
_PIN = re.compile(r"^([A-Za-z0-9_.-]+==[^\s;\\]+)", re.MULTILINE)
_REFERENCE = re.compile(r"^([A-Za-z0-9_.-]+) @ ([^\s;\\]+)", re.MULTILINE)
_SECRET_URL = re.compile(r"(https?://)[^/@\s]+@")


_folder: Path | None = None


def work_below(folder: Path) -> None:
    """Let builds work below `folder`, and remove what those of an earlier life left there."""
    global _folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _folder = folder


def workplace() -> contextlib.AbstractAsyncContextManager[Path]:
    """A folder for one build, which goes with it."""
    return scratch.folder("build-", _folder)


class BuildFailed(Exception):
    """The text is the resolver's own words."""


@dataclass(frozen=True)
class Resolved:
    """What a set of requirements came to."""

    python_version: str = ""
    # A requirements file with hashes.
    requirements: str = ""
    # Built here: {name, version, file, sha256}, stored as wheels/<sha256>.
    wheels: list[dict[str, str]] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    # Files on this machine's disk that the lock names; who installs elsewhere must take them along.
    local: list[str] = field(default_factory=list)
    # "conda:name=version=build".
    conda: list[str] = field(default_factory=list)


def python_of(environment: c.Environment) -> str:
    """The environment's Python version; default: the one that this service runs on."""
    return environment.python_version or f"{sys.version_info.major}.{sys.version_info.minor}"


def resolved_key(environment: c.Environment) -> str:
    """Object of the newest resolution of an environment, whatever its rebuild_key."""
    return f"resolved/{lock_digest(environment)}.json"


async def newest(environment: c.Environment, store: ObjectStore) -> Resolved:
    """The newest resolution of an environment, whatever its rebuild_key.

    Raises:
        BuildFailed: there is none.
    """
    try:
        return Resolved(**json.loads(await store.get(BUCKET, resolved_key(environment))))
    except NotFound as error:
        raise BuildFailed("locked was asked for, but this environment was never resolved here: build it once without locked") from error


# Makes the wheel of a package that needs more than its source: (work folder, lock, Python's version) -> what was built.
Special = Callable[[Path, str, str], Awaitable[dict[str, str] | None]]


async def resolve(
    environment: c.Environment, workspace: str, store: ObjectStore, say: Say, special: Special, python: str = "",
    conda: Sequence[str] = (),
) -> Resolved:  # fmt: skip
    """Resolve, and build what has no wheel; `conda` packages are remembered with it. Cancel the task to stop it.

    Raises:
        BuildFailed: a requirement cannot be met or a wheel cannot be built.
    """
    if environment.locked:
        known = await newest(environment, store)
        await say(f"locked: the {len(known.packages)} packages of the newest resolution")
        return known
    resolved = replace(await _resolve(environment, workspace, store, say, special, python or python_of(environment)), conda=list(conda))
    await store.put(BUCKET, resolved_key(environment), json.dumps(asdict(resolved), sort_keys=True).encode())
    return resolved


async def _resolve(environment: c.Environment, workspace: str, store: ObjectStore, say: Say, special: Special, python: str) -> Resolved:
    if not environment.pip_packages:
        return Resolved(python)
    async with workplace() as work:
        (work / "requirements.in").write_text("".join(f"{p}\n" for p in environment.pip_packages))
        pins = await _pins_of(workspace, environment.extends_digest, store)
        (work / "constraints.txt").write_text("".join(f"{p}\n" for p in pins))
        await say(f"resolving {len(environment.pip_packages)} requirements for Python {python}")
        compile_args = ["pip", "compile", "requirements.in", "--python-version", python, "--no-header", "--no-annotate"]
        if (interpreter := await find_python(python)) is not None:  # by itself uv would take one of another version
            compile_args += ["--python", interpreter]
        if pins:
            compile_args += ["--constraint", "constraints.txt"]
        await _uv([*compile_args, "--generate-hashes", "-o", "lock.txt"], work, say, show=False)
        await _uv([*compile_args, "--format", "pylock.toml", "-o", "pylock.toml"], work, say, show=False)
        requirements = (work / "lock.txt").read_text()
        await say(f"resolved {len(_PIN.findall(requirements)) + len(_REFERENCE.findall(requirements))} packages")
        own = await special(work, requirements, python)
        wheels = await _build_sources(work, python, store, say, {own["name"]} if own else set())
        wheels += [own] if own else []
        for wheel in wheels:
            requirements = _pinned(requirements, wheel)
        packages = sorted(_PIN.findall(requirements))
        await say(f"locked: {' '.join(packages)}")
        return Resolved(python, requirements, wheels, packages, local_files(work))


def local_files(work: Path) -> list[str]:
    pylock = tomllib.loads((work / "pylock.toml").read_text())
    urls = [wheel.get("url", "") for package in pylock.get("packages", []) for wheel in package.get("wheels", [])]
    paths = [wheel["path"] for package in pylock.get("packages", []) for wheel in package.get("wheels", []) if "path" in wheel]
    return sorted({unquote(u.removeprefix("file://")) for u in urls if u.startswith("file://")} | set(paths))


async def _pins_of(workspace: str, digest: str, store: ObjectStore) -> list[str]:
    if not digest:
        return []
    try:
        lock = json.loads(await store.get(BUCKET, lock_key(workspace, digest)))
    except NotFound as error:
        raise BuildFailed(f"the environment {digest[:12]} that this one extends was never built here") from error
    return [p for p in lock["packages"] if not p.startswith("conda:")]


async def _build_sources(work: Path, python: str, store: ObjectStore, say: Say, done: set[str]) -> list[dict[str, str]]:
    """Wheels of the locked packages that have none on an index, stored by content.

    These are packages published as source alone, and direct references (`name @ URL`): the node that installs the lock
    need not reach, or trust, what they point at.
    """
    pylock = tomllib.loads((work / "pylock.toml").read_text())
    references = dict(_REFERENCE.findall((work / "lock.txt").read_text()))
    built: list[dict[str, str]] = []
    for package in pylock.get("packages", []):
        name = package["name"]
        if name in done:
            continue
        direct = references.get(name)
        if direct is None and (package.get("wheels") or "sdist" not in package):
            continue
        wanted = ["--no-binary", name, f"{name}=={package['version']}"] if direct is None else [f"{name} @ {direct}"]
        await say(f"building a wheel of {name} {package.get('version', '')} from source")
        if not (work / "build-env").exists():
            await _uv(["venv", "--quiet", "--seed", "--python", await python_for(python, say), "build-env"], work, say)
        out = work / "wheels"
        pip = [str(work / "build-env/bin/python"), "-m", "pip", "wheel", "--no-deps", "-w", str(out)]
        await run_tool([*pip, *wanted], work, say, clean_environment())
        for wheel in out.glob("*.whl"):
            digest = await scratch.sha256_of(wheel)
            entry = await store.put_file(BUCKET, f"wheels/{digest}", wheel)
            built.append({"name": name, "version": wheel.name.split("-")[1], "file": wheel.name, "sha256": entry.sha256})
        await asyncio.to_thread(shutil.rmtree, out)
    return built


def _pinned(requirements: str, wheel: dict[str, str]) -> str:
    """The lock with a package's wheel in the place of its source."""
    pattern = re.compile(rf"^{re.escape(wheel['name'])}(?:==| @ )[^\n]+?(?: \\\n\s+--hash=\S+)*$", re.MULTILINE | re.IGNORECASE)
    # A marker stays with its pin.
    marker = re.search(rf"^{re.escape(wheel['name'])}[^;\n]+?( ; [^\\\n]+?)(?: \\)?$", requirements, re.MULTILINE | re.IGNORECASE)
    line = f"{wheel['name']}=={wheel['version']}{marker[1] if marker else ''} \\\n    --hash=sha256:{wheel['sha256']}"
    return pattern.sub(lambda _: line, requirements)


async def _uv(arguments: list[str], work: Path, say: Say, show: bool = True) -> None:
    # --quiet would hide the resolver's words on failure; `show` keeps the lock itself out of the log.
    await run_tool([uv_binary(), *arguments], work, say, uv_environment(), stdout=show)


async def run_tool(command: list[str], work: Path, say: Say, env: dict[str, str], stdout: bool = True, stdin: bytes = b"") -> None:
    """Run a tool of a build; its lines go to `say`. Nothing of it survives this call.

    Raises:
        BuildFailed: it ended with another code than 0; the text is its last lines.
    """
    # What a tool that is killed leaves in its temporary folder goes with `work`.
    process = await asyncio.create_subprocess_exec(
        *command, cwd=work, env=env | {"TMPDIR": str(work)}, stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL, start_new_session=True,
        stdout=asyncio.subprocess.PIPE if stdout else asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )  # fmt: skip
    lines: list[str] = []

    async def pump(stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (raw := await stream.readline()):
            line = _SECRET_URL.sub(r"\1", raw.decode(errors="replace").rstrip())
            lines.append(line)
            del lines[:-200]
            await say(line)

    try:
        if process.stdin is not None:
            process.stdin.write(stdin)
            await process.stdin.drain()
            process.stdin.close()
        await asyncio.gather(pump(process.stdout), pump(process.stderr))
        code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
    if code:
        raise BuildFailed("\n".join(lines[-40:]) or f"{Path(command[0]).name} ended with code {code}")
