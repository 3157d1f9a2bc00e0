"""The main job end to end: dataset, compute target, run, log, model, ONNX, one prediction. `make demo` runs it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
import numpy
import onnxruntime
from PIL import Image

from alveary import AmlCompute, ComputeTarget, ComputeTargetException, Dataset, Experiment, PyTorch, Workspace

HERE = Path(__file__).parent
SHAPE = [1, 3, 224, 224]
TOLERANCE = 1e-3


class Stages:
    """Names and seconds of what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)


def target_of(workspace: Workspace, name: str) -> ComputeTarget:
    """Find the compute target, or create it, as Azure's page does."""
    try:
        return ComputeTarget(workspace=workspace, name=name)
    except ComputeTargetException:
        configuration = AmlCompute.provisioning_configuration(max_nodes=1, idle_seconds_before_scaledown=300)
        return ComputeTarget.create(workspace, name, configuration)


def picture(folder: Path) -> tuple[Path, str]:
    """A validation picture and its true label."""
    chosen = sorted(p for p in (folder / "val").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))[0]
    return chosen, chosen.parent.name


def predict(model: Path, labels: list[str], file: Path) -> str:
    """Label of a picture by ONNX Runtime, prepared as in validation."""
    image = Image.open(file).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = numpy.asarray(image.crop((left, top, left + 224, top + 224)), dtype="float32") / 255
    pixels = (pixels - numpy.array([0.485, 0.456, 0.406], "float32")) / numpy.array([0.229, 0.224, 0.225], "float32")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None].astype("float32")})
    return labels[int(numpy.asarray(scores).argmax())]


def main() -> int:
    """Do it all; 0 only if all of it held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="folder with train/ and val/; default: see data.py")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--target", default="local")
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    stage = Stages()
    summary: dict[str, Any] = {}

    with stage("data"):
        folder = Path(args.data) if args.data else data.fetch(args.out / "data")
        if not (folder / "train").is_dir() or not (folder / "val").is_dir():
            print(f"{folder} has no train/ and val/", file=sys.stderr)
            return 2
        workspace = Workspace.from_config()
        dataset = Dataset.upload(workspace, str(folder), name="pictures")
        print(dataset)
    with stage("compute"):
        target = target_of(workspace, args.target)
        target.wait_for_completion(show_output=True)
    with stage("submit"):
        estimator = PyTorch(
            source_directory=str(HERE),
            script_params={"--data": dataset.as_mount("pictures"), "--epochs": args.epochs, "--output_dir": "./outputs"},
            compute_target=target,
            entry_script="train.py",
            use_gpu=target.node_resources.gpus > 0,
        )
        run = Experiment(workspace, "hymenoptera").submit(estimator)
        print(run.id)
    with stage("train"):
        details = run.wait_for_completion(show_output=True)
        metrics = run.get_metrics()
        print({name: values[-1] if isinstance(values, list) else values for name, values in metrics.items()})
    with stage("register"):
        model = run.register_model(model_name="hymenoptera", model_path="outputs/")
        print(model, model.get_file_names())
    with stage("export"):
        model.export_onnx(SHAPE, file="model.pt")
        assert model.onnx is not None
        print(model.onnx)
    with stage("download"):
        model.download(str(args.out / "model"))
    with stage("predict"):
        labels = json.loads((args.out / "model" / "labels.json").read_text())
        file, truth = picture(folder)
        label = predict(args.out / "model" / "onnx" / "model.onnx", labels, file)
        print(f"{file.name} is of class {truth}; the model says {label}")

    summary = {
        "run_id": run.id, "state": details["status"], "seconds": stage.seconds,
        "metrics": {name: values[-1] if isinstance(values, list) else values for name, values in metrics.items()},
        "model": model.name, "model_version": model.version, "onnx_opset": model.onnx["opset"],
        "onnx_max_abs_diff": model.onnx["max_abs_diff"], "predicted_label": label, "true_label": truth, "picture": file.name,
        "dataset": f"{dataset.name}:{dataset.version}",
    }  # fmt: skip
    held = summary["state"] == "Completed" and "best_val_acc" in metrics and label in labels and summary["onnx_max_abs_diff"] < TOLERANCE
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"\n{'all of it held' if held else 'NOT all of it held'}; seconds by stage: {stage.seconds}\nsummary: {args.out / 'summary.json'}"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
