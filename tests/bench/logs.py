"""Logs at scale: followers, pages of archives, search. `make bench-logs`, or `python tests/bench/logs.py [--lines N] [--scales 1,2,4,10]`.

The logs service runs as a process of its own, on real servers; lines are published as a trainer publishes them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from support import servers

from alveary.local.layout import Layout
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.logs.v1 import logs_pb2 as pb
from alveary_contracts.logs.v1 import logs_pb2_grpc as rpc
from alveary_core.auth import Principal, issue
from alveary_core.eventlog import EventLog, connect, ensure_streams
from alveary_core.events import Key

CHUNK_LINES = 1500
FOLLOWERS = 6
RARE = "needle-in-the-haystack"


def text(number: int) -> bytes:
    """A line as trainings write them, which says its number first."""
    return b"%d epoch %d step %d loss=%.6f accuracy=%.4f lr=0.001 %.3f s" % (
        number,
        number // 1000,
        number % 1000,
        1 / (number + 1),
        0.9,
        0.1,
    )


def chunk(start: int, lines: int) -> bytes:
    """One message of the stream of logs."""
    made = pb.LogChunk()
    now = time.time_ns()
    for number in range(start, start + lines):
        line = made.lines.add(stream="stdout", attempt=1, data=text(number))
        line.time.FromNanoseconds(now)
    if start <= lines * 3 < start + lines:
        made.lines[-1].data += RARE.encode()
    return made.SerializeToString()


class Bench:
    """A logs service, and who writes and reads."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.endpoint = ""
        self.token = issue(layout.secrets["tokens"], Principal("bench", "default", "owner"))

    async def start(self, folder: Path) -> None:
        url = f"nats://127.0.0.1:{self.layout.ports.nats}"
        self.runs = EventLog(await connect(url, "runs", self.layout.secrets["runs"], "runs"), "runs")
        self.trainer = await connect(url, "trainer", self.layout.secrets["trainer"], "trainer")
        await ensure_streams(self.runs.connection)
        environment = os.environ | self.layout.environment("logs")
        self.endpoint = f"127.0.0.1:{self.layout.ports.logs}"
        environment["ALVEARY_LISTEN"] = self.endpoint
        self.log = (folder / "service.log").open("wb")
        self.service = subprocess.Popen([sys.executable, "-m", "alveary_logs"], env=environment, stdout=self.log, stderr=self.log)
        self.channel = grpc.aio.insecure_channel(self.endpoint, options=[("grpc.max_receive_message_length", 64 << 20)])
        await asyncio.wait_for(self.channel.channel_ready(), 60)
        self.stub = rpc.LogServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {self.token}"),)

    async def stop(self) -> None:
        await self.channel.close()
        self.service.terminate()
        self.service.wait(30)
        self.log.close()
        await self.runs.connection.close()
        await self.trainer.close()

    async def run(self) -> str:
        run_id = new_id()
        await self.runs.append(Key("default", "run", run_id), [ev.RunSubmitted(submitted_by="bench")], 0)
        return run_id

    async def write(self, run_id: str, lines: int) -> None:
        """Publish a log, as trainers do: one message after another, each acknowledged. Then the run is final."""
        js = self.trainer.jetstream()
        for start in range(0, lines, CHUNK_LINES):
            data = await asyncio.to_thread(chunk, start, min(CHUNK_LINES, lines - start))
            await js.publish(f"alveary-logs.default.{run_id}", data, timeout=30)
        key = Key("default", "run", run_id)
        await self.runs.append(key, [ev.RunCompleted(attempt=1)], (await self.runs.read(key))[-1].sequence)

    async def archived(self, run_id: str) -> None:
        async with asyncio.timeout(600):
            while True:
                try:
                    await self.stub.Download(pb.DownloadRequest(run_id=run_id), metadata=self.metadata, timeout=60)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                await asyncio.sleep(0.05)

    async def followers(self, lines: int) -> dict[str, float]:
        """Six followers of two runs while these are written."""
        runs = [await self.run(), await self.run()]
        command = [sys.executable, __file__, "--follow", self.endpoint, self.token]
        processes = [
            await asyncio.create_subprocess_exec(*command, runs[n % 2], str(lines), stdout=subprocess.PIPE) for n in range(FOLLOWERS)
        ]
        for process in processes:
            assert process.stdout is not None
            await process.stdout.readline()  # it follows
        started = time.monotonic()
        before = psutil.Process(self.service.pid).cpu_times()
        writing = asyncio.gather(*(self.write(run, lines) for run in runs))

        async def written() -> float:
            await writing
            return time.monotonic() - started

        seconds_written = asyncio.create_task(written())
        for process in processes:
            out, _ = await process.communicate()
            told = json.loads(out)
            assert told["lines"] == lines and told["in_order"], told
        seconds = time.monotonic() - started
        after = psutil.Process(self.service.pid).cpu_times()
        return {
            "lines_per_second_together": round(FOLLOWERS * lines / seconds), "seconds": round(seconds, 1),
            "seconds_written": round(await seconds_written, 1),
            "service_cpu_us_per_line": round((after.user + after.system - before.user - before.system) / (FOLLOWERS * lines) * 1e6, 2),
            "service_mb": round(psutil.Process(self.service.pid).memory_info().rss / 1e6),
        }  # fmt: skip

    async def pages(self, lines: int) -> dict[str, float]:
        """Pages of an archived log."""
        run = await self.run()
        await self.write(run, lines)
        started = time.monotonic()
        await self.archived(run)
        archived = time.monotonic() - started
        first = (await self.read(pb.ReadRequest(run_id=run, limit=1))).lines[0]
        ten = await self.read(pb.ReadRequest(run_id=run, limit=10, newest=True))
        middle = (first.cursor + ten.lines[0].cursor) // 2
        requests: dict[str, Callable[[], Awaitable[object]]] = {
            "first_page_ms": lambda: self.read(pb.ReadRequest(run_id=run, limit=1000)),
            "middle_page_ms": lambda: self.read(pb.ReadRequest(run_id=run, after=middle, limit=1000)),
            "newest_page_ms": lambda: self.read(pb.ReadRequest(run_id=run, newest=True, limit=1000)),
            "eight_at_once_ms": lambda: asyncio.gather(
                *(
                    self.read(pb.ReadRequest(run_id=run, after=first.cursor + (middle - first.cursor) * n // 4, limit=1000))
                    for n in range(8)
                )
            ),
        }
        if "since" in pb.ReadRequest.DESCRIPTOR.fields_by_name:
            at = (await self.read(pb.ReadRequest(run_id=run, after=middle, limit=1))).lines[0].line.time
            requests["by_time_ms"] = lambda: self.read(pb.ReadRequest(run_id=run, since=at, limit=1000))
            requests["by_line_ms"] = lambda: self.read(pb.ReadRequest(run_id=run, line=lines // 2, limit=1000))
        figures = {name: await median_ms(work) for name, work in requests.items()}
        size = sum(len(text(n)) + 1 for n in range(lines))
        figures["archived_mb_per_second"] = round(size / 1e6 / archived, 1)
        for name, needle, folded in (("absent", "xyzzy", False), ("rare", RARE, False), ("rare_any_case", RARE.upper(), True)):
            asked = pb.SearchRequest(run_id=run, text=needle, ignore_case=folded)

            async def search(asked: pb.SearchRequest = asked) -> None:
                found = await self.stub.Search(asked, metadata=self.metadata, timeout=120)
                assert len(found.lines) == (0 if asked.text == "xyzzy" else 1)

            took = await median_ms(search, 3)
            figures[f"search_{name}_mb_per_second"] = round(size / 1e6 / (took / 1000))
        started, count = time.monotonic(), 0
        async for reply in self.stub.Tail(pb.TailRequest(run_id=run), metadata=self.metadata):
            count += len(reply.lines)
        assert count == lines
        figures["tail_lines_per_second"] = round(count / (time.monotonic() - started))
        return figures

    async def read(self, request: pb.ReadRequest) -> pb.ReadResponse:
        return await self.stub.Read(request, metadata=self.metadata, timeout=60)


async def median_ms(work: Callable[[], Awaitable[object]], times: int = 5) -> float:
    """The median of some calls. Nothing is read before on purpose, so the first one finds no cache."""
    took = []
    for _ in range(times):
        started = time.monotonic()
        await work()
        took.append((time.monotonic() - started) * 1000)
    return round(statistics.median(took), 1)


async def follow(endpoint: str, token: str, run_id: str, lines: int) -> None:
    """One follower: counts, and looks at each line."""
    async with grpc.aio.insecure_channel(endpoint, options=[("grpc.max_receive_message_length", 64 << 20)]) as channel:
        stub = rpc.LogServiceStub(channel)
        await channel.channel_ready()
        print("ready", flush=True)
        count, in_order, cursor = 0, True, 0
        request = pb.TailRequest(run_id=run_id, follow=True)
        async for reply in stub.Tail(request, metadata=(("authorization", f"Bearer {token}"),)):
            for one in reply.lines:
                in_order = in_order and one.cursor > cursor and one.line.data.startswith(b"%d " % count)
                cursor = one.cursor
                count += 1
        print(json.dumps({"lines": count, "in_order": in_order}))


async def measure(lines: int, scales: list[int]) -> None:
    with tempfile.TemporaryDirectory(prefix="alveary-bench-") as name, servers(Path(name)) as layout:
        bench = Bench(layout)
        await bench.start(Path(name))
        try:
            for scale in scales:
                print(
                    json.dumps({"lines": lines * scale} | await bench.followers(lines * scale) | await bench.pages(lines * scale)),
                    flush=True,
                )
        finally:
            await bench.stop()


def main() -> None:
    if sys.argv[1:2] == ["--follow"]:
        endpoint, token, run_id, lines = sys.argv[2:]
        asyncio.run(follow(endpoint, token, run_id, int(lines)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=100_000, help="lines of a log, N")
    parser.add_argument("--scales", default="1,2,4,10", help="multiples of N")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.lines, [int(scale) for scale in arguments.scales.split(",")]))


if __name__ == "__main__":
    main()
