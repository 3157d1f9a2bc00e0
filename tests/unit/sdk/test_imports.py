"""No module of the SDK imports itself by way of others: imports in functions, for type checkers and lazy ones count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import alveary

ROOT = Path(alveary.__file__).parent


def modules() -> dict[str, Path]:
    """The files of the SDK by module name."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = ("alveary", *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path, known: set[str]) -> Iterator[str]:
    """Modules of the SDK that a file names in an import, wherever it stands, or gives to LazyModule."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names if alias.name in known)
            case ast.ImportFrom(module=str(module)) if module in known:
                for alias in node.names:
                    full = f"{module}.{alias.name}"
                    yield full if full in known else module
            case ast.Call(func=ast.Name(id="LazyModule"), args=[ast.Constant(value=str(module))]) if module in known:
                yield module


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty: there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    for name in sorted(graph):
        if found := visit(name, []):
            return found
    return []


def test_no_circle_of_imports() -> None:
    files = modules()
    graph = {name: set(imported(file, set(files))) for name, file in files.items()}
    assert graph["alveary.run"], "imports are found at all"
    assert not circle(graph), " -> ".join(circle(graph))


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
