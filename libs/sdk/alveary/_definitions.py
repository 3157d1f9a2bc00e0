"""Classes and functions of a source directory, without running what else its scripts do.

A pickled model names its classes; those stand in a script that would train again if it were run or imported. So of a module that does
more than define, only the statements are executed that a name is made of: its own definition, what that refers to,
what these refer to, and so on. Calls that stand for themselves (`train()`, `run.register_model(...)`), loops and assignments that
no needed name depends on are never executed. Standard library alone: this runs in training environments.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import operator
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Calls of methods that fill what they are called on: registries, parsers, lists.
_FILLING = {
    "add", "add_argument", "add_argument_group", "add_mutually_exclusive_group", "add_parser", "append", "appendleft", "extend", "insert",
    "register", "set_defaults", "setdefault", "update",
}  # fmt: skip
# Calls that stand for themselves, and that definitions after them depend on.
_SETTINGS = {
    "os.environ.setdefault", "os.environ.update", "random.seed", "sys.path.append", "sys.path.extend", "sys.path.insert", "torch.manual_seed",
    "torch.set_default_dtype", "torch.set_default_tensor_type", "torch.set_float32_matmul_precision", "warnings.filterwarnings",
    "warnings.simplefilter", "logging.basicConfig", "numpy.random.seed", "np.random.seed", "torch.set_num_threads",
}  # fmt: skip
_ALWAYS = {name for name in _SETTINGS if name.startswith(("sys.path", "torch.set_default"))}
# Modules whose functions only make values.
_MAKERS = {
    "abc", "argparse", "collections", "contextlib", "dataclasses", "dict", "enum", "float", "frozenset", "functools", "int", "itertools", "len",
    "list", "logging", "math", "namedtuple", "nn", "operator", "os", "Path", "pathlib", "partial", "range", "re", "set", "sorted", "str", "sum",
    "tuple", "torch", "TypeVar", "typing", "max", "min", "bool", "np", "numpy", "F",
}  # fmt: skip
_READS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class NotDefined(Exception):
    """A name cannot be had without running the script; the text says why."""


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of such an expression; empty: it is another."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _root(node: ast.AST) -> str:
    """The variable that an expression like `a.b[c].d` begins with; empty: none."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_guard(node: ast.AST) -> bool:
    """Whether this is `if __name__ == "__main__":`."""
    return (
        isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and any(_root(n) == "__name__" for n in (node.test.left, *node.test.comparators))
    )  # fmt: skip


def defines_only(body: Sequence[ast.stmt]) -> bool:
    """Whether executing these statements does no more than define things."""
    return all(_defines(node) for node in body)


def _defines(node: ast.stmt) -> bool:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Global():
            return True
        case ast.If():
            return is_guard(node) or (_makes(node.test) and defines_only(node.body) and defines_only(node.orelse))
        case ast.Try():
            return all(defines_only(part) for part in (node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)))
        case ast.Expr():
            return isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and dotted(node.value.func) in _SETTINGS)
        case ast.Assign() | ast.AugAssign():
            return _makes(node.value)
        case ast.AnnAssign():
            return node.value is None or _makes(node.value)
    return False


def _makes(value: ast.AST) -> bool:
    """Whether an expression calls nothing but what makes values."""
    calls = [n for n in ast.walk(value) if isinstance(n, ast.Call)]
    return all(_root(call.func) in _MAKERS and dotted(call.func) not in ("torch.load", "os.system") for call in calls)


class Definitions:
    """One module of the source: what its names are made of."""

    def __init__(self, file: Path, source: Path) -> None:
        """Raises SyntaxError or UnicodeDecodeError where it is no Python."""
        self.file, self._source = file, source
        self.tree = ast.parse(file.read_bytes(), str(file))
        self.done: set[tuple[int, int, str]] = set()
        future = [a.name for n in self.tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__" for a in n.names]
        self._flags = functools.reduce(operator.or_, (getattr(__future__, name).compiler_flag for name in future), 0)
        self._definitions = {n.name for n in ast.walk(self.tree) if isinstance(n, _DEFINITIONS)}
        self._imported = {
            (a.asname or a.name).partition(".")[0]
            for n in ast.walk(self.tree) if isinstance(n, (ast.Import, ast.ImportFrom))
            for a in n.names if not self._is_source(n, a.name)
        }  # fmt: skip

        # Training is under a guard: importing the rest is what its author meant.
        self.guarded = any(is_guard(node) for node in self.tree.body)
        self.imported = False

    @property
    def defines_only(self) -> bool:
        """Whether importing it does no more than define."""
        return defines_only(self.tree.body)

    def _is_source(self, node: ast.Import | ast.ImportFrom, name: str) -> bool:
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else name
        if isinstance(node, ast.ImportFrom) and node.level:
            return True
        first = module.partition(".")[0]
        return any((folder / first).is_dir() or (folder / f"{first}.py").is_file() for folder in {self._source, self.file.parent})

    def slice(self, name: str) -> list[ast.stmt]:
        """The statements that `name` is made of, in their order, without those of `done`; empty: nothing binds it."""
        needed = {name}
        while True:
            kept = list(self._prune(self.tree.body, needed))
            more = needed.union(*(self._reads(node) for node in kept))
            if more == needed:
                return kept
            needed = more

    def _reads(self, node: ast.stmt) -> set[str]:
        """Global names that a statement reads, now or when what it defines is called."""
        found: set[str] = set()
        todo = [self.compile(node)]
        while todo:
            code = todo.pop()
            found |= {str(i.argval) for i in dis.get_instructions(code) if i.opname in _READS}
            # What is looked up by its name, in a registry or by getattr, or named in an annotation.
            found |= {c for c in code.co_consts if isinstance(c, str) and c in self._definitions}
            todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        return found

    def compile(self, node: ast.stmt) -> types.CodeType:
        """One statement as the whole file would have it."""
        code: types.CodeType = compile(
            ast.fix_missing_locations(ast.Module([node], [])), str(self.file), "exec", self._flags, dont_inherit=True
        )
        return code

    def _new(self, node: ast.stmt, what: str = "") -> bool:
        return (node.lineno, node.col_offset, what) not in self.done

    def mark(self, body: Sequence[ast.stmt]) -> None:
        """These were executed."""
        for node in body:
            for inner in ast.walk(node):
                if isinstance(inner, ast.stmt):
                    names = [a.name for a in inner.names] if isinstance(inner, (ast.Import, ast.ImportFrom)) else [""]
                    self.done |= {(inner.lineno, inner.col_offset, n) for n in names}

    def _prune(self, body: Sequence[ast.stmt], needed: set[str]) -> Iterator[ast.stmt]:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    if (node.name in needed or any(self._registers(_root(d), needed) for d in node.decorator_list)) and self._new(node):
                        yield node
                case ast.Import() | ast.ImportFrom():
                    yield from self._imports(node, needed)
                case ast.Assign() | ast.AugAssign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if any(self._changes(t, needed) for t in targets) and self._new(node):
                        yield node
                case ast.Expr(value=ast.Call(func=ast.Attribute() as called)):
                    fills = called.attr in _FILLING and _root(called) in needed - self._imported
                    if (fills or dotted(called) in _ALWAYS) and self._new(node):
                        yield node
                case ast.If() if is_guard(node):
                    yield from self._prune([*node.body, *node.orelse], needed)
                case ast.If() | ast.Try() | ast.With() | ast.For():
                    yield from self._block(node, needed)

    def _registers(self, decorator: str, needed: set[str]) -> bool:
        """Whether a decorator of the source may put what it decorates into something that is needed."""
        if decorator in self._imported:
            return False
        return bool({decorator, *self._touches.get(decorator, ())} & needed)

    @functools.cached_property
    def _touches(self) -> dict[str, set[str]]:
        """By function, and by name from another module of the source: what a call may change."""
        found: dict[str, set[str]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = self._reads(node) - self._imported
            elif isinstance(node, ast.ImportFrom) and self._is_source(node, ""):
                names = {a.asname or a.name for a in node.names}
                found |= dict.fromkeys(names, names)
        return found

    def _changes(self, target: ast.expr, needed: set[str]) -> bool:
        if isinstance(target, (ast.Tuple, ast.List)):
            return any(self._changes(t, needed) for t in target.elts)
        if isinstance(target, ast.Starred):
            return self._changes(target.value, needed)
        if isinstance(target, ast.Name):
            return target.id in needed
        return _root(target) in needed - self._imported

    def _imports(self, node: ast.Import | ast.ImportFrom, needed: set[str]) -> Iterator[ast.stmt]:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return  # compile() has it
        for alias in node.names:
            bound = alias.asname or (alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name)
            if alias.name == "*" and isinstance(node, ast.ImportFrom) and self._is_source(node, ""):
                # Of a module of the source by name: all of it would be executed otherwise.
                for name in sorted(needed & self._offered(node)):
                    if self._new(node, name):
                        yield ast.copy_location(ast.ImportFrom(node.module, [ast.alias(name)], node.level), node)
            elif (bound in needed or alias.name == "*") and self._new(node, alias.name):
                made = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)
                yield ast.copy_location(made, node)

    def _offered(self, node: ast.ImportFrom) -> set[str]:
        """Names that a module of the source binds, of which this script imports all."""
        parts = (node.module or "").split(".") if node.module else []
        folders = [self.file.parents[node.level - 1]] if node.level else [self.file.parent, self._source]
        for folder in folders:
            for file in (
                folder.joinpath(*parts).with_suffix(".py") if parts else folder / "__init__.py",
                folder.joinpath(*parts, "__init__.py"),
            ):
                if file.is_file() and file != self.file:
                    return set(Definitions(file, self._source).bound())
        return set()

    def bound(self) -> Iterator[str]:
        """Names that the module binds at its top level."""
        for node in ast.walk(self.tree):
            if isinstance(node, _DEFINITIONS):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    if alias.name == "*" and isinstance(node, ast.ImportFrom) and self._is_source(node, ""):
                        yield from self._offered(node)
                    else:
                        yield (alias.asname or alias.name).partition(".")[0]

    def _block(self, node: ast.If | ast.Try | ast.With | ast.For, needed: set[str]) -> Iterator[ast.stmt]:
        """The block with those of its statements that are needed."""
        fields = {name: list(self._prune(getattr(node, name), needed)) for name in ("body", "orelse", "finalbody") if hasattr(node, name)}
        handlers = [
            ast.copy_location(ast.ExceptHandler(h.type, h.name, list(self._prune(h.body, needed)) or [_pass(h)]), h)
            for h in getattr(node, "handlers", ())
        ]
        binds = isinstance(node, ast.For) and self._changes(node.target, needed) and self._new(node)
        if not (binds or any(fields.values()) or any(not isinstance(h.body[0], ast.Pass) for h in handlers)):
            return
        made = type(node)(**{name: getattr(node, name) for name in node._fields} | fields)
        made.body = made.body or [_pass(node)]
        if isinstance(made, ast.Try):
            made.handlers = handlers
        yield ast.copy_location(made, node)


def _pass(node: ast.AST) -> ast.stmt:
    return ast.copy_location(ast.Pass(), node)


class SlicedModule(types.ModuleType):
    """A module of which each name is made when it is asked for."""

    def __init__(self, name: str, definitions: Definitions) -> None:
        super().__init__(name)
        self.__dict__["_alveary_definitions"] = definitions
        self.__file__ = str(definitions.file)

    def __getattr__(self, name: str) -> Any:
        definitions: Definitions = self.__dict__["_alveary_definitions"]
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        try:
            self._make(definitions, name)
        except NotDefined:
            if not (definitions.guarded and self._whole()):
                raise
        if name not in self.__dict__ and not (definitions.guarded and self._whole() and name in self.__dict__):
            raise AttributeError(f"{definitions.file.name} defines no {name!r}")
        return self.__dict__[name]

    def _make(self, definitions: Definitions, name: str) -> None:
        body = definitions.slice(name)
        definitions.mark(body)  # before: of modules that import each other, neither is begun twice
        for node in body:
            try:
                exec(definitions.compile(node), self.__dict__)
            except Exception as error:
                text = f"line {getattr(node, 'lineno', 0)} of {definitions.file.name}: {type(error).__name__}: {error}"
                raise NotDefined(f"{name} cannot be had without running {definitions.file.name}: {text}") from error

    def _whole(self) -> bool:
        """Import it as a module that its author meant to be imported: all but what is under its main guard; whether that worked."""
        definitions: Definitions = self.__dict__["_alveary_definitions"]
        if definitions.imported:
            return False
        definitions.imported = True
        try:
            for node in definitions.tree.body:
                if not is_guard(node):
                    exec(definitions.compile(node), self.__dict__)
                    definitions.mark([node])
        except (Exception, SystemExit) as error:
            print(
                f"note: {definitions.file.name} cannot be imported ({type(error).__name__}: {error}): its definitions are taken one by one"
            )
            return False
        return True


class _Loader(importlib.abc.Loader):
    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return SlicedModule(spec.name, self._definitions)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing yet: names are made when they are asked for."""


class Finder(importlib.abc.MetaPathFinder):
    """Imports modules of a source directory: those that do more than define are sliced, all others as ever."""

    def __init__(self, source: Path) -> None:
        self._source = source.resolve()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            return None
        file = Path(spec.origin).resolve()
        if not file.is_relative_to(self._source) or "site-packages" in file.parts:
            return None
        try:
            definitions = Definitions(file, self._source)
        except (SyntaxError, UnicodeDecodeError):
            return None  # importing it as ever says what is wrong
        if definitions.defines_only:
            return None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_Loader(definitions), submodule_search_locations=spec.submodule_search_locations
        )


def install(source: Path) -> None:
    """Let imports of modules below `source` execute what they need to and no more."""
    sys.meta_path.insert(0, Finder(source))


def script_module(file: Path, source: Path, name: str = "__alveary_main__") -> types.ModuleType:
    """The script `file` as a module: imported where that does no more than define, else made name by name.

    Raises:
        NotDefined: it is no Python.
    """
    if name in sys.modules:
        return sys.modules[name]
    try:
        definitions = Definitions(file.resolve(), source.resolve())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise NotDefined(f"{file.name} is no Python that this interpreter can read: {error}") from error
    module = sys.modules[name] = SlicedModule(name, definitions)
    if definitions.defines_only:
        module._whole()
    return module


def files_that_define(source: Path, name: str) -> list[Path]:
    """Python files below `source` that define a class or function `name`."""
    found = []
    for file in sorted(source.rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        if any(isinstance(node, _DEFINITIONS) and node.name == name for node in ast.walk(tree)):
            found.append(file)
    return found


def modules_of(source: Path) -> list[str]:
    """Subclasses of a Module that the source defines, as 'module:Class'."""
    found = []
    for file in sorted(source.rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        module = ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        found += [
            f"{module}:{n.name}" for n in tree.body if isinstance(n, ast.ClassDef) and any(dotted(b).rpartition(".")[2].endswith("Module") for b in n.bases)
        ]  # fmt: skip
    return found
