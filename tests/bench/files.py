"""Files: what the object store takes through Alveary, against the bare minio SDK in the same run; and a run of many outputs.

`make bench-files`, or `python tests/bench/files.py --small 2000 --mib 256 --outputs 5000`. Rounds of ours and theirs alternate, as the
machine may be busy otherwise; medians are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import urllib3
from minio import Minio

sys.path.insert(0, str(Path(__file__).parent.parent))
from support import Embedded, embedded, finished, servers, submit

from alveary.local.layout import Layout
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.blobs import Blobs, each, sizes
from alveary_core.objectstore import ObjectStore

CONNECTIONS = 32
ROUNDS = 3


def row(what: str, ours: str, peer: str = "", verdict: str = "") -> None:
    """A line of the table."""
    print(f"{what:<44} {ours:<22} {peer:<28} {verdict}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def against(ours: list[float], theirs: list[float], amount: float, unit: str, bound: float) -> tuple[str, str, str]:
    """Rates, and whether ours is at least `bound` of theirs."""
    mine, other = amount / statistics.median(ours), amount / statistics.median(theirs)
    verdict = f"{mine / other:.2f} of it ({'holds' if mine / other >= bound else 'MISSED'}: {bound})"
    return f"{mine:.0f} {unit}", f"{other:.0f} {unit} (minio SDK)", verdict


def store(layout: Layout, folder: Path, small: int, mib: int) -> None:
    """The port itself."""
    endpoint, keys = f"127.0.0.1:{layout.ports.s3}", (layout.secrets["s3_access"], layout.secrets["s3_secret"])
    http = urllib3.PoolManager(maxsize=CONNECTIONS)
    bare = Minio(endpoint, access_key=keys[0], secret_key=keys[1], secure=False, region="us-east-1", http_client=http)
    files = []
    for number in range(small):
        path = folder / f"{number}"
        path.write_bytes(os.urandom(4000))
        files.append(path)
    big = folder / "big"
    with big.open("wb") as opened:
        for _ in range(mib):
            opened.write(os.urandom(1 << 20))

    async def ours(paths: list[Path], prefix: str) -> None:
        port = ObjectStore(endpoint, *keys)
        await port.ensure_buckets()
        await each(lambda p: put(port, p, prefix), paths, CONNECTIONS)
        port.close()

    async def put(port: ObjectStore, path: Path, prefix: str) -> None:
        await port.put_file("runs", f"{prefix}/{path.name}", path)

    def theirs(paths: list[Path], prefix: str) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda p: bare.fput_object("runs", f"{prefix}/{p.name}", str(p)), paths))

    asyncio.run(ours([], ""))
    pairs: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        mine = timed(lambda n=number: asyncio.run(ours(files, f"ours-{n}")))  # type: ignore[misc]
        pairs.append((mine, timed(lambda n=number: theirs(files, f"theirs-{n}"))))  # type: ignore[misc]
    row(f"{small} files of 4 KB stored", *against([p[0] for p in pairs], [p[1] for p in pairs], small, "files/s", 0.8))
    pairs = []
    for number in range(ROUNDS):
        mine = timed(lambda n=number: asyncio.run(ours([big], f"ours-{n}")))  # type: ignore[misc]
        pairs.append((mine, timed(lambda n=number: theirs([big], f"theirs-{n}"))))  # type: ignore[misc]
    row(f"one file of {mib} MiB stored", *against([p[0] for p in pairs], [p[1] for p in pairs], mib, "MiB/s", 0.9))

    async def blobs() -> None:
        port = ObjectStore(endpoint, *keys)
        entries = [c.FileEntry(path=p.name, size=4000, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
        sources = {f.sha256: f"ours-0/{f.path}" for f in entries}
        started = time.monotonic()
        left = await Blobs(port, "models").take(entries, "runs", sources, patience=600)
        row(f"{small} files copied to a model", f"{small / (time.monotonic() - started):.0f} files/s", "", f"{left} left")
        started = time.monotonic()
        await sizes(port, "models", [f.sha256 for f in entries])
        row(f"{small} blobs looked up", f"{small / (time.monotonic() - started):.0f} files/s")
        port.close()

    asyncio.run(blobs())


def longest_stall(stack: Embedded) -> float:
    """The longest delay of an event loop of a service or trainer, seconds; 0: none of more than 0.1 s, which would be logged."""
    longest = 0.0
    for log in (*stack.state_dir.glob("logs/*.log"), *stack.state_dir.glob("services/nodes/*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if '"event": "loop.' in line:
                longest = max(longest, json.loads(line)["seconds"])
    return longest


def run(folder: Path, outputs: int, gib: int) -> None:
    """A run that stores many small files, and perhaps a large one; the small ones are registered and listed."""
    with embedded(folder / "stack") as stack:
        workspace = stack.workspace()
        (folder / "source").mkdir()
        code = f"""
        import os
        os.makedirs("outputs/many")
        for n in range({outputs}):
            with open(f"outputs/many/{{n}}", "w") as file:
                file.write(f"number {{n}} " * 100)
        block = os.urandom(64 << 20)
        with open("outputs/large", "wb") as file:
            for n in range({gib} * 16):
                file.write(n.to_bytes(8, "big") + block[8:])
        """
        submitted = submit(workspace, folder / "source", code)
        began = 0.0
        while submitted.get_status() not in ("Completed", "Failed"):
            if submitted.get_status() == "Finalizing" and not began:
                began = time.monotonic()
            time.sleep(0.05)
        finalizing = time.monotonic() - began
        finished(submitted)
        large = f" and a file of {gib} GiB" if gib else ""
        row(f"a run's {outputs} outputs{large} stored", f"{outputs / finalizing:.0f} files/s", f"{finalizing:.1f} s in Finalizing")
        seconds = timed(lambda: submitted.register_model("many", "outputs/many"))
        row(f"{outputs} outputs registered as a model", f"{outputs / seconds:.0f} files/s", f"{seconds:.1f} s")
        client = workspace._client
        seconds = timed(lambda: workspace._call(client.runs.file_links(submitted.id, with_urls=True)))
        row(f"{outputs} files listed with links", f"{outputs / seconds:.0f} files/s", f"{seconds:.2f} s")
        seconds = timed(lambda: submitted.download_files("outputs/many", str(folder / "down")))
        row(f"{outputs} files downloaded", f"{outputs / seconds:.0f} files/s", f"{seconds:.1f} s")
        stall = longest_stall(stack)
        row("longest delay of an event loop", f"{stall * 1000:.0f} ms" if stall else "under 100 ms", "", "wanted: at most 100 ms")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=2000, help="small files; 0: none of this part")
    parser.add_argument("--mib", type=int, default=256, help="size of the large file")
    parser.add_argument("--outputs", type=int, default=5000, help="outputs of the run; 0: none of this part")
    parser.add_argument("--gib", type=int, default=0, help="size of a large output of the run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.small:
            (folder / "files").mkdir()
            with servers(folder / "servers") as layout:
                store(layout, folder / "files", given.small, given.mib)
        if given.outputs:
            run(folder, given.outputs, given.gib)


if __name__ == "__main__":
    main()
