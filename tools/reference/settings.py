"""Settings: every pydantic settings class of libs/ and services/, with the comments above its fields."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reference.markdown import page, plain, table

ROOT = Path(__file__).resolve().parents[2]
_INTRODUCTION = """
Services read their settings from environment variables. `alveary up` and `docker-compose.yml` set most of them; set others in the
environment of the process that starts the platform. A variable named `ALVEARY_TRAINER_<NAME>` reaches the trainers of `alveary up`
as `ALVEARY_<NAME>`.
""".strip()


@dataclass(frozen=True)
class Setting:
    """One field of a settings class."""

    variable: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class SettingsClass:
    """A settings class and the file that defines it, relative to the repository."""

    name: str
    file: str
    text: str
    fields: tuple[Setting, ...]


def _comment_above(lines: list[str], line: int) -> str:
    """The comment that ends just above a line (counted from 1)."""
    found: list[str] = []
    for text in reversed(lines[: line - 1]):
        if not text.strip().startswith("#"):
            break
        found.insert(0, text.strip().removeprefix("#").strip())
    return " ".join(found)


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
        return _default(value)
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("SecretStr", "Path"):
        value = value.args[0]
    return ast.unparse(value).strip("'\"") if value is not None else ""


def settings_classes(root: Path = ROOT) -> Iterator[SettingsClass]:
    """All of them, by file."""
    for file in sorted([*root.glob("libs/*/*/**/*.py"), *root.glob("services/*/*/**/*.py")]):
        source = file.read_text()
        if "Settings)" not in source:
            continue
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ClassDef) or not any(ast.unparse(base).endswith("Settings") for base in node.bases):
                continue
            fields = tuple(
                Setting(
                    f"ALVEARY_{item.target.id.upper()}",
                    ast.unparse(item.annotation),
                    _default(item.value),
                    _comment_above(lines, item.lineno),
                )
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
            yield SettingsClass(node.name, str(file.relative_to(root)), ast.get_docstring(node) or "", fields)


def render() -> str:
    """The page."""
    sections = []
    for found in settings_classes():
        rows = [
            (f"`{f.variable}`", f"`{f.type}`".replace("|", r"\|"), f"`{f.default}`" if f.default else "", plain(f.text))
            for f in found.fields
        ]
        sections.append(f"## {found.name}\n\n{plain(found.text)} Defined in `{found.file}`.")
        sections.append(table(("Variable", "Type", "Default", "Meaning"), rows))
    return page("Settings", _INTRODUCTION, *(s for s in sections if s))
