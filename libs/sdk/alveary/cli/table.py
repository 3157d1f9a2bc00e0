"""Tables: of columns on a terminal, of tabs in a pipe, of JSON on demand; and sheets of names and values."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from alveary.cli.columns import Cell
from alveary.cli.common import print_json
from alveary.text import pad, printable, shorten, width

_GAP = 2
# A column that is cut never gets narrower than this.
_NARROWEST = 6


def show(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    raw: Sequence[Any] | None = None,
    *,
    elastic: Sequence[str] = (),
    spare: Sequence[str] = (),
    wide: bool = False,
) -> None:
    """Print `rows`: `columns` of them on a terminal or in a pipe, everything (`raw`, if given) as JSON.

    On a terminal the columns fit its width: `elastic` ones are cut as much as that takes, the first of them first, and
    where that is not enough `spare` ones are left out, the first of them first; with `wide` nothing is. In a pipe every value is whole, separated by tabs, without a heading.
    """
    if as_json:
        print_json(raw if raw is not None else [{k: v.piped if isinstance(v, Cell) else v for k, v in row.items()} for row in rows])
        return
    if not sys.stdout.isatty():
        for row in rows:
            values = (row.get(c, "") for c in columns)
            click.echo("\t".join(printable(v.piped if isinstance(v, Cell) else str(v)) for v in values))
        return
    space = 0 if wide else shutil.get_terminal_size().columns
    kept, left = list(columns), [name for name in spare if name in columns]
    while True:
        cells = [kept, *([printable(str(row.get(c, ""))) for c in kept] for row in rows)]
        lines = layout(cells, [kept.index(name) for name in elastic if name in kept], space)
        if not space or not left or max(width(click.unstyle(line)) for line in lines) <= space:
            break
        kept.remove(left.pop(0))
    for line in lines:
        click.echo(line)


def layout(lines: Sequence[Sequence[str]], elastic: Sequence[int], space: int) -> list[str]:
    """Lines of aligned columns, at most `space` wide where cutting `elastic` ones, in their order, can do that; 0: as wide as they are.

    The first of `lines` is the heading, set bold.
    """
    widths = [max(width(line[i]) for line in lines) for i in range(len(lines[0]))]
    over = sum(widths) + _GAP * (len(widths) - 1) - space if space else 0
    for i in elastic:
        cut = min(over, widths[i] - max(_NARROWEST, width(lines[0][i])))
        if cut > 0:
            widths[i] -= cut
            over -= cut
    made = []
    for n, line in enumerate(lines):
        text = (" " * _GAP).join(pad(shorten(cell, size), size) for cell, size in zip(line, widths, strict=True)).rstrip()
        made.append(click.style(text, bold=True) if n == 0 else text)
    return made


def sheet(values: Mapping[str, Any]) -> None:
    """Print names and their values, a line each; what is empty is left out, and lists have a line an item."""
    values = {k: v for k, v in values.items() if v not in ("", None, [], ())}
    room = max(map(len, values), default=0) + _GAP
    for name, value in values.items():
        lines = [line for item in (value if isinstance(value, (list, tuple)) else [value]) for line in str(item).splitlines()]
        for n, line in enumerate(lines):
            click.echo(f"{name if n == 0 else '':<{room}}{printable(line)}")
