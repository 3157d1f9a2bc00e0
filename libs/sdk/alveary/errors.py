"""What the SDK raises. Standard library alone."""

from __future__ import annotations


class AlvearyError(Exception):
    """The platform refused or failed; the text says what to do. `code` is the gRPC status, like "NOT_FOUND"."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class NoPlatform(AlvearyError):
    """There is no platform to ask: no config says where one is, or none answers there."""


class AlvearyWarning(UserWarning):
    """Something is done as asked, and may not be what was meant."""


class ComputeTargetException(AlvearyError):
    """There is no such compute target, or it cannot be had."""


class RunFailedException(AlvearyError):
    """A run that was waited for did not complete."""
