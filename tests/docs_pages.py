"""The docs as tests see them: pages, tables that are checked, code blocks that are run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"sdk.md", "cli.md", "settings.md", "events.md", "grpc.md"}
_BLOCK = re.compile(r"(?:<!-- (?P<what>run|file): (?P<value>[^ ]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block; `run` and `file` are what the comment above it says, or empty."""

    page: str
    language: str
    text: str
    run: str = ""
    file: str = ""


def pages() -> list[Path]:
    """All pages that people write: docs/, and what stands in the root."""
    written = [p for p in (ROOT / "docs").rglob("*.md") if not (p.parent.name == "reference" and p.name in GENERATED)]
    return sorted([*written, ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def name_of(page: Path) -> str:
    """A page's path within the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """Code blocks of a page, in order."""
    for found in _BLOCK.finditer(page.read_text()):
        marks = {found["what"]: found["value"]} if found["what"] else {}
        yield Block(name_of(page), found["language"], found["text"], marks.get("run", ""), marks.get("file", ""))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?\n```", "", page.read_text(), flags=re.DOTALL)


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def table_after(text: str, position: int) -> list[list[str]]:
    """Rows (without the heading) of the table that begins at a position, as lists of cells."""
    rows = []
    for line in text[position:].lstrip("\n").splitlines():
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
    return rows[2:]


def checked_tables() -> dict[str, list[list[str]]]:
    """Tables that a comment `<!-- check: NAME -->` marks, by name."""
    found: dict[str, list[list[str]]] = {}
    for page in pages():
        text = page.read_text()
        for mark in re.finditer(r"^<!-- check: ([a-z-]+) -->\n", text, re.MULTILINE):
            assert mark[1] not in found, f"two tables are marked {mark[1]!r}"
            found[mark[1]] = table_after(text, mark.end())
    return found


def code(cell: str) -> list[str]:
    """What stands between backticks in a cell."""
    return re.findall(r"`([^`]+)`", cell)
