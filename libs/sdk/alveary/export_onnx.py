"""Runs inside an export run, in the model's own environment: `python -m alveary.export_onnx --model DIR --order JSON`.

Loads the model, exports it, compares ONNX Runtime with PyTorch on random inputs of two batch sizes, and writes
outputs/model.onnx and outputs/report.json. Nothing but this process ever unpickles the model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

OUTPUTS = Path("outputs")
BATCHES = (1, 3)
TOLERANCE = 1e-3


class CannotExport(Exception):
    """The text says why, for the user."""


def load(torch: Any, path: Path, order: dict[str, Any]) -> Any:
    """The model in `path`, as something that can be called.

    Raises:
        CannotExport: the file holds none, or its classes cannot be found.
    """
    sys.path.insert(0, ".")
    if path.suffix == ".pt2":
        return torch.export.load(str(path)).module()
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError:
        pass  # not TorchScript: a pickle, then
    _offer_main(order.get("entry_script", ""))
    try:
        loaded = torch.load(str(path), map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        raise CannotExport(f"{path.name} needs a class that the run's source does not have: {error}") from error
    except Exception as error:
        raise CannotExport(f"{path.name} is not a file that torch can load: {type(error).__name__}: {error}") from error
    if isinstance(loaded, torch.nn.Module):
        return loaded
    if order.get("factory"):
        return _from_state(torch, loaded, order["factory"])
    if isinstance(loaded, dict):
        raise CannotExport(
            f"{path.name} holds a state_dict, which has weights but no architecture: save the whole module with torch.save(model, ...), "
            "or name a factory 'module:callable' of the run's source that builds it"
        )
    raise CannotExport(f"{path.name} holds a {type(loaded).__name__}, not an nn.Module")


def _from_state(torch: Any, state: Any, factory: str) -> Any:
    module_name, _, attribute = factory.partition(":")
    try:
        build: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            build = getattr(build, part)
        model = build()
    except Exception as error:
        raise CannotExport(f"the factory {factory!r} failed: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CannotExport(f"the weights do not fit what {factory!r} builds: {error}") from error
    return model


def _offer_main(entry_script: str) -> None:
    """Classes that were pickled in a script's __main__ are looked up there: take them from the script."""
    if not entry_script or not Path(entry_script).exists():
        return
    sys.path.insert(0, str(Path(entry_script).parent))
    try:
        names = runpy.run_path(entry_script, run_name="__alveary_export__")
    except BaseException as error:
        print(f"note: {entry_script} cannot be imported ({type(error).__name__}: {error}); its own classes are not available")
        return
    for name, value in names.items():
        if isinstance(value, type) or callable(value):
            setattr(sys.modules["__main__"], name, value)


def random_inputs(torch: Any, tensors: list[dict[str, Any]], batch: int) -> tuple[Any, ...]:
    """Random inputs with `batch` in place of dimension 0 (where that is dynamic)."""
    made = []
    for tensor in tensors:
        shape = [int(d) for d in tensor["shape"]]
        if 0 in tensor["dynamic_axes"]:
            shape[0] = batch
        dtype = getattr(torch, tensor["dtype"])
        if dtype == torch.bool:
            made.append(torch.rand(shape) > 0.5)
        elif dtype.is_floating_point:
            made.append(torch.randn(shape, dtype=dtype))
        else:
            made.append(torch.randint(0, 2, shape, dtype=dtype))
    return tuple(made)


def export(torch: Any, model: Any, order: dict[str, Any], target: Path) -> dict[str, Any]:
    """Export and check; returns the report.

    Raises:
        CannotExport: torch cannot export it, or the result differs from PyTorch.
    """
    tensors = [
        {
            "name": t.get("name") or f"input_{i}", "shape": [int(d) for d in t["shape"]], "dtype": t.get("dtype") or "float32",
            "dynamic_axes": {int(k): v for k, v in (t.get("dynamic_axes") or {0: "batch"}).items()},
        }
        for i, t in enumerate(order["inputs"])
    ]  # fmt: skip
    if hasattr(model, "eval") and type(model).__name__ != "GraphModule":
        model.eval()
    dynamic = any(0 in t["dynamic_axes"] for t in tensors)
    batches = BATCHES if dynamic else (int(tensors[0]["shape"][0]),)
    # A batch of one would be taken for a constant.
    example = random_inputs(torch, tensors, 2)
    started = time.monotonic()
    with torch.no_grad():
        try:
            model(*example)
        except Exception as error:
            shapes = ", ".join(str(list(e.shape)) for e in example)
            raise CannotExport(f"the model does not accept inputs of shape {shapes}: {type(error).__name__}: {error}") from error
        exporter = _run_exporter(torch, model, example, tensors, order, target)
    seconds = time.monotonic() - started
    absolute, relative = _compare(torch, model, tensors, batches, target, float(order.get("tolerance") or TOLERANCE))
    import onnx

    proto = onnx.load(str(target), load_external_data=False)
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return {
        "opset": opset, "max_abs_diff": absolute, "max_rel_diff": relative, "checked_batch_sizes": list(batches),
        "export_seconds": seconds, "exporter": exporter, "inputs": tensors,
    }  # fmt: skip


def _run_exporter(torch: Any, model: Any, example: Any, tensors: list[dict[str, Any]], order: dict[str, Any], target: Path) -> str:
    names = [t["name"] for t in tensors]
    options: dict[str, Any] = {"input_names": names}
    if order.get("output_names"):
        options["output_names"] = list(order["output_names"])
    if order.get("opset"):
        options["opset_version"] = int(order["opset"])
    scripted = isinstance(model, torch.jit.ScriptModule)
    try:
        if scripted:
            axes = {t["name"]: t["dynamic_axes"] for t in tensors}
            torch.onnx.export(model, example, str(target), dynamo=False, dynamic_axes=axes, **options)
            return f"torch {torch.__version__} torchscript"
        dims: dict[str, Any] = {}
        shapes = tuple({axis: dims.setdefault(name, torch.export.Dim(name)) for axis, name in t["dynamic_axes"].items()} for t in tensors)
        torch.onnx.export(model, example, str(target), dynamo=True, dynamic_shapes=shapes, external_data=False, **options)
        return f"torch {torch.__version__} dynamo"
    except Exception as error:
        text = str(error).strip().splitlines()
        raise CannotExport(f"torch cannot export it: {type(error).__name__}: {text[0] if text else ''}") from error


def _compare(
    torch: Any, model: Any, tensors: list[dict[str, Any]], batches: tuple[int, ...], target: Path, tolerance: float
) -> tuple[float, float]:
    import numpy
    import onnxruntime

    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    absolute = relative = 0.0
    for batch in batches:
        inputs = random_inputs(torch, tensors, batch)
        with torch.no_grad():
            expected = model(*inputs)
        expected_list = (
            list(expected.values()) if isinstance(expected, dict) else list(expected) if isinstance(expected, (tuple, list)) else [expected]
        )
        actual = session.run(None, {n: i.numpy() for n, i in zip(names, inputs, strict=False)})
        for want_tensor, got in zip(expected_list, actual, strict=False):
            want = want_tensor.numpy()
            if want.shape != got.shape:
                raise CannotExport(f"with a batch of {batch} PyTorch answers shape {want.shape}, ONNX Runtime {got.shape}")
            difference = numpy.abs(want.astype("float64") - got.astype("float64"))
            scale = numpy.abs(want.astype("float64"))
            absolute = max(absolute, float(difference.max(initial=0.0)))
            relative = max(relative, float((difference / numpy.maximum(scale, 1e-6)).max(initial=0.0)))
            if not bool((difference <= tolerance + tolerance * scale).all()):
                raise CannotExport(
                    f"ONNX Runtime differs from PyTorch by {float(difference.max()):.3g} with a batch of {batch}, more than the tolerance of {tolerance:g}"
                )
    return absolute, relative


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

        torch.manual_seed(0)
        print(f"loading {order['file']} with torch {torch.__version__}")
        model = load(torch, Path(arguments.model, order["file"]), order)
        report = export(torch, model, order, OUTPUTS / "model.onnx")
        print(f"opset {report['opset']}, differs from PyTorch by {report['max_abs_diff']:.3g} on batches {report['checked_batch_sizes']}")
    except ImportError as error:
        report = {"error": f"the model's environment lacks {error.name}, which an export needs"}
    except CannotExport as error:
        report = {"error": str(error)}
    (OUTPUTS / "report.json").write_text(json.dumps(report, indent=1))
    if "error" in report:
        (OUTPUTS / "model.onnx").unlink(missing_ok=True)
        print(report["error"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
