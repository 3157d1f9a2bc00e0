"""The composition root: `python -m alveary_archiver`; with `verify`, `restore` or `gc` it does that and ends."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from alveary_archiver.archiver import STREAMS, Archiver, restore, verify
from alveary_archiver.collector import GRACE_DAYS, LEAST_GRACE_DAYS, Collector, collect
from alveary_archiver.garbage import Incomplete
from alveary_archiver.segments import Damaged
from alveary_core import telemetry
from alveary_core.errors import AlvearyError, Unavailable
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings

# In the state directory: what the last collection found, for `alveary status`.
COLLECTED = "collected.json"


async def start(service: Service) -> None:
    """Add the copying of streams to `service`."""
    archivers = [Archiver(service.log, service.store, stream) for stream in STREAMS]
    archivers[0].others = archivers[1:]
    for stream, archiver in zip(STREAMS, archivers, strict=True):
        service.spawn(copy(archiver), stream.lower())


async def copy(archiver: Archiver) -> None:
    """For ever; while the object store or the log is away, begin again where the copy ends, later and later.

    Raises:
        FailedPrecondition, Damaged: see Archiver.run: an operator must look.
    """
    pause = 1.0
    while True:
        began = time.monotonic()
        try:
            await archiver.run()
        except Unavailable as error:
            pause = 1.0 if time.monotonic() - began > 120 else min(pause * 2, 30.0)
            telemetry.logger().warning("archiver.retry", error=str(error), seconds=pause)
            await asyncio.sleep(pause)


async def once(asked: argparse.Namespace, settings: CoreSettings) -> None:
    """Verify, restore, or collect garbage.

    Raises:
        AlvearyError, Damaged, Incomplete: it did not work; the text says why.
    """
    service = Service("archiver", settings)
    await service.open(streams=asked.what == "verify")
    try:
        if asked.what == "restore":
            await restore(service.log, service.store, print)
        elif asked.what == "gc":
            done = await collect(service.log, service.store, print, grace_days=asked.grace_days, dry_run=asked.dry_run)
            await asyncio.to_thread(remember, settings.state_dir / COLLECTED, done, asked.dry_run)
        else:
            for stream in STREAMS:
                await verify(service.log, service.store, stream, print)
    finally:
        await service.close()


def remember(path: Path, done: Collector, dry_run: bool) -> None:
    """Write down what a collection removed, or found."""
    kinds = [{"bucket": b, "kind": k, "objects": t.count, "bytes": t.size} for (b, k), t in sorted(done.tallies.items())]
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({"at": time.time(), "dry_run": dry_run, "kinds": kinds}))
    part.rename(path)


def _days(text: str) -> float:
    days = float(text)
    if not days >= LEAST_GRACE_DAYS:
        raise argparse.ArgumentTypeError(f"{text}: at least {LEAST_GRACE_DAYS:g} days, so that no upload that is under way loses a file")
    return days


def main() -> int:
    """Exit code 1: it did not work."""
    parser = argparse.ArgumentParser(prog="python -m alveary_archiver")
    commands = parser.add_subparsers(dest="what")
    commands.add_parser("verify")
    commands.add_parser("restore")
    gc = commands.add_parser("gc")
    gc.add_argument("--dry-run", action="store_true")
    gc.add_argument("--grace-days", type=_days, default=GRACE_DAYS)
    asked = parser.parse_args()
    if asked.what is None:
        asyncio.run(serve("archiver", CoreSettings(), start))
        return 0
    try:
        asyncio.run(once(asked, CoreSettings()))
    except (AlvearyError, Damaged, Incomplete) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
