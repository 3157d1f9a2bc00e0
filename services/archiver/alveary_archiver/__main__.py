"""The composition root: `python -m alveary_archiver`; with `verify` or `restore` it does that and ends."""

from __future__ import annotations

import asyncio
import sys
import time

from alveary_archiver.archiver import STREAMS, Archiver, restore, verify
from alveary_archiver.segments import Damaged
from alveary_core import telemetry
from alveary_core.errors import AlvearyError, Unavailable
from alveary_core.service import Service, serve
from alveary_core.settings import CoreSettings


async def start(service: Service) -> None:
    """Add the copying of streams to `service`."""
    archivers = [Archiver(service.log, service.store, stream) for stream in STREAMS]
    archivers[0].others = archivers[1:]
    for stream, archiver in zip(STREAMS, archivers, strict=True):
        service.spawn(copy(archiver), stream.lower())


async def copy(archiver: Archiver) -> None:
    """For ever; while the object store or the log is away, begin again where the copy ends, later and later.

    Raises:
        FailedPrecondition, Damaged: see Archiver.run: somebody must look.
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


async def once(what: str, settings: CoreSettings) -> None:
    """Verify or restore.

    Raises:
        AlvearyError, Damaged: it did not work; the text says why.
    """
    service = Service("archiver", settings)
    await service.open(streams=what != "restore")
    try:
        if what == "restore":
            await restore(service.log, service.store, print)
        else:
            for stream in STREAMS:
                await verify(service.log, service.store, stream, print)
    finally:
        await service.close()


def main() -> int:
    """Exit code 1: it did not work."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["verify"], ["restore"]):
        print("usage: python -m alveary_archiver [verify | restore]", file=sys.stderr)
        return 2
    if not arguments:
        asyncio.run(serve("archiver", CoreSettings(), start))
        return 0
    try:
        asyncio.run(once(arguments[0], CoreSettings()))
    except (AlvearyError, Damaged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
