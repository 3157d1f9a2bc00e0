"""The SDK: every public name of the package `alveary`, with signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import alveary
from reference.markdown import page, plain

# Public classes that users receive from others rather than import.
RECEIVED = ("alveary.script_run:ContextRun", "alveary.events:Events", "alveary.events:Event")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Note|Example):\s*$", re.MULTILINE)
_INTRODUCTION = """
Names, parameters and return types follow Azure ML's SDK v1. Import every class from `alveary`. Inside a training script,
`Run.get_context()` returns a [ContextRun](#contextrun), which needs nothing but the standard library.
""".strip()


def public_classes() -> Iterator[tuple[str, type]]:
    """(name, class) of everything that the page describes, by name."""
    for name in alveary.__all__:
        value = getattr(alveary, name)
        if isinstance(value, type):
            yield name, value
    for place in RECEIVED:
        module, _, name = place.partition(":")
        yield name, getattr(importlib.import_module(module), name)


def _doc(value: Any) -> str:
    """A docstring as Markdown: paragraphs, then its sections as lists."""
    text = inspect.getdoc(value) or ""
    head, *rest = _SECTION.split(text)
    parts = [_paragraph(p) for p in re.split(r"\n\s*\n", head.strip()) if p.strip()]
    for title, body in zip(rest[::2], rest[1::2]):
        items = re.split(r"\n(?=\S)", inspect.cleandoc(body))
        parts.append(f"**{title}**\n\n" + "\n".join(f"- {plain(item)}" for item in items if item.strip()))
    return "\n\n".join(parts)


def _paragraph(text: str) -> str:
    if text.startswith("    ") or ">>>" in text:
        return f"```python\n{inspect.cleandoc(text)}\n```"
    return plain(text)


class _Source(str):
    """An annotation as it stands in the source: postponed annotations would be shown in quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = [p.replace(annotation=_source(p.annotation)) for p in found.parameters.values()]
    return f"{name}{found.replace(parameters=parameters, return_annotation=_source(found.return_annotation))}"


def _source(annotation: Any) -> Any:
    return _Source(annotation) if isinstance(annotation, str) else annotation


def _wrapped(signature: str) -> str:
    """One parameter a line where the signature is long."""
    if len(signature) <= 88:
        return signature
    head, _, rest = signature.partition("(")
    depth, start, parts = 0, 0, []
    for i, letter in enumerate(rest):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 0:
            parts.append(rest[start:i].strip())
            start = i + 1
        if depth < 0:
            return f"{head}(\n    " + ",\n    ".join([*parts, rest[start:i].strip()]) + f",\n){rest[i + 1 :]}"
    return signature


def _member(owner: str, name: str, value: Any) -> str:
    if isinstance(value, property):
        kind = getattr(value.fget, "__annotations__", {}).get("return", "")
        return f"#### {name} {{ #{owner.lower()}-{name.lower()} }}\n\nProperty{f' of type `{kind}`' if kind else ''}. {_doc(value)}"
    code = inspect.unwrap(value.__func__) if isinstance(value, (classmethod, staticmethod)) else value
    signature = _wrapped(_signature(name, code))
    return f"#### {name}() {{ #{owner.lower()}-{name.lower()} }}\n\n```python\n{signature}\n```\n\n{_doc(value)}"


def _members(value: type, public: set[type]) -> dict[str, Any]:
    """Members of a class and of its bases that have no section of their own."""
    found: dict[str, Any] = {}
    for owner in reversed(value.__mro__):
        if owner.__module__.startswith("alveary") and (owner is value or owner not in public):
            found |= vars(owner)
    return found


def _class(name: str, value: type, public: set[type]) -> str:
    bases = [b for b in value.__mro__[1:] if b in public]
    parts = [f"## {name}", f"`{value.__module__}.{value.__qualname__}`", _doc(value)]
    if bases:
        parts.append("Inherits from " + ", ".join(f"[{b.__name__}](#{b.__name__.lower()})" for b in bases) + ".")
    init = next((vars(b)["__init__"] for b in value.__mro__ if "__init__" in vars(b) and b.__module__.startswith("alveary")), None)
    if init and not issubclass(value, BaseException):
        parts += [f"```python\n{_wrapped(_signature(name, value))}\n```", _doc(init) if init.__doc__ else ""]
    for member, found in sorted(_members(value, public).items()):
        if not member.startswith("_") and (callable(found) or isinstance(found, (property, classmethod, staticmethod))):
            parts.append(_member(name, member, found))
    return "\n\n".join(part for part in parts if part)


def render() -> str:
    """The page."""
    classes = dict(public_classes())
    return page("Python SDK", _INTRODUCTION, *(_class(name, value, set(classes.values())) for name, value in classes.items()))
