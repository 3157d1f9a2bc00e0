"""Models: immutable numbered versions, with lineage and ONNX exports."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alveary.errors import AlvearyError
from alveary.unsupported import refuse_given, refuse_model_extras
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.registry.v1 import registry_pb2 as reg

if TYPE_CHECKING:
    from alveary.environment import Environment
    from alveary.session import Session
    from alveary.submitted_run import SubmittedRun
    from alveary.transfer import Listing


def _state(state: int) -> str:
    from alveary.client.states import state_name

    return state_name(state) if state else ""


_Wanted = str | Mapping[str, str | None] | Sequence[Any] | None


def _wanted(given: _Wanted) -> dict[str, str | None]:
    """Values by key, None for any: of one key, a mapping, or Azure's list of keys and of pairs."""
    if isinstance(given, str):
        return {given: None}
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    return {one: None for one in given if isinstance(one, str)} | {one[0]: one[1] for one in given if not isinstance(one, str)}


def _has(present: Mapping[str, str], given: _Wanted) -> bool:
    """Whether tags or properties are among those that are there."""
    return all(key in present and value in (None, present[key]) for key, value in _wanted(given).items())


class Model:
    """One version of a model; the latest where none is said."""

    def __init__(
        self,
        workspace: Session,
        name: str | None = None,
        id: str | None = None,
        tags: str | Mapping[str, str | None] | None = None,
        properties: str | Mapping[str, str | None] | None = None,
        version: int | None = None,
        run_id: str | None = None,
        model_framework: str | None = None,
        expand: bool = True,
    ) -> None:
        """
        Args:
            id: "name:version".
            tags, properties: that the version has, by key; None, or a key alone: any value.
            run_id: of the run that made it.
            model_framework: that it was registered with.

        Raises:
            AlvearyError: neither name nor id was given; or there is no such version.
        """
        if id is not None:
            name, _colon, number = id.partition(":")
            version = int(number) if number else version
        if name is None:
            raise AlvearyError("a model has a name or an id 'name:version'", "INVALID_ARGUMENT")
        if not (tags or properties or run_id or model_framework):
            self._fill(workspace, workspace._call(workspace._client.models.get(name, version or 0)))
            return
        for found in Model.list(workspace, name, tags, properties, run_id, model_framework=model_framework):
            if version in (None, found.version):
                self._fill(workspace, found._found)
                return
        raise AlvearyError(f"model {name!r} has no version{f' {version}' if version else ''} with these tags and properties", "NOT_FOUND")

    @classmethod
    def _of(cls, workspace: Session, found: reg.ModelVersion) -> Model:
        model = cls.__new__(cls)
        model._fill(workspace, found)
        return model

    def _fill(self, workspace: Session, found: reg.ModelVersion) -> None:
        self._workspace, self._found = workspace, found
        self.workspace = workspace
        self.name, self.version, self.id = found.name, found.version, f"{found.name}:{found.version}"
        self.description, self.framework = found.description, found.framework
        self.tags, self.properties = dict(found.tags), dict(found.properties)
        self.run_id, self.created_time = found.lineage.run_id, found.registered_at.ToDatetime()
        self.aliases = list(found.aliases)

    def __repr__(self) -> str:
        return f"Model({self.id}, run: {self.run_id or 'none'})"

    @property
    def lineage(self) -> dict[str, Any]:
        """The run, how that had ended, source snapshot, image and datasets that it comes from."""
        line = self._found.lineage
        return {
            "run_id": line.run_id,
            "snapshot": line.snapshot,
            "image_digest": line.image_digest,
            "datasets": list(line.datasets),
            "parent": line.parent,
            "experiment": line.experiment,
            "run_state": _state(line.run_state),
        }

    @property
    def run(self) -> SubmittedRun | None:
        """The run that made it."""
        return self._workspace.get_run(self.run_id) if self.run_id else None

    @property
    def onnx(self) -> dict[str, Any] | None:
        """Figures of its newest export: opset, max_abs_diff, checked_batch_sizes ...; None: it has none."""
        if not self._found.HasField("export"):
            return None
        done = self._found.export
        return {
            "opset": done.opset,
            "max_abs_diff": done.max_abs_diff,
            "max_rel_diff": done.max_rel_diff,
            "checked_batch_sizes": list(done.checked_batch_sizes),
            "export_seconds": done.export_seconds,
            "exporter": done.exporter,
            "outputs": list(done.outputs),
            "size": done.file.size,
            "sha256": done.file.sha256,
        }

    def refresh(self) -> Model:
        """Look again."""
        self._fill(self._workspace, self._workspace._call(self._workspace._client.models.get(self.name, self.version)))
        return self

    @classmethod
    def register(
        cls,
        workspace: Session,
        model_path: str,
        model_name: str,
        tags: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        description: str | None = None,
        datasets: Sequence[Any] = (),
        model_framework: str | None = None,
        model_framework_version: str | None = None,
        child_paths: Sequence[str] | None = None,
        sample_input_dataset: Any = None,
        sample_output_dataset: Any = None,
        resource_configuration: Any = None,
        *,
        environment: Environment | None = None,
        verify: bool = False,
        follow_links: bool = False,
    ) -> Model:
        """Register a file or folder of this machine as the next version.

        Args:
            datasets: that it was made of: Dataset objects, or pairs of a purpose and one.
            environment: in which it can be loaded and exported.
            verify, follow_links: as in Dataset.upload.

        Raises:
            AlvearyError: something cannot be read or uploaded, or something given is not offered.
        """
        from alveary.client.models import ModelInfo
        from alveary.dataset import references
        from alveary.progress import upload_progress

        refuse_given(child_paths=(child_paths, "model_path is stored with all it holds; put what is wanted into a folder of its own"))
        refuse_model_extras(sample_input_dataset, sample_output_dataset, resource_configuration)
        info = ModelInfo(
            model_name,
            tags or {},
            properties or {},
            description or "",
            model_framework or "",
            model_framework_version or "",
            references(datasets),
        )
        message = environment._proto() if environment else None
        with upload_progress(model_name) as progress:
            work = workspace._client.models.register_local(
                Path(model_path), info, message, progress, verify=verify, follow_links=follow_links
            )
            return cls._of(workspace, workspace._call(work))

    @classmethod
    def list(
        cls,
        workspace: Session,
        name: str | None = None,
        tags: str | Mapping[str, str | None] | None = None,
        properties: str | Mapping[str, str | None] | None = None,
        run_id: str | None = None,
        latest: bool = False,
        dataset_id: str | None = None,
        expand: bool = True,
        page_count: int | None = None,
        model_framework: str | None = None,
    ) -> builtins.list[Model]:
        """Versions that have all of this, the newest of a name first.

        Args:
            tags, properties: keys with the values wanted; None, or a key alone: any value.
            run_id: of the run that made them, or a unique prefix of it.
            latest: only the latest version of each name.

        Raises:
            AlvearyError: dataset_id was given; or there is no such run.
        """
        refuse_given(dataset_id=(dataset_id, "a version's `lineage` names its datasets"))
        client = workspace._client
        whole_id = workspace._call(client.runs.full_id(run_id)) if run_id else ""
        exact = {k: v for k, v in _wanted(tags).items() if v is not None}
        return [
            cls._of(workspace, one)
            for one in workspace._call(client.models.list(name or "", whole_id, exact, latest))
            if _has(one.tags, tags) and _has(one.properties, properties) and model_framework in (None, one.framework)
        ]

    def _tag(self, **change: Any) -> None:
        work = self._workspace._client.models.tag(self.name, self.version, **change)
        self._fill(self._workspace, self._workspace._call(work))

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._tag(set=tags)

    def remove_tags(self, tags: Sequence[str]) -> None:
        """Remove tags."""
        self._tag(remove=tags)

    def add_properties(self, properties: Mapping[str, str]) -> None:
        """Add properties; existing ones cannot change."""
        self._tag(properties=properties)

    def update(
        self,
        tags: Mapping[str, str] | None = None,
        description: str | None = None,
        sample_input_dataset: Any = None,
        sample_output_dataset: Any = None,
        resource_configuration: Any = None,
    ) -> None:
        """Set tags and the description; other tags stay.

        Raises:
            AlvearyError: something given is not offered.
        """
        refuse_model_extras(sample_input_dataset, sample_output_dataset, resource_configuration)
        self._tag(set=tags or {}, description=description)

    def set_alias(self, alias: str) -> None:
        """Point an alias at this version."""
        self._workspace._call(self._workspace._client.models.set_alias(self.name, self.version, alias))
        self.refresh()

    def delete(self) -> None:
        """Hide this version from lists. Nothing is ever removed: what it was stays known."""
        self._workspace._call(self._workspace._client.models.archive(self.name, self.version))

    def get_file_names(self) -> builtins.list[str]:
        """Its files, the ONNX export among them."""
        return [file.path for file in self._files().files]

    def _files(self) -> Listing:
        return self._workspace._call(self._workspace._client.models.files(self.name, self.version))

    def download(self, target_dir: str = ".", exist_ok: bool = False, exists_ok: bool | None = None, *, overwrite: bool = False) -> str:
        """Store its files here, verified, all of them or none; returns the folder, or the file where it is only one.

        Raises:
            AlvearyError: other files of these names are there and neither exist_ok nor overwrite is True, or a file is damaged.
        """
        from alveary.progress import download

        folder, listing = Path(target_dir), self._files()
        download(self._workspace, listing, folder, overwrite=overwrite or exist_ok or bool(exists_ok))
        return str(folder / listing.files[0].path) if len(listing.files) == 1 else str(folder)

    def export_onnx(
        self,
        input_shape: Sequence[int] | None = None,
        *,
        inputs: Sequence[Mapping[str, Any]] = (),
        file: str = "",
        opset: int = 0,
        factory: str = "",
        tolerance: float = 0.0,
        output_names: Sequence[str] = (),
        compute_target: str = "",
    ) -> Model:
        """Export to ONNX in a run of the model's own image, and wait for it.

        The source's classes are found without running its script again. Dicts, nested tuples and data classes are answered flat.

        Args:
            input_shape: shape of the only input with a batch of one, for example [1, 3, 224, 224], float32.
            inputs: or one mapping an input: name, shape, dtype, dynamic_axes ({axis: name}; default {0: "batch"}). In the order of
                `forward`, or named as its parameters.
            file: file of the version that holds the model, where there are several.
            opset: 0: torch's default.
            factory: "module:callable" of the source that builds the module, where the file is a state_dict.
            tolerance: largest difference from PyTorch, absolute plus relative; default 1e-3.

        Raises:
            AlvearyError: it cannot be exported; the text says why.
        """
        tensors = [ev.TensorSpec(**dict(one)) for one in inputs] or [ev.TensorSpec(name="input", shape=input_shape or [])]
        spec = ev.OnnxSpec(
            file=file,
            inputs=tensors,
            opset=opset,
            factory=factory,
            tolerance=tolerance,
            output_names=output_names,
            compute_target=compute_target,
        )
        client = self._workspace._client
        started = self._workspace._call(client.models.export(self.name, self.version, spec))
        found = self._workspace._call(client.models.wait_for_export(self.name, self.version, started.export_id))
        self._fill(self._workspace, found)
        if found.export_error:
            raise AlvearyError(f"model {self.id} cannot be exported: {found.export_error}", "FAILED_PRECONDITION")
        return self
