"""Under which names files of a run are stored: a name may hold any byte but a slash, what names it elsewhere may not."""

from __future__ import annotations

import re

from alveary_contracts.names import path_problem

# What an object's key may have in S3, less what comes before the path.
_LONGEST = 900
# Control characters and backslashes, and bytes that are no UTF-8 (as surrogates); "%" itself, so that names stay distinct.
_ODD = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


def stored_name(path: bytes) -> tuple[str, str]:
    """The name under which a file of this relative path is stored, and what is odd about its own; "": it is its own.

    Raises:
        ValueError: it cannot be stored; the text says why.
    """
    text = path.decode(errors="surrogateescape")
    if not _ODD.search(text):
        name, why = text, ""
    else:
        why = "is not UTF-8" if re.search(r"[\ud800-\udfff]", text) else "has characters that names of stored files may not have"
        name = re.sub(r"[%\x00-\x1f\x7f\\\ud800-\udfff]", lambda found: "".join(f"%{b:02X}" for b in os_bytes(found.group())), text)
    if problem := path_problem(name):
        raise ValueError(problem)
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"its path has {len(name.encode())} bytes, and a stored one may have {_LONGEST}")
    return name, why


def os_bytes(text: str) -> bytes:
    """The bytes that `text` stands for, those that are no UTF-8 as well."""
    return text.encode(errors="surrogateescape")


def shown(path: bytes) -> str:
    """A path for a sentence, whatever bytes it has."""
    return path.decode(errors="backslashreplace")


def printable(text: str) -> str:
    """Text that can be encoded: surrogates, which stand for bytes that are no UTF-8, are written as escapes."""
    return text.encode(errors="backslashreplace").decode()
