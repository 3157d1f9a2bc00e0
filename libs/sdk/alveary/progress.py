"""Progress on a terminal; silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from alveary.session import Session
    from alveary.transfer import Listing


@contextmanager
def upload_progress(what: str, verb: str = "uploading") -> Iterator[Callable[[int, int], None]]:
    """A function of (bytes done, bytes in all) that draws a bar while there is something to draw."""
    with _bar(f"{verb} {what}", DownloadColumn(), TransferSpeedColumn()) as update:
        yield update


@contextmanager
def file_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (files done, files in all) that draws a bar."""
    with _bar(what, MofNCompleteColumn()) as update:
        yield update


def download(workspace: Session, listing: Listing, folder: Path, *, overwrite: bool) -> None:
    """Store files in a folder, with a bar."""
    total, done = sum(f.size for f in listing.files), 0
    with upload_progress(f"{len(listing.files)} files", "downloading") as progress:

        def update(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        workspace._call(workspace._client.transfers.download_all(listing, folder, update, overwrite=overwrite))


@contextmanager
def _bar(what: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, BarColumn(), *columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None, visible=False)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        yield update
