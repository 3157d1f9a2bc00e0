"""ULIDs: sortable by time of creation, 26 characters of Crockford's base 32."""

from __future__ import annotations

import hashlib
import re
import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(now: float | None = None) -> str:
    """A ULID (https://github.com/ulid/spec): 48 bits of milliseconds since the epoch, 80 random bits."""
    milliseconds = int((time.time() if now is None else now) * 1000)
    return _encode((milliseconds << 80) | secrets.randbits(80))


_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def _encode(number: int) -> str:
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(125, -1, -5))


def is_id(text: str) -> bool:
    """Whether `text` is a ULID."""
    return bool(_ULID.fullmatch(text))


def id_from_key(workspace: str, key: str) -> str:
    """The id that follows from an idempotency key, the same on every replica.

    Of a key that is itself a ULID the time is kept, so that the id sorts by it; the other 80 bits are a digest of
    workspace and key, so that no caller can choose the id of another's run.
    """
    bits = int.from_bytes(hashlib.sha256(f"{workspace}\0{key}".encode()).digest()[:16], "big")
    if is_id(key):
        number = 0
        for letter in key:
            number = number * 32 + _ALPHABET.index(letter)
        bits = (number >> 80 << 80) | (bits & ((1 << 80) - 1))
    return _encode(bits & ((1 << 128) - 1))
