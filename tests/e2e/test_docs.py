"""The docs' walk-throughs, as they stand there, on the shared stack."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import blocks, name_of, pages
from support import Embedded

WALKED = [page for page in pages() if any(b.run == "stack" for b in blocks(page))]


@pytest.mark.parametrize("page", WALKED, ids=name_of)
def test_a_walk_through_works_as_written(page: Path, stack: Embedded, tmp_path: Path) -> None:
    ran = 0
    for block in blocks(page):
        if block.file:
            file = tmp_path / block.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text + "\n")
        if block.run != "stack":
            continue
        ran += 1
        if block.language == "python":
            env = os.environ | {"ALVEARY_CONFIG": str(stack.config)}
            done = subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
            continue
        for line in block.text.splitlines():
            if line.startswith("$ "):
                name, *arguments = shlex.split(line[2:])
                assert name == "alveary", line
                stack.cli(*arguments, cwd=tmp_path)
    assert ran
