"""Tables: of columns on a terminal, of tabs in a pipe, of JSON on demand."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from alveary.cli.common import print_json
from alveary.text import pad, printable, shorten, width

_GAP = 2
# A column that is cut never gets narrower than this.
_NARROWEST = 6


def show(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, raw: Sequence[Any] | None = None, *,
    elastic: Sequence[str] = (), wide: bool = False,
) -> None:  # fmt: skip
    """Print `rows`: `columns` of them on a terminal or in a pipe, everything (`raw`, if given) as JSON.

    On a terminal the columns fit its width: `elastic` ones are cut as much as that takes, the last of them first; with
    `wide` nothing is cut. In a pipe every value is whole, separated by tabs, without a heading.
    """
    if as_json:
        print_json(raw if raw is not None else list(rows))
        return
    cells = [[printable(str(row.get(c, ""))) for c in columns] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            click.echo("\t".join(row))
        return
    for line in layout([list(columns), *cells], [c in elastic for c in columns], 0 if wide else shutil.get_terminal_size().columns):
        click.echo(line)


def layout(lines: Sequence[Sequence[str]], elastic: Sequence[bool], columns: int) -> list[str]:
    """Lines of aligned columns, at most `columns` wide where cutting `elastic` ones can do that; 0: as wide as they are.

    The first of `lines` is the heading, set bold.
    """
    widths = [max(width(line[i]) for line in lines) for i in range(len(elastic))]
    spare = columns - sum(widths) - _GAP * (len(widths) - 1) if columns else 0
    for i in reversed(range(len(widths))):
        if spare < 0 and elastic[i]:
            cut = min(-spare, max(widths[i] - max(_NARROWEST, width(lines[0][i])), 0))
            widths[i] -= cut
            spare += cut
    made = []
    for number, line in enumerate(lines):
        text = (" " * _GAP).join(pad(shorten(cell, size), size) for cell, size in zip(line, widths, strict=True)).rstrip()
        made.append(click.style(text, bold=True) if number == 0 else text)
    return made
