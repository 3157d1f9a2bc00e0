"""Files of a run, model or dataset, with links that are asked for as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alveary.client.connection import Connection
from alveary.transfer import BATCH, Listing, Prepare

if TYPE_CHECKING:
    from alveary_contracts.common.v1 import common_pb2 as c

Request = Callable[..., Any]


async def list_files(connection: Connection, method: Any, without_links: Request, with_links: Request) -> Listing:
    """All files that a paged method lists. `without_links` and `with_links` make its requests."""
    pages = connection.pages(method, without_links())
    files = [link.file async for page in pages for link in page.files]

    async def links_after(path: str) -> Sequence[c.FileLink]:
        reply = await connection.call(method, with_links(page_token=path, page_size=BATCH))
        found: Sequence[c.FileLink] = reply.files
        return found

    return Listing(files, links_after)


def prepare_with(connection: Connection, method: Any, request: Request, *, verify: bool) -> Prepare:
    """What asks a service for upload slots; with `verify` the platform first reads, once, what it has of each file."""
    doubted: set[str] = set()

    async def prepare(files: Sequence[c.FileEntry]) -> tuple[Sequence[c.UploadSlot], int]:
        from alveary_contracts.common.v1 import common_pb2

        new = {f.sha256 for f in files} - doubted if verify else set()
        doubted.update(new)
        reply = await connection.call(method, request(manifest=common_pb2.Manifest(files=files), doubted=new))
        return reply.slots, reply.pending

    return prepare
