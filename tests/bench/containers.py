"""Figures of images and containers: needs a docker daemon. `make bench-containers` prints the table."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import embedded, finished, submit

from alveary import Environment
from alveary.local.layout import Ports

ROUNDS = 7


def main() -> None:
    """Build from nothing, build again, run, against docker run itself."""
    rows: list[tuple[str, float]] = []
    folder = Path(tempfile.mkdtemp(prefix="alveary-bench-"))
    source = folder / "source"
    source.mkdir()
    packages = ["six", "numpy", "requests"]
    with embedded(folder / "stack", runtime="docker") as stack:
        workspace = stack.workspace()

        def prepared(environment: Environment) -> float:
            started = time.monotonic()
            run = submit(workspace, source, "print()", environment=environment)
            finished(run)
            return time.monotonic() - started

        environment = Environment("bench", packages, rebuild_key=os.urandom(4).hex())
        rows.append(("run with an image built from nothing (six, numpy, requests)", prepared(environment)))
        rows.append(("the same environment again", prepared(environment)))
        name = Environment("bench", [*packages], rebuild_key=os.urandom(4).hex())
        rows.append(("the same packages, asked to be resolved anew: layers from the daemon's cache", prepared(name)))
        starts, whole = [], []
        for _ in range(ROUNDS):
            began = time.monotonic()
            run = submit(workspace, source, "import time; print(time.time(), flush=True)", environment=environment)
            finished(run)
            whole.append(time.monotonic() - began)
            placed = next(e for e in workspace.events.subscribe("run.starting", from_sequence=1, timeout=1) if e.subject == run.id)
            first = workspace._call(_first(run))
            starts.append(float(first) - placed.time.timestamp())
        rows.append(("placed to first line of the script, median", statistics.median(starts)))
        rows.append(("submit to Completed, a script that prints, median", statistics.median(whole)))
    times = []
    image = "python:3.11-slim-bookworm"
    for _ in range(ROUNDS):
        began = time.time()
        out = subprocess.run(
            ["docker", "run", "--rm", "--network", "bridge", image, "python3", "-c", "import time; print(time.time(), flush=True)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        times.append(float(out.stdout) - began)
    rows.append(("docker run to first line of the script, median", statistics.median(times)))
    rows.append(("a second node: image and base pulled from the registry, run to its end", second_node(folder, source, packages)))
    width = max(len(name) for name, _ in rows)
    for what, value in rows:
        print(f"{what:<{width}}  {value:7.2f} s")
    print(f"{'overhead of a run against docker run':<{width}}  {statistics.median(starts) - statistics.median(times):7.2f} s")


def second_node(folder: Path, source: Path, packages: list[str]) -> float:
    """Seconds from submit to the end where the registry has the image, and the node nothing of it."""
    base = "python:3.11-slim-bookworm"
    port = Ports.choose(0).grpc
    (folder / "registry.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    )
    with (folder / "registry.log").open("wb") as log:
        registry = subprocess.Popen(["docker-registry", "serve", str(folder / "registry.yml")], stdout=log, stderr=log)
    os.environ["ALVEARY_REGISTRY"] = f"127.0.0.1:{port}"
    try:
        with embedded(folder / "second", runtime="docker") as stack:
            environment = Environment("second", packages, rebuild_key=os.urandom(4).hex())
            finished(submit(stack.workspace(), source, "print()", environment=environment))
            subprocess.run(["docker", "save", "-o", str(folder / "base.tar"), base], check=True)
            ids = subprocess.run(["docker", "images", "-aq"], capture_output=True, text=True, check=True).stdout.split()
            subprocess.run(["docker", "rmi", "-f", *ids], capture_output=True)
            began = time.monotonic()
            finished(submit(stack.workspace(), source, "print()", environment=environment))
            took = time.monotonic() - began
            subprocess.run(["docker", "load", "-q", "-i", str(folder / "base.tar")], check=True, capture_output=True)
            return took
    finally:
        registry.terminate()
        registry.wait(30)


async def _first(run: object) -> str:
    client = run._workspace._client  # type: ignore[attr-defined]
    page = await client.logs.read(run.id, limit=1, streams=["stdout"])  # type: ignore[attr-defined]
    line: bytes = page.lines[0].line.data
    return line.decode()


if __name__ == "__main__":
    main()
