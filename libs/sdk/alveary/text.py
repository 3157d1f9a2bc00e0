"""Text that users wrote, made fit to be shown. Standard library alone.

Names, tags, paths and reasons come from people and their programs. Shown as they are, they could move the cursor, recolour
or rewrite what stands above, turn the writing direction, or break a table's line. So whatever is not a printable character is shown as
its escape, as Python writes it.
"""

from __future__ import annotations

import unicodedata

# Cc: control characters. Cf: formats, among them the bidirectional overrides. Cs: lone surrogates. Zl, Zp: line and paragraph separators.
_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Formats that belong to ordinary text: joiners of emoji and of Indic scripts.
_HARMLESS = frozenset({"\u200c", "\u200d"})


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal would act on as its escape; those in `keep` stay as they are."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter in keep or letter in _HARMLESS or unicodedata.category(letter) not in _UNSHOWN else _escape(letter)
        for letter in text
    )


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def quoted(text: object) -> str:
    """A name or value as the filter language has it: any text."""
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def width(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    return sum(_columns(letter) for letter in text)


def _columns(letter: str) -> int:
    if unicodedata.combining(letter) or letter in _HARMLESS or "\ufe00" <= letter <= "\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """`text` in at most `columns` columns of a terminal; what is cut off is marked by an ellipsis."""
    if width(text) <= columns:
        return text
    taken, kept = 1, []  # the ellipsis takes one
    for letter in text:
        taken += _columns(letter)
        if taken > columns:
            break
        kept.append(letter)
    return "".join(kept).rstrip() + "…"


def pad(text: str, columns: int) -> str:
    """`text` and as many blanks as fill `columns` columns of a terminal."""
    return text + " " * (columns - width(text))
