"""alveary run logs, watch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from alveary.cli.common import CANCELED, FAILED, INTERRUPTED, json_option, open_workspace, plain, say
from alveary.live import LivePrinter
from alveary.text import printable

if TYPE_CHECKING:
    from alveary.aio import Client
    from alveary.run import Run

# Streams that are shown where none is named.
SHOWN = ("stdout", "stderr", "system", "prepare", "launcher-stdout", "launcher-stderr")


class Moment(click.ParamType):  # type: ignore[type-arg]  # older ones take no argument
    """A moment in the past, in seconds since the epoch: how long ago, or a time (of this machine's zone unless it names one)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read what was given; fails where it is neither, or lies in the future."""
        if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", str(value)):
            return time.time() - float(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[ago[2]]
        try:
            moment = datetime.fromisoformat(str(value).replace("Z", "+00:00")).timestamp()
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: give 90s, 10m, 2h, 1d, or a time like 2026-01-31T12:00:00Z", param, ctx)
        if moment > time.time() + 60:
            self.fail(f"{value!r} is in the future", param, ctx)
        return moment


def follow(run: Run) -> None:
    """Show states and log of a run until it is final; raises Exit where it did not complete, or was interrupted."""
    try:
        run._show(SHOWN)
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
@click.option("--newest", default=0, help="Only the newest lines, this many, and with --follow what comes after them; not with --grep.")
@click.option("--since", type=Moment(), help="Only lines written since then: 90s, 10m, 2h, 1d, or a time like 2026-01-31T12:00:00Z.")
@json_option
def logs(
    run_id: str,
    keep_on: bool,
    stream: tuple[str, ...],
    rank: int,
    all_ranks: bool,
    after: int,
    grep: str,
    ignore_case: bool,
    newest: int,
    since: float | None,
    as_json: bool,
) -> None:
    """Its log lines, byte for byte as they were written: like `cat`, a terminal acts on what is in them."""
    if (grep and (keep_on or newest)) or (newest and since is not None):
        raise click.UsageError("--grep goes neither with --follow nor with --newest, and --newest not with --since")
    workspace = open_workspace()
    only = None if all_ranks else rank
    run_id = workspace._call(workspace._client.runs.full_id(run_id))
    lines = _lines(workspace._client, run_id, after, keep_on, stream or SHOWN, only, grep, ignore_case, newest, since, not as_json)
    if as_json:
        workspace._call(_print_json(lines))
        return
    screen = LivePrinter(follow=keep_on)
    try:
        workspace._call(_print(lines, screen, all_ranks))
    finally:
        screen.close()


async def _lines(
    client: Client,
    run_id: str,
    after: int,
    keep_on: bool,
    streams: Sequence[str],
    rank: int | None,
    grep: str,
    ignore_case: bool,
    newest: int,
    since: float | None,
    unfinished: bool,
) -> AsyncIterator[Any]:
    if newest:
        for one in (await client.logs.read(run_id, after, newest, True, streams, rank)).lines:
            yield one
            after = one.cursor
        if not keep_on:
            return
    if since is not None:
        first = (await client.logs.read(run_id, after, 1, False, streams, rank, since=since)).lines
        # Where nothing is that new yet, what comes from now on is.
        last = first or (await client.logs.read(run_id, after, 1, True)).lines
        if not first and not keep_on:
            return
        after = first[0].cursor - 1 if first else last[0].cursor if last else after
    if not grep:
        async for one in client.logs.tail(run_id, after, keep_on, streams, rank, provisional=unfinished):
            yield one
        return
    while True:
        page = await client.logs.search(run_id, grep, ignore_case=ignore_case, after=after, streams=streams, rank=rank)
        for one in page.lines:
            yield one
        if not page.next:
            return
        after = page.next


async def _print_json(lines: AsyncIterator[Any]) -> None:
    async for one in lines:
        print(json.dumps({"cursor": one.cursor, **plain(one.line), "data": one.line.data.decode(errors="replace")}), flush=True)


async def _print(lines: AsyncIterator[Any], screen: LivePrinter, all_ranks: bool) -> None:
    async for one in lines:
        mark = "" if one.line.stream in ("stdout", "stderr") else f"[{printable(one.line.stream)}] "
        screen.add(one.line, f"[{one.line.rank}] {mark}" if all_ranks else mark)
