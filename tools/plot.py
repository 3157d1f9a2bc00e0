"""Lines in an SVG: `write(path, title, x, y, series)`. Small on purpose: the docs' plots need no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#64473a")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 760, 420, 60, 40, 50, 150


def write(path: Path, title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log_x: bool = False) -> None:
    """Write one plot; `log_x`: a logarithmic x axis."""
    points = [p for line in series.values() for p in line]
    put = math.log10 if log_x else float
    left, right = min(put(p[0]) for p in points), max(put(p[0]) for p in points)
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low, high = (0.0, high * 1.1) if low < high / 2 else (low - (high - low) * 0.1, high + (high - low) * 0.1)
    across = lambda v: _LEFT + (put(v) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)  # noqa: E731
    up = lambda v: _HEIGHT - _BOTTOM - (v - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)  # noqa: E731
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/><text x="{_LEFT}" y="22" font-size="15">{title}</text>',
    ]
    for step in range(6):
        value = low + (high - low) * step / 5
        out.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        place = left + (right - left) * step / 5
        shown = 10**place if log_x else place
        where = _LEFT + (place - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        out.append(f'<text x="{where:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{shown:,.0f}</text>')
    out.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{x}</text>')
    out.append(f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{y}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path_text = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line)
        out.append(f'<polyline points="{path_text}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{_WIDTH - _RIGHT + 10}" y="{_TOP + 16 + 18 * index}" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n")
