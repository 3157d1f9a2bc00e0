"""Fixtures of the trainer's unit tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_subreaper_afterwards() -> Iterator[None]:
    """What a test asks of the kernel for its own orphans must not hold for those of other tests: nobody here would reap them."""
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
