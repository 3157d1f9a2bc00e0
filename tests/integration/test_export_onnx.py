"""Exports of what people save and what their models answer, by the code of an export run, without a platform."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from alveary import _definitions
from alveary._onnx import CannotExport, export
from alveary.export_onnx import load, unwrapped

# No main guard, a package of its own beside it, and everything that may be saved of a module.
SCRIPT = """
    import os, torch
    from alveary import Run
    from torch import nn
    from parts.blocks.dense import Dense
    open("trained.txt", "a").write("x")
    run = Run.get_context()
    WIDTH = 8
    class Act(nn.Module):
        def forward(self, x): return helper(x)
    def helper(x): return torch.relu(x)
    class Outer:
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(4, WIDTH), Act(), Dense(WIDTH, 3))
            def forward(self, x): return self.layers(x)
    Net = Outer.Net
    def build(): return Net()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        loss = net(torch.randn(2, 4)).sum()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        run.log("loss", float(loss.detach()))
    os.makedirs("outputs", exist_ok=True)
    torch.save(net, "outputs/model.pt")
    torch.save(nn.DataParallel(net), "outputs/parallel.pt")
    torch.save({"epoch": 3, "model": net}, "outputs/checkpoint.pt")
    torch.save(net.state_dict(), "outputs/weights.pt")
    torch.save({"state_dict": nn.DataParallel(net).state_dict(), "epoch": 3}, "outputs/parallel_weights.pt")
    torch.distributed.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
    torch.save(nn.parallel.DistributedDataParallel(net), "outputs/distributed.pt")
    run.register_model("m", "outputs/model.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source directory whose script has run once."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    dense = folder / "parts/blocks/dense.py"
    dense.parent.mkdir(parents=True)
    dense.write_text("import torch\nclass Dense(torch.nn.Linear):\n    pass\nprint('not again')\nopen('trained.txt', 'a').write('d')\n")
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def source(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, as an export run has it; afterwards nothing of it is imported, and nothing has trained again."""
    before = set(sys.modules)
    monkeypatch.chdir(saved)
    monkeypatch.setattr(sys, "path", [str(saved), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    _definitions.install(saved)
    yield saved
    for name in set(sys.modules) - before:
        if name.startswith(("parts", "train", "__alveary")):
            del sys.modules[name]
    assert (saved / "trained.txt").read_text() == "dx"


@pytest.mark.parametrize(
    ("file", "order"),
    [
        ("model.pt", {"entry_script": "train.py"}),
        ("model.pt", {}),  # it ran as a command: the script is found by its class
        ("parallel.pt", {"entry_script": "train.py"}),
        ("checkpoint.pt", {"entry_script": "train.py"}),
        ("distributed.pt", {"entry_script": "train.py"}),
        ("weights.pt", {"factory": "train:build"}),
        ("weights.pt", {"factory": "train:Outer.Net"}),
        ("parallel_weights.pt", {"factory": "train:build"}),
    ],
)
def test_classes_are_found_without_training_again(source: Path, file: str, order: dict[str, str]) -> None:
    model = load(torch, source / "outputs" / file, order, source)
    expected = torch.load(source / "outputs/weights.pt")
    assert type(model).__name__ == "Net"
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert model(torch.ones(2, 4)).shape == (2, 3)


def test_weights_alone_say_what_is_missing(source: Path) -> None:
    with pytest.raises(
        CannotExport, match=r"a state_dict, which has weights but no architecture.*factory='parts.blocks.dense:Dense'|factory='train:Act'"
    ):
        load(torch, source / "outputs/weights.pt", {"entry_script": "train.py"}, source)


def test_a_class_that_nobody_has_is_named(source: Path, tmp_path: Path) -> None:
    for file, words in (
        ("model.pt", "needs the class Outer of its script, and no file"),
        ("model.pt", "several files define one: a.py, b.py"),
    ):
        with pytest.raises(CannotExport, match=words):
            load(torch, source / "outputs" / file, {}, tmp_path)
        for name in ("a.py", "b.py"):
            (tmp_path / name).write_text("class Outer: pass")


def test_an_export_run_from_end_to_end(saved: Path, tmp_path: Path) -> None:
    order = {"file": "model.pt", "entry_script": "train.py", "inputs": [{"shape": [1, 4]}]}
    command = [sys.executable, "-m", "alveary.export_onnx", "--model", str(saved / "outputs"), "--order", json.dumps(order)]
    environment = {"PATH": "/usr/bin:/bin", "ALVEARY_SOCKET": str(tmp_path / "nobody"), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=saved, env=environment, capture_output=True, text=True, timeout=300)
    report = json.loads((saved / "outputs/report.json").read_text())
    assert done.returncode == 0 and "error" not in report, done.stderr
    assert report["checked_batch_sizes"] == [1, 3] and (saved / "trained.txt").read_text() == "dx"


def test_what_wraps_a_module_is_taken_off() -> None:
    class OptimizedModule(nn.Module):  # as torch.compile's
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    inner = nn.Linear(1, 1)
    assert unwrapped(nn.DataParallel(OptimizedModule(nn.DataParallel(inner)))) is inner


# ---- what models answer ---------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 5, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> Any:
        return self.cells(x)


Pair = namedtuple("Pair", "mean spread")


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: Any = None


class Answers(nn.Module):
    """Answers as one of many kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return {
            "dict": lambda: {"logits": y, "probabilities": y.softmax(-1), "loss": None, "count": 3},
            "nested": lambda: (y, [y + 1, {"deep": (y * 2, None)}], None, "text"),
            "named": lambda: Pair(y.mean(-1), y.std(-1)),
            "data class": lambda: Answer(y, (y + 1, y + 2)),
            "same twice": lambda: (y, y, x),
            "name of the input": lambda: {"input": y, "x y/z": y + 1},
            "integers and truth": lambda: (y.argmax(-1), y > 0),
            "infinite": lambda: torch.where(y > 0, y, -torch.inf),
        }[self.kind]()


def exported(model: Any, target: Path, *inputs: dict[str, Any], **order: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return export(torch, model, {"inputs": list(inputs), **order}, target)


X = {"name": "input", "shape": [1, 4]}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("dict", ["logits", "probabilities"]),
        ("nested", ["output_0", "output_1_0", "output_1_1_deep_0"]),
        ("named", ["mean", "spread"]),
        ("data class", ["logits", "hidden_0", "hidden_1"]),
        ("same twice", ["output_0", "output_1", "output_2"]),
        ("name of the input", ["input_", "x_y_z"]),
        ("integers and truth", ["output_0", "output_1"]),
        ("infinite", None),
    ],
)
def test_answers_are_flattened_compared_and_exported(tmp_path: Path, kind: str, names: list[str] | None) -> None:
    report = exported(Answers(kind), tmp_path / "m.onnx", X)
    assert report["checked_batch_sizes"] == [1, 3] and report["max_abs_diff"] < 1e-4
    assert names is None or report["outputs"] == names


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "two ways"])
def test_recurrent_models_with_their_state(tmp_path: Path, options: dict[str, Any]) -> None:
    import onnxruntime

    report = exported(Recurrent(**options), tmp_path / "m.onnx", {"name": "x", "shape": [1, 6, 4]})
    assert report["outputs"] == ["output_0", "output_1_0", "output_1_1"]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.run(None, {"x": numpy.zeros((7, 6, 4), "float32")})[0].shape[:2] == (7, 6)


def test_scripted_models_answer_tuples_and_dicts_as_well(tmp_path: Path) -> None:
    class Tuples(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            return x + 1, (x * 2, x.sum(1))

    class Dicts(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"one": x + 1, "two": x.sum(1)}

    report = exported(torch.jit.script(Tuples()), tmp_path / "m.onnx", X)
    assert report["outputs"] == ["output_0", "output_1_0", "output_1_1"] and "torchscript" in report["exporter"]
    assert exported(torch.jit.script(Dicts()), tmp_path / "m.onnx", X)["outputs"] == ["one", "two"]


def test_several_inputs_by_place_and_by_name(tmp_path: Path) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(10, 4), nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor, unused: Any = None, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
            found = self.words(ids)
            return self.mix((found * mask.unsqueeze(-1) if mask is not None else found).sum(1)) * scale

    ids = {"name": "ids", "shape": [1, 6], "dtype": "int64"}
    report = exported(Several(), tmp_path / "m.onnx", ids, {"name": "mask", "shape": [1, 6]})
    assert [t["name"] for t in report["inputs"]] == ["ids", "mask"] and report["max_abs_diff"] < 1e-4

    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

    time = {0: "batch", 1: "time"}
    report = exported(
        Two(), tmp_path / "m.onnx", {"name": "p", "shape": [1, 6, 4], "dynamic_axes": time}, {"name": "q", "shape": [1, 4, 2]}
    )
    assert report["inputs"][0]["dynamic_axes"] == time


def test_the_batch_need_not_be_the_first_axis(tmp_path: Path) -> None:
    report = exported(nn.LSTM(4, 5), tmp_path / "m.onnx", {"name": "x", "shape": [6, 1, 4], "dynamic_axes": {1: "batch"}})
    assert report["checked_batch_sizes"] == [1, 3]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    class Random(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"loss": None}

    with pytest.raises(CannotExport, match="draws random numbers"):
        exported(Random(), tmp_path / "m.onnx", X)
    with pytest.raises(CannotExport, match="without a tensor"):
        exported(Nothing(), tmp_path / "m.onnx", X)
    with pytest.raises(CannotExport, match="output_names has 1 names, and the model answers 2 tensors"):
        exported(Answers("dict"), tmp_path / "m.onnx", X, output_names=["a"])
    assert exported(Answers("dict"), tmp_path / "m.onnx", X, output_names=["a", "b"])["outputs"] == ["a", "b"]
