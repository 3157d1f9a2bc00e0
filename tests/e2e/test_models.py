"""Models: versions, lineage, downloads, ONNX export of each kind of artifact."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy
import pytest
from support import RUNTIME, finished, lines, submit

from alveary import AlvearyError, Dataset, Environment, Model, Retry, Run, Workspace

TORCH_HERE = Environment("torch", user_managed=True, interpreter=sys.executable)
if RUNTIME == "docker":
    TORCH_HERE = Environment("torch", ["torch==2.13.0", "numpy", "onnx", "onnxruntime", "onnxscript"])

TRAIN = """
    import os, torch
    from alveary import Run
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        def forward(self, x):
            return self.layers(x)
    def build():
        return Net()
    # No main guard: an export that ran this again would register one more.
    net = Net().eval()
    torch.save(net, "outputs/model.pt")
    torch.jit.script(net).save("outputs/scripted.torchscript")
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(net, (torch.randn(2, 4),), dynamic_shapes=({0: batch},)), "outputs/exported.pt2")
    torch.save(net.state_dict(), "outputs/weights.pth")
    open("outputs/broken.pt", "w").write("no model at all")
    Run.get_context().register_model(f"trained-{os.environ['ALVEARY_RUN_ID'].lower()}", "outputs/model.pt")
    """


@pytest.fixture(scope="module")
def trained(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = submit(workspace, tmp_path_factory.mktemp("source"), TRAIN, environment=TORCH_HERE)
    finished(run)
    return run


def test_versions_lineage_tags_aliases_and_verified_downloads(workspace: Workspace, trained: Run, tmp_path: Path) -> None:
    name = f"m-{os.getpid()}"
    first = trained.register_model(name, "outputs/model.pt", tags={"a": "1"}, description="first")
    second = trained.register_model(name, "outputs/")
    assert (first.version, second.version) == (1, 2)
    assert first.get_file_names() == ["model.pt"]
    assert set(second.get_file_names()) == {"model.pt", "scripted.torchscript", "exported.pt2", "weights.pth", "broken.pt"}
    assert first.lineage["run_id"] == trained.id
    assert first.lineage["snapshot"] == trained.get_snapshot_id()
    assert first.lineage["image_digest"]
    assert Model(workspace, name).version == 2
    assert Model(workspace, id=f"{name}:1").description == "first"
    first.add_tags({"b": "2"})
    first.add_properties({"fixed": "1"})
    with pytest.raises(AlvearyError, match="never changed"):
        first.add_properties({"fixed": "2"})
    assert [m.version for m in Model.list(workspace, name, tags={"b": "2"})] == [1]
    assert [m.version for m in Model.list(workspace, name, tags="b", properties={"fixed": "1"})] == [1]
    assert not Model.list(workspace, name, properties={"fixed": "2"}) and not Model.list(workspace, name, model_framework="PyTorch")
    assert Model(workspace, name, tags={"a": "1"}).version == 1 and Model(workspace, name, run_id=trained.id[:20]).version == 2
    with pytest.raises(AlvearyError, match="has no version 2 with these tags"):
        Model(workspace, name, version=2, tags={"a": "1"})
    data = tmp_path / "data"
    data.mkdir()
    (data / "x").write_text("x")
    dataset = Dataset.upload(workspace, str(data), f"d-{os.getpid()}")
    third = trained.register_model(name, "outputs/model.pt", datasets=[("training", dataset)], model_framework="PyTorch")
    assert third.lineage["datasets"] == [f"{dataset.name}:{dataset.version}"] and third.framework == "PyTorch"
    third.delete()
    first.set_alias("production")
    second.set_alias("production")
    assert Model(workspace, name, version=1).aliases == []
    assert Model(workspace, name, version=2).aliases == ["production"]
    path = first.download(str(tmp_path))
    trained.download_file("outputs/model.pt", str(tmp_path / "original"))
    assert Path(path).read_bytes() == (tmp_path / "original").read_bytes()
    assert first.download(str(tmp_path)) == path  # the same content is no other file
    Path(path).write_bytes(b"mine")
    with pytest.raises(AlvearyError, match="other files are there already"):
        first.download(str(tmp_path))
    first.download(str(tmp_path), exist_ok=True)
    assert Path(path).read_bytes() == (tmp_path / "original").read_bytes()
    with pytest.raises(AlvearyError, match=r"stored no 'outputs/none'; it has"):
        trained.register_model(name, "outputs/none")
    with pytest.raises(AlvearyError, match="not a valid name"):
        trained.register_model("../up", "outputs")


def test_a_local_folder_becomes_a_model(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"weights")
    model = Model.register(workspace, str(tmp_path), f"local-{os.getpid()}")
    assert model.get_file_names() == ["sub/a.bin"]
    with pytest.raises(AlvearyError, match="on which compute target"):
        model.export_onnx([1, 4], file="sub/a.bin")


@pytest.mark.parametrize(
    ("file", "options"),
    [("model.pt", {"opset": 18}), ("scripted.torchscript", {}), ("exported.pt2", {}), ("weights.pth", {"factory": "train:build"})],
)
def test_each_kind_of_artifact_is_exported_and_checked(
    workspace: Workspace, trained: Run, tmp_path: Path, file: str, options: dict[str, object]
) -> None:
    import onnxruntime

    model = trained.register_model(f"onnx-{os.getpid()}-{file.replace('.', '-')}", "outputs")
    model.export_onnx([1, 4], file=file, **options)  # type: ignore[arg-type]
    figures = model.onnx
    assert figures is not None
    assert figures["checked_batch_sizes"] == [1, 3]
    assert figures["max_abs_diff"] < 1e-4
    assert figures["opset"] == options.get("opset", figures["opset"])
    model.download(str(tmp_path))
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    (out,) = session.run(None, {session.get_inputs()[0].name: numpy.zeros((5, 4), "float32")})
    assert out.shape == (5, 3)
    assert [m.version for m in Model.list(workspace, f"trained-{trained.id.lower()}")] == [1]
    events = workspace.events.subscribe("model.exported", from_sequence=1, timeout=300)
    assert next(e for e in events if e.subject == model.name).data["version"] == model.version


@pytest.mark.parametrize(
    ("file", "shape", "words"),
    [
        ("weights.pth", [1, 4], "state_dict, which has weights but no architecture"),
        ("broken.pt", [1, 4], "not a file that torch can load"),
        ("model.pt", [1, 7], "does not accept inputs of shape"),
        ("none.pt", [1, 4], "has no 'none.pt'"),
        ("model.pt", [], "positive sizes"),
    ],
)
def test_what_cannot_be_exported_says_why(trained: Run, file: str, shape: list[int], words: str) -> None:
    model = trained.register_model(f"bad-{os.getpid()}", "outputs")
    with pytest.raises(AlvearyError, match=words):
        model.export_onnx(shape, file=file)


def test_a_script_registers_its_own_model_once_with_its_lineage(workspace: Workspace, tmp_path: Path) -> None:
    name = f"self-{os.getpid()}"
    run = submit(workspace, tmp_path, f"""
        import os
        from alveary import Run
        open("outputs/m.txt", "w").write("weights")
        for _ in range(2):
            print(Run.get_context().register_model({name!r}, "outputs/m.txt", model_framework="Own", model_framework_version="3"))
        raise SystemExit(os.environ["ALVEARY_ATTEMPT"] == "1")
        """, max_attempts=2, retry=Retry(on=["exited"], backoff_seconds=0))  # fmt: skip
    assert finished(run)["attempt"] == 2
    assert lines(run) == [str({"name": name, "version": 1})] * 4
    model = Model(workspace, name)
    assert (model.framework, model._found.framework_version) == ("Own", "3")
    assert model.get_file_names() == ["m.txt"] and model.version == 1 and model.properties["run_id"] == run.id
    outside = run.register_model(f"{name}-outside", "outputs/m.txt")
    # How its run ended is known from outside alone.
    assert model.lineage | {"run_state": "Completed"} == outside.lineage and model.lineage["run_id"] == run.id
