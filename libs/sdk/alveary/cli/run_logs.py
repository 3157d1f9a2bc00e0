"""alveary run logs, watch."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from alveary.cli.common import CANCELED, FAILED, INTERRUPTED, json_option, open_workspace, plain, say
from alveary.text import printable

if TYPE_CHECKING:
    from alveary.aio import Client
    from alveary.run import Run

# Streams that are shown where none is named.
SHOWN = ("stdout", "stderr", "system", "prepare", "launcher-stdout", "launcher-stderr")


def follow(run: Run) -> None:
    """Show states and log of a run until it is final; raises Exit where it did not complete, or was interrupted."""
    try:
        run._show()
        details = run.wait_for_completion(raise_on_error=False)
    except KeyboardInterrupt:
        say(f"\nthe run goes on; follow it again with `alveary run watch {run.id}`, cancel it with `alveary run cancel {run.id}`")
        raise click.exceptions.Exit(INTERRUPTED) from None
    if details["status"] != "Completed":
        raise click.exceptions.Exit(FAILED if details["status"] == "Failed" else CANCELED)


@click.command()
@click.argument("run_id")
def watch(run_id: str) -> None:
    """States and log lines until it is final."""
    follow(open_workspace().get_run(run_id))


@click.command()
@click.argument("run_id")
@click.option("--follow", "-f", "keep_on", is_flag=True, help="Go on until the run is final.")
@click.option("--stream", multiple=True, help="stdout, stderr, prepare, system, launcher-stdout, launcher-stderr, logs/*; repeatable.")
@click.option("--rank", default=0, help="Lines of this rank.")
@click.option("--all-ranks", is_flag=True, help="Lines of all ranks, each marked with its own.")
@click.option("--after", default=0, help="Cursor of the last line seen.")
@click.option("--grep", default="", help="Only lines that hold this text; not with --follow.")
@click.option("--ignore-case", "-i", is_flag=True, help="With --grep.")
@click.option("--newest", default=0, help="Only the newest lines, this many; not with --follow or --grep.")
@json_option
def logs(
    run_id: str, keep_on: bool, stream: tuple[str, ...], rank: int, all_ranks: bool, after: int, grep: str, ignore_case: bool,
    newest: int, as_json: bool,
) -> None:  # fmt: skip
    """Its log lines, byte for byte as they were written: like `cat`, a terminal acts on what is in them."""
    if (keep_on and (grep or newest)) or (grep and newest):
        raise click.UsageError("--follow, --grep and --newest exclude each other")
    workspace = open_workspace()
    only = None if all_ranks else rank
    run_id = workspace._call(workspace._client.full_id(run_id))
    lines = _lines(workspace._client, run_id, after, keep_on, stream or SHOWN, only, grep, ignore_case, newest)
    workspace._call(_print(lines, all_ranks, as_json))


async def _lines(
    client: Client, run_id: str, after: int, keep_on: bool, streams: Sequence[str], rank: int | None, grep: str, ignore_case: bool,
    newest: int,
) -> AsyncIterator[Any]:  # fmt: skip
    if newest:
        for one in (await client.read_logs(run_id, after, newest, True, streams, rank)).lines:
            yield one
        return
    if not grep:
        async for one in client.tail(run_id, after, keep_on, streams, rank):
            yield one
        return
    while True:
        page = await client.search_logs(run_id, grep, ignore_case=ignore_case, after=after, streams=streams, rank=rank)
        for one in page.lines:
            yield one
        if not page.next:
            return
        after = page.next


async def _print(lines: AsyncIterator[Any], all_ranks: bool, as_json: bool) -> None:
    rest: dict[tuple[str, int], bytes] = {}
    async for one in lines:
        line = one.line
        if as_json:
            print(json.dumps({"cursor": one.cursor, **plain(line), "data": line.data.decode(errors="replace")}), flush=True)
            continue
        data = rest.pop((line.stream, line.rank), b"") + line.data
        if line.partial:
            rest[line.stream, line.rank] = data
            continue
        mark = "" if line.stream in ("stdout", "stderr") else f"[{printable(line.stream)}] "
        mark = f"[{line.rank}] {mark}" if all_ranks else mark
        sys.stdout.buffer.write(mark.encode() + data + b"\n")
        sys.stdout.buffer.flush()
