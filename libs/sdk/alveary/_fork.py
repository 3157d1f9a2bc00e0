"""Detects a process that was forked from one that uses gRPC. Standard library alone."""

from __future__ import annotations

import os

from alveary.errors import AlvearyError

# The process that uses gRPC; 0: none does yet.
_owner_pid = 0


def claim_grpc() -> None:
    """Note that this process uses gRPC.

    Raises:
        AlvearyError: this process was forked from one that used it. A fork has none of its parent's threads: neither the event
            loop's nor those of gRPC, which cannot be started again in it, so that a call would never return.
    """
    global _owner_pid
    if is_forked():
        raise AlvearyError(
            "this process was forked from one that talks to the platform, and gRPC does not survive a fork: start the process with the "
            "method 'spawn' or 'forkserver' (multiprocessing.get_context('spawn'), DataLoader(multiprocessing_context='spawn')), or "
            "use the workspace or client in the parent alone",
            "FAILED_PRECONDITION",
        )
    _owner_pid = os.getpid()


def is_forked() -> bool:
    """Whether this process was forked from one that uses gRPC."""
    return _owner_pid not in (0, os.getpid())
