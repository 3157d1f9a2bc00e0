"""ONNX export: a run does the work in the model's own image; the registry checks what it left and records it."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from alveary_contracts import rules
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import environment_digest, manifest_digest, manifest_from_json
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.ids import new_id
from alveary_contracts.names import path_problem
from alveary_core import scratch, telemetry
from alveary_core.aggregates import Aggregates
from alveary_core.claims import Claims
from alveary_core.errors import InvalidArgument
from alveary_core.events import Event
from alveary_core.objectstore import DigestMismatch, ObjectStore
from alveary_registry import domain

SUBJECTS = ("alveary.*.run.*.completed", "alveary.*.run.*.failed", "alveary.*.run.*.canceled")
NEEDED = ("onnx", "onnxruntime", "onnxscript")
DTYPES = ("", "float32", "float64", "int64", "int32", "bool")
PROPERTY = "alveary.export"
CHECK_SECONDS = 300.0
_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def request(name: str, registered: ev.ModelRegistered, spec: ev.OnnxSpec, subject: str) -> ev.ModelExportRequested:
    """The event that asks for an export, with the run that will do it.

    Raises:
        InvalidArgument: with every fault of the specification.
    """
    faults: list[tuple[str, str]] = []
    files = [f.path for f in registered.manifest.files]
    chosen = spec.file
    if not chosen:
        candidates = [f for f in files if f.endswith((".pt", ".pth", ".pt2", ".torchscript"))]
        if len(candidates) == 1:
            chosen = candidates[0]
        else:
            text = ", ".join(candidates or files[:10])
            faults.append(("spec.file", f"say which file holds the model: {text}"))
    elif chosen not in files:
        faults.append(("spec.file", f"version {registered.version} has no {chosen!r}; it has {', '.join(files[:10])}"))
    if not spec.inputs:
        faults.append(("spec.inputs", "at least one input with its shape is needed, for example shape [1, 3, 224, 224]"))
    for index, tensor in enumerate(spec.inputs):
        if not tensor.shape or any(d < 1 for d in tensor.shape):
            faults.append((f"spec.inputs[{index}].shape", f"{list(tensor.shape)}: positive sizes, the batch first"))
        if tensor.dtype not in DTYPES:
            faults.append((f"spec.inputs[{index}].dtype", f"{tensor.dtype!r}: one of {', '.join(DTYPES[1:])}"))
        if any(not 0 <= axis < len(tensor.shape) for axis in tensor.dynamic_axes):
            faults.append((f"spec.inputs[{index}].dynamic_axes", f"axes of 0 to {len(tensor.shape) - 1} exist"))
    if spec.opset and not 7 <= spec.opset <= 30:
        faults.append(("spec.opset", f"{spec.opset}: 0 (torch's default) or 7 to 30"))
    if spec.factory and not re.fullmatch(r"[\w.]+:[\w.]+", spec.factory):
        faults.append(("spec.factory", f"{spec.factory!r}: use 'module:callable'"))
    target = spec.compute_target or registered.lineage.compute_target
    if not target:
        faults.append(("spec.compute_target", "the model comes from no run: say on which compute target to export it"))
    if chosen and (problem := path_problem(chosen)):
        faults.append(("spec.file", problem))
    if faults:
        raise InvalidArgument(*faults)
    filled = ev.OnnxSpec()
    filled.CopyFrom(spec)
    filled.file = chosen
    export_id = new_id()
    order = MessageToDict(filled, preserving_proto_field_name=True) | {"entry_script": registered.entry_script}
    run = c.RunSpec(
        experiment="onnx-export", module="alveary.export_onnx", snapshot=registered.lineage.snapshot, compute_target=target,
        arguments=["--model", "{inputs.model}", "--order", json.dumps(order)], environment=environment(registered),
        max_run_duration_seconds=3600, display_name=f"export {name}:{registered.version}",
        inputs=[c.InputDataset(name="model", dataset=name, version=registered.version, model=True, manifest_digest=manifest_digest(registered.manifest))],
        properties={PROPERTY: f"{name}:{registered.version}"},
    )  # fmt: skip
    return ev.ModelExportRequested(version=registered.version, export_id=export_id, spec=filled, run=run, requested_by=subject)


def environment(registered: ev.ModelRegistered) -> c.Environment:
    """The model's own environment, with what an export needs added to its very pins."""
    own = c.Environment()
    own.CopyFrom(registered.environment)
    if own.user_managed:
        return own
    names = {m[1].lower() for p in own.pip_packages if (m := _NAME.match(p))}
    missing = [n for n in NEEDED if n not in names]
    if not names:
        missing = ["torch", *missing]
    if missing:
        if names:
            own.extends_digest = environment_digest(registered.environment)
        own.pip_packages.extend(missing)
    return own


class ExportHandler:
    """Ends an export when its run is final."""

    def __init__(self, store: ObjectStore, models: Aggregates[domain.Model]) -> None:
        self._store, self._models = store, models
        self._claims = Claims(store, "models")

    async def __call__(self, event: Event) -> None:
        """Handle one final event of a run; idempotent."""
        message = event.message
        assert isinstance(message, (ev.RunCompleted, ev.RunFailed, ev.RunCanceled))
        subject = message.properties.get(PROPERTY, "")
        if not subject:
            return
        name, _, version = subject.rpartition(":")
        key = self._models.key(event.key.workspace, name)
        result: ev.ModelExported | ev.ModelExportFailed
        try:
            result = await self._result(event.key.id, int(version), message)
        except (ExportFailed, DigestMismatch) as error:
            result = ev.ModelExportFailed(version=int(version), export_id=event.key.id, run_id=event.key.id, reason=str(error))
        await self._models.execute(key, lambda model: domain.end_export(model, result))

    async def _result(self, run_id: str, version: int, message: ev.RunCompleted | ev.RunFailed | ev.RunCanceled) -> ev.ModelExported:
        prefix = f"{run_id}/{message.attempt}/"
        files: dict[str, c.FileEntry] = {}
        if message.manifest_digest:
            files = {f.path: f for f in manifest_from_json(await self._store.get("runs", f"{prefix}manifest.json")).files}
        report: dict[str, Any] = {}
        if "outputs/report.json" in files:
            report = read_report(await self._store.get("runs", f"{prefix}outputs/report.json"))
        if not isinstance(message, ev.RunCompleted):
            raise ExportFailed(
                str(report.get("error") or "") or "\n".join(message.exit.last_lines) or message.exit.message or "its run was canceled"
            )
        onnx = files.get("outputs/model.onnx")
        if onnx is None:
            raise ExportFailed("the export run left no outputs/model.onnx")
        async with scratch.folder("alveary-export-") as folder:
            path = folder / "model.onnx"
            await self._store.get_file("runs", f"{prefix}outputs/model.onnx", path, onnx.sha256)
            await check(path)
        await self._claims.hold([onnx.sha256])
        await self._store.copy("models", f"blobs/{onnx.sha256}", "runs", f"{prefix}outputs/model.onnx")
        try:
            exported = self._exported(run_id, version, onnx, report)
            if found := rules.problems(exported, texts=False):
                raise ValueError("; ".join(f"{path}: {text}" for path, text in found))
            return exported
        except (KeyError, TypeError, ValueError, ParseError) as error:
            # The run's own code could have written anything: that must not be tried again for ever.
            raise ExportFailed(f"the export run left a report that cannot be read: {type(error).__name__}: {error}") from error

    @staticmethod
    def _exported(run_id: str, version: int, onnx: c.FileEntry, report: dict[str, Any]) -> ev.ModelExported:
        return ev.ModelExported(
            version=version, export_id=run_id, run_id=run_id, key=f"blobs/{onnx.sha256}", file=onnx, opset=report["opset"],
            max_abs_diff=report["max_abs_diff"], max_rel_diff=report["max_rel_diff"],
            checked_batch_sizes=report["checked_batch_sizes"], export_seconds=report["export_seconds"],
            exporter=report["exporter"], inputs=[ParseDict(t, ev.TensorSpec()) for t in report["inputs"]],
            outputs=report.get("outputs", ()),
        )  # fmt: skip


def read_report(data: bytes) -> dict[str, Any]:
    """What an export run says of itself.

    Raises:
        ExportFailed: it says it in no way that can be read. The run's own code could have written anything.
    """
    try:
        report = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ExportFailed(f"the export run left a report that cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(report, dict):
        raise ExportFailed(f"the export run left a report that is a {type(report).__name__}, not an object")
    return report


class ExportFailed(Exception):
    """The text says why."""


async def check(path: Path) -> None:
    """onnx.checker and a session of ONNX Runtime, in a process of their own: a model may be large, or a trap.

    Raises:
        ExportFailed: the model is not valid.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "alveary_registry.check_onnx", str(path), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise ExportFailed(f"checking the exported model took longer than {CHECK_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        text = output.decode(errors="replace").strip()
        telemetry.logger().warning("onnx.invalid", output=text[-2000:])
        raise ExportFailed(f"the exported model is not valid: {text.splitlines()[-1] if text else 'its check crashed'}")
