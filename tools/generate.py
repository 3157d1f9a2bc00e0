"""Generate libs/contracts and docs/asyncapi.json from protos/. `--check` fails when what is committed is stale.

Generated code runs with the protobuf that generated it and every newer one, never with an older one: so protoc is the
oldest that the SDK works with, in an environment of its own (.venv-generate, made when it is missing or outdated), and
users of the SDK keep the protobuf that their other packages ask for.
"""

from __future__ import annotations

import fcntl
import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "libs/contracts/alveary_contracts"
# protoc writes imports after the proto path (alveary.runs.v1); `alveary` is the SDK's name, so they move.
IMPORT = re.compile(r"^(\s*)(from|import) alveary\.", re.MULTILINE)
USE = re.compile(r"\balveary\.(common|events|runs|images|scheduler|trainer|logs|registry)\.v1\.(\w+_pb2)")

ENVIRONMENT = ROOT / ".venv-generate"
UV = [sys.executable, str(ROOT / "libs/core/alveary_core/uv.py")]
# grpcio-tools 1.64.3 holds protoc 26.1, whose code runs with protobuf 5.26.1 and newer. setuptools: it imports pkg_resources.
REQUIREMENTS = ("grpcio-tools==1.64.3", "grpcio==1.64.3", "protobuf==5.26.1", "setuptools==80.10.2")
# The last Python that there are wheels of grpcio-tools 1.64.3 for.
NEWEST_PYTHON = (3, 12)


def protoc_python() -> Path:
    """The Python that has protoc; makes its environment where that is missing or outdated.

    Raises:
        SystemExit: they cannot be installed; uv's own message is above.
    """
    stamp = ENVIRONMENT / "requirements"
    wanted = "\n".join(REQUIREMENTS) + "\n"
    with Path(tempfile.gettempdir(), f"alveary-generate-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make generate` and `make lint` may run side by side
        if not stamp.exists() or stamp.read_text() != wanted or not (ENVIRONMENT / "bin/python").exists():
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            python = sys.executable if sys.version_info[:2] <= NEWEST_PYTHON else ".".join(map(str, NEWEST_PYTHON))
            install = [*UV, "pip", "install", "--quiet", "--python", str(ENVIRONMENT / "bin/python"), *REQUIREMENTS]
            for command in ([*UV, "venv", "--quiet", "--python", python, str(ENVIRONMENT)], install):
                if subprocess.run(command).returncode:
                    sys.exit(f"the environment that generates code cannot be made in {ENVIRONMENT} with Python {python}: {command[2:]}")
            stamp.write_text(wanted)
    return ENVIRONMENT / "bin/python"


def generate(target: Path) -> None:
    """Write the generated packages under `target`."""
    python = protoc_python()
    bin_dir = Path(sys.executable).parent  # the stubs are for mypy, and mypy's plugins are beside it
    with tempfile.TemporaryDirectory() as scratch:
        protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
        subprocess.run(
            [
                str(python), "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"),
                f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
                f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
                f"--python_out={scratch}", f"--grpc_python_out={scratch}",
                f"--mypy_out=quiet:{scratch}", f"--mypy_grpc_out=quiet:{scratch}", *protos,
            ],
            check=True,
        )  # fmt: skip
        for file in sorted(Path(scratch, "alveary").rglob("*")):
            if file.is_dir() or file.name.startswith("__"):
                continue
            grpc_file = "_pb2_grpc" in file.name
            text = file.read_text()
            if grpc_file and "Servicer" not in text:
                continue
            text = IMPORT.sub(r"\1\2 alveary_contracts.", text)
            if file.suffix == ".pyi":
                text = USE.sub(r"alveary_contracts.\1.v1.\2", text)
            out = target / file.relative_to(Path(scratch, "alveary"))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text)
            for folder in (out.parent, out.parent.parent):
                if folder != target:
                    (folder / "__init__.py").touch()


def main() -> int:
    """Generate, or with --check compare; returns the exit code."""
    sys.path.insert(0, str(ROOT / "tools"))
    check = "--check" in sys.argv
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "alveary_contracts")
        fresh.mkdir()
        generate(fresh)
        if not check:
            for room in PACKAGE.iterdir() if PACKAGE.exists() else []:
                if room.is_dir():
                    shutil.rmtree(room)
            shutil.copytree(fresh, PACKAGE, dirs_exist_ok=True)
        stale = [
            str(file.relative_to(fresh))
            for file in sorted(fresh.rglob("*"))
            if file.is_file()
            and not ((PACKAGE / file.relative_to(fresh)).exists() and filecmp.cmp(file, PACKAGE / file.relative_to(fresh), shallow=False))
        ]
        known = {f.relative_to(fresh) for f in fresh.rglob("*") if f.is_file()}
        stale += [
            f"{f.relative_to(PACKAGE)} (no longer generated)"
            for f in sorted(PACKAGE.rglob("*_pb2*"))
            if f.is_file() and f.relative_to(PACKAGE) not in known
        ]
    import asyncapi  # needs the generated code

    document = asyncapi.document()
    spec = ROOT / "docs/asyncapi.json"
    if not check:
        spec.parent.mkdir(exist_ok=True)
        spec.write_text(document)
    elif not spec.exists() or spec.read_text() != document:
        stale.append("docs/asyncapi.json")
    if stale:
        print("stale, run `make generate`:", *stale, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
