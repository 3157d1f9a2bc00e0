"""From a PyTorch module to an ONNX file that answers the same: inputs, export, comparison. Part of `alveary.export_onnx`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BATCHES = (1, 3)
TOLERANCE = 1e-3


class CannotExport(Exception):
    """The text says why, for the user."""


@dataclasses.dataclass
class Tensor:
    """One input: its shape with a batch of one, and which axes may vary under which name."""

    name: str
    shape: list[int]
    dtype: str
    dynamic_axes: dict[int, str]

    @classmethod
    def of(cls, index: int, asked: Mapping[str, Any]) -> Tensor:
        axes = {int(k): str(v) for k, v in (asked.get("dynamic_axes") or {0: "batch"}).items()}
        return cls(asked.get("name") or f"input_{index}", [int(d) for d in asked["shape"]], asked.get("dtype") or "float32", axes)


def batch_of(tensors: Sequence[Tensor]) -> str:
    """The name of the dimension that is the batch: that of an axis 0, else one called so, else the first; empty: none varies."""
    names = [(axis, name) for t in tensors for axis, name in sorted(t.dynamic_axes.items())]
    return next((n for axis, n in names if axis == 0), next((n for _, n in names if n == "batch"), names[0][1] if names else ""))


def random_inputs(torch: Any, tensors: Sequence[Tensor], batch: int, least: int = 1) -> tuple[Any, ...]:
    """Random inputs of `batch` samples; other axes that may vary have their size, but at least `least`. Integers are 0 and 1."""
    varies = batch_of(tensors)
    made = []
    for tensor in tensors:
        shape = list(tensor.shape)
        for axis, name in tensor.dynamic_axes.items():
            shape[axis] = batch if name == varies else max(shape[axis], least)
        dtype = getattr(torch, tensor.dtype)
        if dtype == torch.bool:
            made.append(torch.rand(shape) > 0.5)
        elif dtype.is_floating_point:
            made.append(torch.randn(shape, dtype=dtype))
        else:
            made.append(torch.randint(0, 2, shape, dtype=dtype))
    return tuple(made)


def flatten(torch: Any, value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor) of each tensor in tensors, tuples, lists, dicts and data classes, however nested; what is no tensor is left out."""
    if isinstance(value, torch.Tensor):
        yield prefix or "output", value
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(str(k), v) for k, v in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        keys = getattr(value, "_fields", None) or [str(i) if prefix else f"output_{i}" for i in range(len(value))]
        parts = list(zip(keys, value, strict=True))
    for key, one in parts:
        yield from flatten(torch, one, f"{prefix}_{key}" if prefix else re.sub(r"\W", "_", key))


def names_of(flat: Sequence[tuple[str, Any]], taken: Sequence[str]) -> list[str]:
    """The names of outputs, made different from each other and from those of the inputs."""
    found: list[str] = []
    for wanted, _ in flat:
        name = re.sub(r"\W", "_", wanted)
        while name in found or name in taken:
            name += "_"
        found.append(name)
    return found


def adapter(torch: Any, model: Any, names: Sequence[str], by_name: bool) -> Any:
    """`model` as a module that answers a flat tuple of tensors; with `by_name` its inputs are keywords."""

    class Adapter(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            answer = self.model(**dict(zip(names, inputs, strict=True))) if by_name else self.model(*inputs)
            seen, flat = list(inputs), []
            for _, tensor in flatten(torch, answer):
                # ONNX has no output that is an input, or another output.
                flat.append(tensor.clone() if any(tensor is other for other in seen) else tensor)
                seen.append(tensor)
            return tuple(flat)

    return Adapter()


def takes_by_name(torch: Any, model: Any, names: Sequence[str]) -> bool:
    """Whether the inputs are named as parameters of `forward` that are not the first ones, in this order."""
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ == "GraphModule":
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return set(names) <= set(parameters) and list(names) != parameters[: len(names)]


def export(torch: Any, model: Any, order: dict[str, Any], target: Path) -> dict[str, Any]:
    """Export and check; returns the report.

    Raises:
        CannotExport: torch cannot export it, or the result differs from PyTorch.
    """
    tensors = [Tensor.of(i, t) for i, t in enumerate(order["inputs"])]
    names = [t.name for t in tensors]
    if hasattr(model, "eval") and type(model).__name__ != "GraphModule":
        model.eval()
    by_name = takes_by_name(torch, model, names)
    batches = BATCHES if batch_of(tensors) else (tensors[0].shape[0],)
    # A size of one would be taken for a constant.
    example = random_inputs(torch, tensors, 2, least=2)
    with torch.no_grad():
        try:
            answer = model(**dict(zip(names, example, strict=True))) if by_name else model(*example)
        except Exception as error:
            shapes = ", ".join(str(list(e.shape)) for e in example)
            raise CannotExport(f"the model does not accept inputs of shape {shapes}: {type(error).__name__}: {error}") from error
        flat = list(flatten(torch, answer))
        if not flat:
            raise CannotExport(f"the model answers a {type(answer).__name__} without a tensor in it: there is nothing to export")
        plain = isinstance(answer, torch.Tensor) and not by_name
        outputs = list(order.get("output_names") or ([] if plain else names_of(flat, names)))
        if outputs and len(outputs) != len(flat):
            raise CannotExport(f"output_names has {len(outputs)} names, and the model answers {len(flat)} tensors")
        work = Work(torch, model, tensors, plain, by_name, example, outputs, int(order.get("opset") or 0), target)
        started = time.monotonic()
        tolerance = float(order.get("tolerance") or TOLERANCE)
        failures: list[CannotExport] = []
        for dynamo in work.ways():
            try:
                exporter = work.run(dynamo)
                absolute, relative = work.compare(batches, tolerance)
                break
            except CannotExport as error:
                failures.append(error)
        else:
            raise failures[0]
    import onnx

    proto = onnx.load(str(target), load_external_data=False)
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return {
        "opset": opset, "max_abs_diff": absolute, "max_rel_diff": relative, "checked_batch_sizes": list(batches),
        "export_seconds": time.monotonic() - started, "exporter": exporter, "inputs": [dataclasses.asdict(t) for t in tensors],
        "outputs": [o.name for o in proto.graph.output],
    }  # fmt: skip


@dataclasses.dataclass
class Work:
    """One export: how torch is asked for it, and whether the result answers as PyTorch does."""

    torch: Any
    model: Any
    tensors: Sequence[Tensor]
    plain: bool
    by_name: bool
    example: tuple[Any, ...]
    outputs: list[str]
    opset: int
    target: Path

    def ways(self) -> list[bool]:
        """Exporters to try in turn: torch.export's (True), then the older one that traces."""
        scripted = isinstance(self.model, self.torch.jit.ScriptModule)
        modern = "dynamic_shapes" in inspect.signature(self.torch.onnx.export).parameters
        graph = type(self.model).__name__ == "GraphModule"
        return [False] if scripted or not modern else [True] if graph else [True, False]

    def run(self, dynamo: bool) -> str:
        """Write the file; returns what wrote it.

        Raises:
            CannotExport: it cannot be done this way.
        """
        torch = self.torch
        options: dict[str, Any] = {"input_names": [t.name for t in self.tensors]}
        if self.outputs:
            options["output_names"] = self.outputs
        if self.opset:
            options["opset_version"] = self.opset
        work = self.model if self.plain else adapter(torch, self.model, [t.name for t in self.tensors], self.by_name)
        if "dynamo" in inspect.signature(torch.onnx.export).parameters:
            options["dynamo"] = dynamo
        try:
            if not self.plain:
                work.eval()
                if isinstance(self.model, torch.jit.ScriptModule):
                    work = torch.jit.trace(work, self.example)  # the exporter traces no scripted module inside of another
            if dynamo:
                dims: dict[str, Any] = {}
                shapes = tuple({axis: dims.setdefault(n, torch.export.Dim(n)) for axis, n in t.dynamic_axes.items()} for t in self.tensors)
                options |= {"dynamic_shapes": shapes if self.plain else (shapes,), "external_data": False}
            else:
                options["dynamic_axes"] = {t.name: t.dynamic_axes for t in self.tensors}
            torch.onnx.export(work, self.example, str(self.target), **options)
        except Exception as error:
            text = str(error).strip().splitlines()
            raise CannotExport(f"torch cannot export it: {type(error).__name__}: {text[0] if text else ''}") from error
        return f"torch {torch.__version__} {'dynamo' if dynamo else 'torchscript'}"

    def answer(self, inputs: tuple[Any, ...]) -> list[Any]:
        """What PyTorch answers, flat."""
        names = [t.name for t in self.tensors]
        answer = self.model(**dict(zip(names, inputs, strict=True))) if self.by_name else self.model(*inputs)
        return [_numbers(self.torch, tensor) for _, tensor in flatten(self.torch, answer)]

    def compare(self, batches: Sequence[int], tolerance: float) -> tuple[float, float]:
        """Largest absolute and relative difference from PyTorch.

        Raises:
            CannotExport: it is more than `tolerance` allows, or shapes or counts differ.
        """
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(self.target), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise CannotExport(f"ONNX Runtime cannot load the exported model: {str(error).splitlines()[0]}") from error
        absolute = relative = 0.0
        for batch in batches:
            inputs = random_inputs(self.torch, self.tensors, batch)
            named = {t.name: value.numpy() for t, value in zip(self.tensors, inputs, strict=True)}
            expected = self.answer(inputs)
            try:
                actual = session.run(None, {i.name: named[i.name] for i in session.get_inputs()})
            except Exception as error:
                raise CannotExport(f"ONNX Runtime fails with a batch of {batch}: {str(error).splitlines()[0]}") from error
            if len(expected) != len(actual):
                raise CannotExport(f"PyTorch answers {len(expected)} tensors, the exported model {len(actual)}")
            for n, (want, got) in enumerate(zip(expected, actual, strict=True)):
                which = f"output {self.outputs[n]}: " if len(expected) > 1 and self.outputs else ""
                if want.shape != got.shape:
                    raise CannotExport(f"{which}with a batch of {batch} PyTorch answers shape {want.shape}, ONNX Runtime {got.shape}")
                one, other = _differences(want, got)
                absolute, relative = max(absolute, one), max(relative, other)
                if not _close(want, got, tolerance):
                    if not all(_close(a, b, 0.0) for a, b in zip(self.answer(inputs), expected, strict=True)):
                        raise CannotExport(
                            "PyTorch answers the same inputs differently each time: the model draws random numbers in eval mode"
                        )
                    raise CannotExport(
                        f"{which}ONNX Runtime differs from PyTorch by {one:.3g} with a batch of {batch}, more than the tolerance of {tolerance:g}"
                    )
        return absolute, relative


def _numbers(torch: Any, tensor: Any) -> Any:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()


def _apart(want: Any, got: Any) -> tuple[Any, Any]:
    """Absolute differences and the sizes that they are relative to; what is NaN, or infinite alike, on both sides is equal."""
    import numpy

    a, b = want.astype("float64"), got.astype("float64")
    same = (a == b) | (numpy.isnan(a) & numpy.isnan(b))
    with numpy.errstate(invalid="ignore"):
        return numpy.where(same, 0.0, numpy.abs(a - b)), numpy.where(same, 1.0, numpy.abs(a))


def _differences(want: Any, got: Any) -> tuple[float, float]:
    import numpy

    difference, scale = _apart(want, got)
    return float(difference.max(initial=0.0)), float((difference / numpy.maximum(scale, 1e-6)).max(initial=0.0))


def _close(want: Any, got: Any, tolerance: float) -> bool:
    difference, scale = _apart(want, got)
    return bool((difference <= tolerance + tolerance * scale).all())
