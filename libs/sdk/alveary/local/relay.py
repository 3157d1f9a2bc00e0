"""Lets other machines reach a stack: `python -m alveary.local.relay ADDRESS PORT:INNER...`.

Each PORT of ADDRESS leads to port INNER of 127.0.0.1. Servers of the stack that need no password (the object store's
inner ones) stay where only this machine reaches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

_CHUNK = 1 << 18


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(_CHUNK):
            to.write(data)
            await to.drain()
        if to.can_write_eof():
            to.write_eof()


async def _serve(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port, limit=_CHUNK)
    except OSError:  # it is being started again: so is what wanted to speak to it
        writer.close()
        return
    try:
        await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
    finally:
        inner_writer.close()
        writer.close()


async def main(address: str, ports: dict[int, int]) -> None:
    """Serve for ever."""

    async def listen(port: int, inner: int) -> asyncio.Server:
        return await asyncio.start_server(lambda r, w: _serve(inner, r, w), address, port, limit=_CHUNK)

    servers = [await listen(*pair) for pair in ports.items()]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], {int(port): int(inner) for port, _, inner in (a.partition(":") for a in sys.argv[2:])}))
