"""What the command line costs, in seconds of CPU, beside others' (`make bench-cli`): they are installed in throw-away environments."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support import TORCH, embedded, submit

ROOT = Path(__file__).resolve().parents[2]
TIMES = 15
# Most that a command may cost on a quiet machine.
LIMITS = {"alveary --help": 0.10, "alveary run list": 0.20}
PEERS = {"mlflow": "mlflow", "dstack": "dstack"}


def cpu(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Median seconds of CPU, of user and system, of `TIMES` runs of a command that has run once."""
    seconds = []
    for _ in range(TIMES + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=dict(environment), check=True, stdout=subprocess.DEVNULL, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds[1:])


def peer(folder: Path, package: str) -> Path | None:
    """The program of a package in an environment of its own; None, and a line that says so, where it cannot be installed."""
    uv = [sys.executable, str(ROOT / "libs/core/alveary_core/uv.py")]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    done = subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", str(folder / "bin/python"), package], capture_output=True, text=True
    )
    if done.returncode:
        print(f"{package}: cannot be installed here: {(done.stderr.strip().splitlines() or ['uv said nothing'])[-1]}")
        return None
    return folder / "bin" / package


def main() -> int:
    """Measure, print, and return 1 where a command of ours costs more than its limit."""
    costs = {}
    with tempfile.TemporaryDirectory(prefix="alveary-bench-") as scratch:
        folder = Path(scratch)
        with embedded(folder / "stack") as stack:
            source = folder / "source"
            source.mkdir()
            for number in range(20):
                submit(stack.workspace(), source, "print('x')", environment=TORCH, display_name=f"run {number}").wait_for_completion()
            environment = os.environ | {"ALVEARY_CONFIG": str(stack.config)}
            program = str(Path(sys.executable).parent / "alveary")
            for words in (["--help"], ["run", "--help"], ["run", "list"]):
                costs[" ".join(["alveary", *words])] = cpu([program, *words], environment)
        for package, name in PEERS.items():
            found = peer(folder / name, package)
            if found is not None and shutil.which(str(found)):
                costs[f"{name} --help"] = cpu([str(found), "--help"], os.environ)
    costs["python -c pass"] = cpu([sys.executable, "-c", "pass"], os.environ)
    print(f"seconds of CPU, median of {TIMES}; load of the machine {os.getloadavg()[0]:.1f}")
    over = False
    for what, seconds in costs.items():
        limit = LIMITS.get(what)
        over |= limit is not None and seconds > limit
        print(f"  {what:<18} {seconds:.3f}" + (f"  (at most {limit:.2f})" if limit else ""))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
