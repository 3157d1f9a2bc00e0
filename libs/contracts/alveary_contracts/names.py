"""Names: which events exist, how subjects are written, what users may call things."""

from __future__ import annotations

import posixpath
import re
from urllib.parse import quote, unquote

# aggregate -> the one service that writes it
AGGREGATES = {
    "run": "runs",
    "image": "images",
    "placement": "scheduler",
    "target": "scheduler",
    "node": "scheduler",
    "attempt": "trainer",
    "log": "logs",
    "model": "registry",
    "dataset": "registry",
}
# Bytes, of a file's path in a manifest and of each of its parts.
MAX_PATH, MAX_NAME = 960, 255
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_WORD = re.compile(r"[A-Z][a-z]*")


def event_name(message: str) -> tuple[str, str] | None:
    """("run", "cancel_requested") of "RunCancelRequested"; None for a message that is no event."""
    words = [w.lower() for w in _WORD.findall(message)]
    if len(words) < 2 or words[0] not in AGGREGATES:
        return None
    return words[0], "_".join(words[1:])


def message_name(aggregate: str, event: str) -> str:
    """ "RunCancelRequested" of ("run", "cancel_requested")."""
    return "".join(w.capitalize() for w in (aggregate, *event.split("_")))


def token(text: str) -> str:
    """`text` as one NATS subject token: what is outside [A-Za-z0-9_-] is percent-encoded."""
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E")


def untoken(text: str) -> str:
    """The inverse of `token`."""
    return unquote(text)


def name_problem(name: str) -> str:
    """Why `name` cannot name a target, model, dataset or experiment; empty when it can."""
    if NAME.fullmatch(name):
        return ""
    if not name:
        return "a name is needed"
    return f"{name[:80]!r} is not a valid name: use 1 to 64 letters, digits, '_', '-' or '.', beginning with a letter or digit"


def normal_path(path: str) -> str:
    """`path` as manifests spell it: without "./", doubled or trailing slashes and "..", and with forward slashes.

    What is absolute, or leads outside, stays so: `path_problem` refuses it.
    """
    normal = posixpath.normpath(path.replace("\\", "/")) if path else ""
    return "" if normal == "." else normal


def normal_prefix(prefix: str) -> str:
    """The same for the beginning of paths, where a slash at the end means something."""
    normal = normal_path(prefix)
    return f"{normal}/" if normal and not normal.endswith("/") and prefix.replace("\\", "/").endswith(("/", "/.")) else normal


def path_problem(path: str) -> str:
    """Why `path` cannot be a file's path in a manifest; empty when it can."""
    parts = path.split("/")
    try:
        data = path.encode()
    except UnicodeEncodeError:
        return f"{path[:80].encode(errors='backslashreplace').decode()!r} is not UTF-8: rename it"
    # What file systems and S3 keys take.
    if not path or len(data) > MAX_PATH:
        return f"{path[:80]!r}: a path of 1 to {MAX_PATH} bytes is needed"
    if any(len(p.encode()) > MAX_NAME for p in parts):
        return f"{path[:80]!r}...: no part of a path may have more than {MAX_NAME} bytes"
    if path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
        return f"{path[:80]!r} must be relative, with forward slashes and without '.' or '..' parts"
    return ""
