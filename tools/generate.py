"""Generate libs/contracts and docs/asyncapi.yaml from protos/. `--check` fails when what is committed is stale."""

from __future__ import annotations

import filecmp
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


def generate(target: Path) -> None:
    """Write the generated packages under `target`."""
    bin_dir = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as scratch:
        protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
        subprocess.run(
            [
                sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"),
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
