"""Words that plain technical English does without stay out of docs, protos, and the packages that were cleared of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import ROOT, name_of, pages

_STILTED = re.compile(r"\b(whoever|anew|everybody|nobody|somebody)\b|\bthe very\b|\bwho reads\b", re.IGNORECASE)
_CLEARED = ("libs/core/alveary_core", *(f"services/{s}/alveary_{s}" for s in ("runs", "images", "logs", "registry", "archiver")))
FILES = [
    *pages(),
    *sorted((ROOT / "protos").rglob("*.proto")),
    *sorted(file for folder in _CLEARED for file in (ROOT / folder).rglob("*.py")),
]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_words_are_plain(file: Path) -> None:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        found = _STILTED.search(line)
        assert not found or '"somebody"' in line, f"{name_of(file)}:{number}: {line.strip()!r}"
