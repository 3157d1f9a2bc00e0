"""Horovod, which has no wheels: built once against the torch of an environment, and kept by torch version.

Its newest release (0.28.1) asks for C++14, and torch's headers need C++17: the compiler is a wrapper that says so. With
Open MPI and gloo, without the other frameworks. Facts: docs of Horovod, "Install"; measured against torch 2.13.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from alveary_core import scratch
from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_core.uv import python_for, uv_binary, uv_environment
from alveary_images.adapters.builder import Say
from alveary_images.adapters.resolve import BUCKET, BuildFailed, run_tool

NAME = "horovod"
# Debian's packages: to build it, and to run what was built.
BUILD_PACKAGES = ("build-essential", "cmake", "libopenmpi-dev", "python3-dev")
RUN_PACKAGES = ("openmpi-bin",)
_BLOCK = re.compile(r"^horovod==(?P<version>[^\s;\\]+)[^\n]*(?:\n\s+--hash=\S+[^\n]*)*\n?", re.MULTILINE | re.IGNORECASE)
_TORCH = re.compile(r"^torch==(?P<version>[^\s;\\]+)", re.MULTILINE)

# Run in a folder with lock.txt; $UV and $PYTHON_VERSION are set, and uv's indexes. Leaves a wheel in $OUT.
SCRIPT = r"""set -eu
work=$PWD
"$UV" venv --quiet --seed --python "$PYTHON_VERSION" build-env
"$UV" pip install --quiet --python build-env/bin/python --no-deps --require-hashes -r lock.txt
"$UV" pip install --quiet --python build-env/bin/python "setuptools<81" wheel packaging
cat > cxx <<'END'
#!/bin/sh
for argument; do
    shift
    if [ "$argument" = "-std=c++14" ]; then argument=-std=c++17; fi
    set -- "$@" "$argument"
done
exec g++ "$@"
END
chmod +x cxx
export CXX="$work/cxx" HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 \
    HOROVOD_WITHOUT_MXNET=1 CMAKE_POLICY_VERSION_MINIMUM=3.5 MAKEFLAGS="-j$(nproc)" PATH="$work/build-env/bin:$PATH"
build-env/bin/python -m pip wheel --no-build-isolation --no-deps --no-binary horovod "horovod==$HOROVOD_VERSION" -w "$OUT"
"""

# (folder with lock.txt, Horovod's version, Python's version, say) -> the wheel.
Build = Callable[[Path, str, str, Say], Awaitable[Path]]


def asked(requirements: str) -> tuple[str, str] | None:
    """(version of Horovod, version of torch) in a lock; None: there is no Horovod in it.

    Raises:
        BuildFailed: there is no torch beside it.
    """
    found = _BLOCK.search(requirements)
    if found is None:
        return None
    torch = _TORCH.search(requirements)
    if torch is None:
        raise BuildFailed("horovod is built against torch: add torch to the packages")
    return found["version"], torch["version"]


def without(requirements: str) -> str:
    """The lock with all but Horovod."""
    return _BLOCK.sub("", requirements)


async def wheel(work: Path, requirements: str, python: str, base: str, store: ObjectStore, say: Say, build: Build) -> dict[str, str] | None:
    """The wheel for a lock, from the object store or built; None: the lock has no Horovod.

    `base` says what it was built on: a wheel fits the system that it was linked on.

    Raises:
        BuildFailed: the compiler's own words.
    """
    versions = asked(requirements)
    if versions is None:
        return None
    version, torch = versions
    key = f"horovod/{version}-torch-{torch}-python-{python}-{hashlib.sha256(base.encode()).hexdigest()[:12]}.json"
    try:
        known: dict[str, str] = json.loads(await store.get(BUCKET, key))
        if await store.size(BUCKET, f"wheels/{known['sha256']}") is not None:
            await say(f"horovod {version} for torch {torch} was built before")
            return known
    except NotFound:
        pass  # the first time
    await say(f"building horovod {version} against torch {torch}: this takes some minutes, once")
    folder = work / "horovod"
    folder.mkdir()
    (folder / "lock.txt").write_text(without(requirements))
    built = await build(folder, version, python, say)
    digest = await scratch.sha256_of(built)
    await store.put_file(BUCKET, f"wheels/{digest}", built)
    found = {"name": NAME, "version": built.name.split("-")[1], "file": built.name, "sha256": digest}
    await store.put(BUCKET, key, json.dumps(found, sort_keys=True).encode())
    return found


async def on_this_machine(folder: Path, version: str, python: str, say: Say) -> Path:
    """Build with this machine's compiler and Open MPI.

    Raises:
        BuildFailed: they are missing, or failed.
    """
    missing = [tool for tool in ("g++", "cmake", "mpicxx") if shutil.which(tool) is None]
    if missing:
        raise BuildFailed(
            f"horovod is built from source, and {', '.join(missing)} is not on the machine of the images service: "
            f"apt-get install {' '.join(BUILD_PACKAGES)}"
        )
    out = folder / "out"
    env = uv_environment() | {
        "UV": uv_binary(), "PYTHON_VERSION": await python_for(python, say), "HOROVOD_VERSION": version, "OUT": str(out), "HOME": os.environ.get("HOME", "/tmp"),
    }  # fmt: skip
    await run_tool(["sh", "-c", SCRIPT], folder, say, env)
    return the_wheel(out)


def the_wheel(out: Path) -> Path:
    """The one wheel of a folder.

    Raises:
        BuildFailed: there is none.
    """
    wheels = sorted(out.glob("*.whl"))
    if len(wheels) != 1:
        raise BuildFailed("horovod's build ended well and left no wheel")
    return wheels[0]
