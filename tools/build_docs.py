"""Build the docs site: `make docs`. With `--reference-only`, write the generated reference pages and stop.

The site generator lives in an environment of its own (.venv-docs), so that nothing of it reaches the platform's. The site works
without a network: diagrams become SVG while it is built (mermaid_fence.py).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from reference import cli, protos, sdk, settings

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs/reference"
SITE = ROOT / "site"
ENVIRONMENT = ROOT / ".venv-docs"
REQUIREMENTS = ROOT / "requirements-docs.txt"
UV = [sys.executable, str(ROOT / "libs/core/alveary_core/uv.py")]
PAGES: Mapping[str, Callable[[], str]] = {
    "sdk.md": sdk.render,
    "cli.md": cli.render,
    "settings.md": settings.render,
    "events.md": protos.render_events,
    "grpc.md": protos.render_grpc,
}


def write_reference(folder: Path = REFERENCE) -> None:
    """Write the generated pages into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, render in PAGES.items():
        (folder / name).write_text(render())


def environment() -> Path:
    """The Python of the docs environment; makes it where it is missing or outdated.

    Raises:
        SystemExit: it cannot be installed; uv's own message is above.
    """
    stamp, wanted = ENVIRONMENT / "requirements", REQUIREMENTS.read_text()
    python = ENVIRONMENT / "bin/python"
    with Path(tempfile.gettempdir(), f"alveary-docs-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make docs` and `make lint` may run side by side
        if not stamp.exists() or stamp.read_text() != wanted or not python.exists():
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            install = [*UV, "pip", "install", "--quiet", "--python", str(python), "-r", str(REQUIREMENTS)]
            for command in ([*UV, "venv", "--quiet", "--python", sys.executable, str(ENVIRONMENT)], install):
                if subprocess.run(command).returncode:
                    sys.exit(f"the environment that builds the docs cannot be made in {ENVIRONMENT}")
            stamp.write_text(wanted)
    return python


def problems() -> list[str]:
    """What is wrong with the built site: files that a page would fetch from elsewhere, diagrams that are missing."""
    found = []
    for file in sorted(SITE.rglob("*.html")):
        text = file.read_text()
        found += [f"{file}: fetches {tag}" for tag in re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"https?://[^>]*>", text)]
        source = ROOT / "docs" / file.relative_to(SITE).with_suffix(".md")
        wanted = len(re.findall(r"^```mermaid$", source.read_text(), re.MULTILINE)) if source.exists() else 0
        if text.count('<svg id="diagram-') != wanted:
            found.append(f"{file}: not all of its {wanted} diagrams are drawn")
    return found


def main() -> int:
    """Build; returns the exit code."""
    write_reference()
    if "--reference-only" in sys.argv:
        return 0
    python = environment()
    # mermaid_fence.py is found in tools/.
    variables = os.environ | {"PYTHONPATH": str(ROOT / "tools")} | ({} if sys.stdout.isatty() else {"NO_COLOR": "1"})
    built = subprocess.run([str(python.with_name("zensical")), "build", "--clean", "--strict"], cwd=ROOT, env=variables)
    wrong = [] if built.returncode else problems()
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return built.returncode or bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
