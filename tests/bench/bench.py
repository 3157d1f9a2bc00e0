"""Speed, medians, with the peers measured in the same run: `make bench`. Peers are installed in environments of their own."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
from support import Embedded, embedded, finished, submit, tail

from alveary.client.states import FINAL
from alveary_contracts.common.v1 import common_pb2 as c

ROWS: list[tuple[str, str, str, str]] = []


def row(what: str, ours: str, peer: str = "", verdict: str = "") -> None:
    """Remember a line of the table."""
    ROWS.append((what, ours, peer, verdict))
    print(f"{what}: {ours}  {peer}  {verdict}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def peer_environment(folder: Path, package: str) -> Path:
    """A virtual environment with a peer in it; the path of its python."""
    python = folder / "bin/python"
    if not python.exists():
        uv = Path("libs/core/alveary_core/uv.py")
        subprocess.run([sys.executable, str(uv), "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        subprocess.run([sys.executable, str(uv), "pip", "install", "--quiet", "--python", str(python), package], check=True)
    return python


RAY = """
import time, ray, statistics
from ray.job_submission import JobSubmissionClient, JobStatus
ray.init(include_dashboard=True, num_cpus=2, log_to_driver=False)
from ray._private.worker import global_worker
client = JobSubmissionClient("http://" + global_worker.node.address_info["webui_url"])
def one():
    t = time.monotonic(); job = client.submit_job(entrypoint="true")
    while client.get_job_status(job) == JobStatus.PENDING: time.sleep(0.005)
    return time.monotonic() - t
one()
print("submit", statistics.median(one() for _ in range(5)))
t = time.monotonic(); jobs = [client.submit_job(entrypoint="true") for _ in range(10)]
while any(not client.get_job_status(j).is_terminal() for j in jobs): time.sleep(0.02)
print("rate", 10 / (time.monotonic() - t))
"""
MLFLOW = """
import os, subprocess, sys, tempfile, time, socket, mlflow
with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
d = tempfile.mkdtemp()
server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri",
    f"sqlite:///{d}/m.db", "--default-artifact-root", d, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    mlflow.set_tracking_uri(f"http://127.0.0.1:{port}")
    for _ in range(300):
        try: socket.create_connection(("127.0.0.1", port), 1).close(); break
        except OSError: time.sleep(0.2)
    with mlflow.start_run():
        mlflow.log_metric("x", 1)
        t = time.monotonic()
        for i in range(200): mlflow.log_metric("x", i, step=i)
        print("metrics", 200 / (time.monotonic() - t))
finally:
    server.terminate(); server.wait(20)
"""


def peer(name: str, package: str, code: str) -> dict[str, float]:
    """Figures of a peer; empty, and said so, where it cannot be had."""
    folder = Path(os.environ.get("ALVEARY_BENCH_PEERS", Path(tempfile.gettempdir()) / "alveary-bench-peers")) / name
    try:
        python = peer_environment(folder, package)
        env = {k: v for k, v in os.environ.items() if not k.startswith("VIRTUAL_ENV")} | {"RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=300, env=env, cwd=folder)
        found = dict(
            line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in ("submit", "rate", "metrics")
        )
        if not found:
            print(f"{name} gave no figures: {done.stderr[-500:]}")
        return {k: float(v) for k, v in found.items()}
    except (subprocess.SubprocessError, OSError) as error:
        print(f"{name} cannot be measured: {error}")
        return {}


def against(ours: float, theirs: float | None, factor: float, *, less: bool) -> str:
    """Whether a target relative to a peer is met, and by how much."""
    if theirs is None:
        return "peer not measured"
    ratio = theirs / ours if less else ours / theirs
    return f"{ratio:.1f}x ({'met' if ratio >= factor else 'missed'}: {factor:g}x wanted)"


def main() -> None:
    """Measure and print."""
    ray = peer("ray", "ray[default]", RAY)
    mlflow = peer("mlflow", "mlflow", MLFLOW)
    with tempfile.TemporaryDirectory() as folder, embedded(Path(folder, "stack"), lease=30) as stack:
        measure(stack, Path(folder), ray, mlflow)
    table = Table("what", "Alveary", "peer", "ratio and target")
    for line in ROWS:
        table.add_row(*line)
    Console(width=150).print(table)


def measure(stack: Embedded, folder: Path, ray: dict[str, float], mlflow: dict[str, float]) -> None:
    """All figures of one stack."""
    workspace = stack.workspace()
    client = workspace._client
    source = folder / "source"
    source.mkdir()
    first = submit(workspace, source, "import time; open('outputs/t', 'w').write(str(time.time()))")
    finished(first)
    spec = c.RunSpec(
        snapshot=first.get_snapshot_id(), compute_target="local", environment=c.Environment(user_managed=True), entry_script="train.py"
    )

    async def start_latency() -> float:
        started = time.time()
        run = await client.runs.submit(spec, None)
        await client.runs.wait(run.id)
        (link,) = await client.runs.file_links(run.id, "outputs/t", with_urls=True)
        await client.transfers.download(link, folder / "t", overwrite=True)
        return float((folder / "t").read_text()) - started

    latencies = [workspace._call(start_latency()) for _ in range(15)]
    ours = statistics.median(latencies)
    text = f"{ray['submit']:.3f} s (Ray, to RUNNING)" if ray else ""
    row("submit to the script's first line", f"{ours * 1000:.0f} ms", text, against(ours, ray.get("submit"), 10, less=True))

    noop = c.RunSpec(snapshot=spec.snapshot, compute_target="local", environment=c.Environment(user_managed=True), command=["true"])

    async def many(count: int) -> float:
        started = time.monotonic()
        runs = [await client.runs.submit(noop, None) for _ in range(count)]
        for run in runs:
            assert (await client.runs.wait(run.id)).state in FINAL
        return count / (time.monotonic() - started)

    rate = workspace._call(many(100))
    row("no-op runs per second", f"{rate:.1f}", f"{ray['rate']:.1f} (Ray)" if ray else "", against(rate, ray.get("rate"), 10, less=False))
    run = submit(workspace, source, """
        import time
        from alveary import Run
        run = Run.get_context()
        started = time.monotonic()
        for i in range(100_000): run.log("x", i, step=i)
        run.flush()
        print(100_000 / (time.monotonic() - started))
        """)  # fmt: skip
    finished(run)
    logged = float(tail(run, streams=("stdout",))[0].line.data)
    row(
        "run.log per second, stored",
        f"{logged:.0f}",
        f"{mlflow['metrics']:.0f} (MLflow)" if mlflow else "",
        against(logged, mlflow.get("metrics"), 20, less=False),
    )
    run = submit(workspace, source, "import time\nfor _ in range(100): print(time.time(), flush=True); time.sleep(0.02)")
    delays = []

    async def follow() -> None:
        async for one in client.logs.tail(run.id, streams=("stdout",)):
            delays.append(time.time() - float(one.line.data))

    workspace._call(follow())
    late = statistics.median(delays)
    row("log line printed to received, p50", f"{late * 1000:.1f} ms", "", f"{'met' if late < 0.05 else 'missed'}: 50 ms wanted")
    uploads(stack, folder)
    resident = sum(psutil.Process(pid).memory_info().rss for name, pid in stack.pids().items() if name not in ("nats", "objects"))
    row(
        "resident memory of all services", f"{resident / 2**20:.0f} MB", "", f"{'met' if resident < 400 << 20 else 'missed'}: 400 MB wanted"
    )
    trainer = sum(psutil.Process(pid).memory_info().rss for pid in stack.trainer_pids())
    row("resident memory of the trainer", f"{trainer / 2**20:.0f} MB")


def uploads(stack: Embedded, folder: Path) -> None:
    """Our port against the bare SDK, a 256 MB file, taking turns."""
    import asyncio
    import json

    from minio import Minio

    from alveary_core.objectstore import ObjectStore

    known = json.loads((stack.state_dir / "stack.json").read_text())
    endpoint = f"127.0.0.1:{known['ports']['s3']}"
    keys = (known["secrets"]["s3_access"], known["secrets"]["s3_secret"])
    path = folder / "big"
    path.write_bytes(os.urandom(256 << 20))
    bare = Minio(endpoint, access_key=keys[0], secret_key=keys[1], secure=False)

    async def ported() -> float:
        store = ObjectStore(endpoint, *keys)
        started = time.monotonic()
        await store.put_file("runs", "bench/ours", path)
        return time.monotonic() - started

    pairs = [(asyncio.run(ported()), timed(lambda: bare.fput_object("runs", "bench/bare", str(path)))) for _ in range(3)]
    ours, theirs = (statistics.median(p) for p in zip(*pairs, strict=True))
    row(
        "artifact upload",
        f"{256 / ours:.0f} MiB/s",
        f"{256 / theirs:.0f} MiB/s (minio SDK)",
        against(256 / ours, 256 / theirs, 0.8, less=False),
    )


if __name__ == "__main__":
    main()
