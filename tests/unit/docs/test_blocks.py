"""Code blocks of the docs that need no platform are run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_pages import Block, blocks, pages

BLOCKS = [b for page in pages() for b in blocks(page) if b.run == "unit"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.page)
def test_a_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.language == "python"
    (tmp_path / "src").mkdir()
    (tmp_path / "src/train.py").touch()
    (tmp_path / "Dockerfile").write_text("FROM python:3.12\n")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.page, "exec"), {"__name__": "docs"})


def test_marks_are_known() -> None:
    assert {b.run for page in pages() for b in blocks(page)} == {"", "unit", "stack"}
