"""Requirements files, read as pip reads them. What cannot be taken is refused by file and line, before anything is submitted."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from alveary.errors import AlvearyError
from alveary.source import warn

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_COMMENT = re.compile(r"(^|\s+)#.*$")
_OPTION = re.compile(r"(--[\w-]+|-\w)[=\s]*(.*)")
_VARIABLE = re.compile(r"\$\{[A-Z0-9_]+\}")
_HASHES = re.compile(r"\s--hash(?:=|\s+)\S+")
_VCS = re.compile(r"(git|hg|svn|bzr)\+")
_INCLUDES, _EDITABLE = ("-r", "--requirement"), ("-e", "--editable")
_INDEXES = ("-i", "--index-url", "--pypi-url", "--extra-index-url", "--no-index", "-f", "--find-links", "--trusted-host")
_WHY = {
    **dict.fromkeys(_INDEXES, "indexes come from the platform's pip settings: remove the line"),
    **dict.fromkeys(_EDITABLE, "a run has its source directory already, and nothing else of this machine: list what that needs instead"),
    **dict.fromkeys(("-c", "--constraint"), "constraints are not taken: write the versions into the requirements"),
}


def requirements_of(file: Path) -> list[str]:
    """Requirements of a file and of those it names with -r, in order.

    UTF-8 and UTF-16 with or without a byte order mark, PEP 263 comments, continued lines, comments and environment markers are read
    as pip reads them. Hashes are left out with a word: an environment's build locks its own.

    Raises:
        AlvearyError: it is missing, no text, or has something that is not taken; names file and line.
    """
    found: list[str] = []
    hashed = _read(file, found, ())
    if hashed:
        warn(f"{file}: the hashes of {hashed} requirements are not compared: the versions hold, and the build locks hashes of its own")
    return found


def _read(file: Path, found: list[str], above: tuple[Path, ...]) -> int:
    """Add a file's requirements; returns how many had hashes."""
    where = file.resolve()
    if where in above:
        raise AlvearyError(f"the requirements file {file} includes itself", "INVALID_ARGUMENT")
    hashed = 0
    for number, line in _lines(_text(file)):
        text = _COMMENT.sub("", line).strip()
        at = f"{file}, line {number}: {text[:200]!r}"
        if not text:
            continue
        if _VARIABLE.search(text):
            raise AlvearyError(f"{at}: variables are not expanded, as what they hold would be kept with every run", "INVALID_ARGUMENT")
        if text.startswith("-"):
            option = _OPTION.match(text)
            name, value = (option[1], option[2].strip().strip("'\"")) if option else (text, "")
            if name in _INCLUDES and value and "://" not in value:
                hashed += _read(file.parent / value, found, (*above, where))
            elif name != "--require-hashes":
                raise AlvearyError(f"{at}: {_WHY.get(name, 'this option is not taken: remove the line')}", "INVALID_ARGUMENT")
            continue
        bare = _HASHES.sub("", " " + text).strip()
        hashed += bare != text
        if match := re.search(r"\s(--[\w-]+)", bare):
            raise AlvearyError(f"{at}: {match[1]} is not taken: remove it", "INVALID_ARGUMENT")
        if problem := requirement_problem(bare):
            raise AlvearyError(f"{at}: {problem}", "INVALID_ARGUMENT")
        found.append(bare)
    return hashed


def requirement_problem(text: str) -> str:
    """Why `text` cannot be a requirement of an environment; empty when it can."""
    from packaging.requirements import InvalidRequirement, Requirement

    text = text.strip()
    if not text or "\n" in text:
        return "one requirement is needed"
    if text.startswith("-"):
        return "options are not taken"
    if _VCS.match(text):
        egg = re.search(r"#(?:.*&)?egg=([\w.-]+)", text)
        return f"write it as '{egg[1] if egg else 'name'} @ {text.partition('#')[0]}'"
    if re.match(r"(https?|file)://", text) or (text.startswith("/") and text.endswith(".whl")):
        return _missing(text)
    if text.startswith((".", "/", "~")) or re.match(r"[A-Za-z]:\\", text):
        return "files of this machine are not taken: build a wheel and name it by its URL, or put the code into the source directory"
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        if match := re.match(r"([A-Za-z0-9][\w.-]*(?:\[[^\]]*\])?)\s*=\s*([^=\s;,]+)", text):
            return f"write it as '{match[1]}=={match[2]}'"
        return f"it is no requirement: {str(error).splitlines()[0]}"
    return _missing(requirement.url or "")


def _missing(url: str) -> str:
    path = unquote(urlsplit(url).path) if url.startswith("file:") else url if url.startswith("/") else ""
    if path and not Path(path).exists():
        return f"there is no {path} on this machine: name a version instead, like 'name==1.2'"
    return ""


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise AlvearyError(f"the requirements file {file} does not exist", "NOT_FOUND") from error
    except OSError as error:
        raise AlvearyError(f"the requirements file {file} cannot be read: {error.strerror}", "INVALID_ARGUMENT") from error
    encoding = next((name for bom, name in _BOMS if data.startswith(bom)), "")
    data = data.removeprefix(next((bom for bom, name in _BOMS if name == encoding), b""))
    if not encoding and b"\0" in data[:64]:  # PowerShell's, without its mark
        encoding = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    if not encoding:
        declared = next((m[1].decode() for line in data.split(b"\n")[:2] if (m := _CODING.match(line))), "")
        encoding = declared or "utf-8"
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise AlvearyError(f"{file}: there is no encoding {encoding!r}", "INVALID_ARGUMENT") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise AlvearyError(f"{file}, line {line}: it is not {encoding.upper()}: save it as UTF-8", "INVALID_ARGUMENT") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, those that end in a backslash joined with the next."""
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        comment = _COMMENT.match(line) is not None
        if line.endswith("\\") and not comment:
            first = first or number
            joined += line.strip("\\")
            continue
        yield first or number, joined + (" " + line if comment else line)
        joined, first = "", 0
    if first:
        yield first, joined
