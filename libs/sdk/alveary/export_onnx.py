"""Runs inside an export run, in the model's own environment: `python -m alveary.export_onnx --model DIR --order JSON`.

Loads the model, exports it, compares ONNX Runtime with PyTorch on random inputs of two batch sizes, and writes
outputs/model.onnx and outputs/report.json. Nothing but this process ever unpickles the model. What the run's script did beside
defining the model's classes is not done again (`alveary._definitions`), and `Run.get_context()` is an offline run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alveary import _definitions
from alveary._onnx import CannotExport, export

OUTPUTS = Path("outputs")
_APART = 'put what trains under `if __name__ == "__main__":`, or the class into a module of its own, and run it once more'


def load(torch: Any, path: Path, order: dict[str, Any], source: Path) -> Any:
    """The model in `path`, as something that can be called. `source`: the run's source directory.

    Raises:
        CannotExport: the file holds none, or its classes cannot be found.
    """
    if path.suffix == ".pt2":
        return torch.export.load(str(path)).module()
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError:
        pass  # not TorchScript: a pickle, then
    classes = Classes(path.name, source, order.get("entry_script", ""))
    try:
        loaded = torch.load(str(path), map_location="cpu", weights_only=False, pickle_module=classes.pickle_module())
    except CannotExport:
        raise
    except _definitions.NotDefined as error:
        raise CannotExport(f"{path.name} cannot be loaded: {error}; {_APART}") from error
    except (AttributeError, ImportError) as error:
        raise CannotExport(f"{path.name} needs a class that the run's source does not have: {error}") from error
    except Exception as error:
        raise CannotExport(f"{path.name} is not a file that torch can load: {type(error).__name__}: {error}") from error
    if isinstance(loaded, dict):
        modules = {k: v for k, v in loaded.items() if isinstance(v, torch.nn.Module)}
        if len(modules) == 1:
            loaded = next(iter(modules.values()))
    if isinstance(loaded, torch.nn.Module):
        return unwrapped(loaded)
    if order.get("factory"):
        return _from_state(loaded, order["factory"])
    if isinstance(loaded, dict):
        known = _definitions.modules_of(source)
        example = f", for example factory={known[0]!r}" if known else ""
        raise CannotExport(
            f"{path.name} holds a state_dict, which has weights but no architecture: save the whole module with torch.save(model, ...), "
            f"or name a factory 'module:callable' of the run's source that builds it{example}"
        )
    raise CannotExport(f"{path.name} holds a {type(loaded).__name__}, not an nn.Module")


def unwrapped(model: Any) -> Any:
    """The module inside of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        kind = type(model).__name__
        if kind in ("DataParallel", "DistributedDataParallel") and hasattr(model, "module"):
            model = model.module
        elif kind == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


class Classes:
    """Where the classes of a pickle are."""

    def __init__(self, file: str, source: Path, entry_script: str) -> None:
        self._file, self._source = file, source
        entry = source / entry_script
        self._entry = entry if entry_script and entry.is_file() else None

    def pickle_module(self) -> types.ModuleType:
        """`pickle` with an Unpickler that finds classes here."""
        find = self.find

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                return find(super().find_class, module, name)

        made = types.ModuleType("alveary_pickle")
        made.__dict__.update({k: v for k, v in vars(pickle).items() if not k.startswith("__")})
        made.__dict__["Unpickler"] = Unpickler
        return made

    def find(self, default: Callable[[str, str], Any], module: str, name: str) -> Any:
        """The class or function `name` of `module`.

        Raises:
            CannotExport: it is nowhere.
        """
        if module in ("__main__", "__mp_main__"):
            return self._of_script(name)
        if (module, name) == ("torch.nn.parallel.distributed", "DistributedDataParallel"):
            return _distributed()
        try:
            return default(module, name)
        except (ImportError, AttributeError) as error:
            for folder in self._folders_of(module):
                sys.path.append(str(folder))
                importlib.invalidate_caches()
                sys.modules.pop(module, None)
                try:
                    return default(module, name)
                except (ImportError, AttributeError):
                    continue
            raise CannotExport(
                f"{self._file} needs {module}.{name}, which neither the run's source nor its environment has: {error}"
            ) from error

    def _folders_of(self, module: str) -> list[Path]:
        """Folders of the source that `module` can be imported from."""
        parts = module.split(".")
        files = [*self._source.rglob(str(Path(*parts).with_suffix(".py"))), *self._source.rglob(str(Path(*parts, "__init__.py")))]
        return sorted({f.parents[len(parts) - (f.name != "__init__.py")] for f in files})

    def _of_script(self, name: str) -> Any:
        first, *rest = name.split(".")
        missing: Exception | None = None
        for script in self._scripts(first):
            module = _definitions.script_module(
                script, self._source, "__alveary_main__" if script == self._entry else f"__alveary_{script.stem}__"
            )
            try:
                found = getattr(module, first)
                for part in rest:
                    found = getattr(found, part)
                return found
            except AttributeError as error:
                missing = error
        where = self._entry.name if self._entry else "its script"
        raise CannotExport(
            f"{self._file} needs the class {name} of {where}, and no file of the run's source defines it: define it at the top of "
            "a file of the source, or save a TorchScript model or torch.export's"
        ) from missing

    def _scripts(self, name: str) -> list[Path]:
        others = [f for f in _definitions.files_that_define(self._source, name) if f != self._entry]
        if self._entry is None and len(others) > 1:
            names = ", ".join(str(f.relative_to(self._source)) for f in others)
            raise CannotExport(f"{self._file} needs the class {name} of the run's script, and several files define one: {names}")
        return [*([self._entry] if self._entry else []), *others]


def _distributed() -> type:
    """Stands for DistributedDataParallel, which cannot be unpickled outside a process group."""
    import torch

    return type("DistributedDataParallel", (torch.nn.Module,), {"forward": lambda self, *a, **k: self.module(*a, **k)})


def _from_state(state: Any, factory: str) -> Any:
    module_name, _, attribute = factory.partition(":")
    try:
        build: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            build = getattr(build, part)
        model = build()
    except _definitions.NotDefined as error:
        raise CannotExport(f"the factory {factory!r}: {error}; {_APART}") from error
    except Exception as error:
        raise CannotExport(f"the factory {factory!r} failed: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    for prefix in ("_orig_mod.", "module."):  # of torch.compile and DataParallel
        if isinstance(state, dict) and state and all(str(k).startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CannotExport(f"the weights do not fit what {factory!r} builds: {error}") from error
    return model


def quiet(source: Path, entry_script: str) -> None:
    """Let code of the source find its modules, and report to no trainer."""
    os.environ.pop("ALVEARY_SOCKET", None)
    os.environ |= {"ALVEARY_EXPORT": "1", "WANDB_MODE": "disabled"}
    sys.argv = [entry_script or "train.py"]
    folders = [source, (source / entry_script).parent] if entry_script else [source]
    sys.path[:0] = [str(f) for f in dict.fromkeys(folders)]
    _definitions.install(source)


def main() -> int:
    """Do what the order says; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--order", required=True)
    arguments = parser.parse_args()
    order = json.loads(arguments.order)
    OUTPUTS.mkdir(exist_ok=True)
    report: dict[str, Any]
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        import torch

        source = Path.cwd()
        quiet(source, order.get("entry_script", ""))
        torch.manual_seed(0)
        print(f"loading {order['file']} with torch {torch.__version__}")
        model = load(torch, Path(arguments.model, order["file"]), order, source)
        report = export(torch, model, order, OUTPUTS / "model.onnx")
        print(f"opset {report['opset']}, differs from PyTorch by {report['max_abs_diff']:.3g} on batches {report['checked_batch_sizes']}")
    except ImportError as error:
        report = {"error": f"the model's environment lacks {error.name}, which an export needs"}
    except CannotExport as error:
        report = {"error": str(error)}
    except _definitions.NotDefined as error:
        report = {"error": f"{error}; {_APART}"}
    (OUTPUTS / "report.json").write_text(json.dumps(report, indent=1))
    if "error" in report:
        (OUTPUTS / "model.onnx").unlink(missing_ok=True)
        print(report["error"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
