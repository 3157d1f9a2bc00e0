"""Datasets: folders, content-addressed, versioned, read-only in runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alveary.errors import AlvearyError

if TYPE_CHECKING:
    from alveary.session import Session
    from alveary_contracts.registry.v1 import registry_pb2 as reg


@dataclass(frozen=True)
class Input:
    """A dataset as a run sees it: a folder named in $ALVEARY_INPUT_<NAME> and in its arguments."""

    name: str
    dataset: Dataset


class Dataset:
    """One version of a dataset."""

    def __init__(self, workspace: Session, found: reg.DatasetVersion) -> None:
        self._workspace = workspace
        self.name, self.version, self.description = found.name, found.version, found.description
        self.tags, self.id = dict(found.tags), found.manifest_digest
        self.file_count, self.total_size = found.file_count, found.total_size

    def __repr__(self) -> str:
        return f"Dataset({self.name}:{self.version}, {self.file_count} files, {self.total_size / 1e6:.1f} MB)"

    @classmethod
    def upload(
        cls,
        workspace: Session,
        path: str,
        name: str,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        *,
        verify: bool = False,
        follow_links: bool = False,
    ) -> Dataset:
        """Register a folder. Only what is new is uploaded; identical content is the version that has it.

        `verify`: what the platform has of it already is read again, and replaced where it is damaged. `follow_links`: also links to
        folders outside of `path`; those inside, and links to files, are followed always.

        Raises:
            AlvearyError: there is something that cannot be read or uploaded, or a file changed meanwhile.
        """
        from alveary.progress import upload_progress

        with upload_progress(name) as progress:
            found = workspace._call(
                workspace._client.datasets.upload(Path(path), name, description, tags, progress, verify=verify, follow_links=follow_links)
            )
        return cls(workspace, found)

    @classmethod
    def get_by_name(cls, workspace: Session, name: str, version: int | str = "latest") -> Dataset:
        """A version; the latest where none is said."""
        number = 0 if version == "latest" else int(version)
        return cls(workspace, workspace._call(workspace._client.datasets.get(name, number)))

    @classmethod
    def list(cls, workspace: Session, name: str = "") -> list[Dataset]:
        """All versions, the latest of a name first."""
        return [cls(workspace, found) for found in workspace._call(workspace._client.datasets.list(name))]

    def as_mount(self, name: str | None = None) -> Input:
        """As an input of a run, under `name` (default: the dataset's)."""
        return Input(name or self.name, self)

    def as_named_input(self, name: str) -> Input:
        """As an input of a run, under `name`."""
        return Input(name, self)

    def download(self, target_path: str = ".", overwrite: bool = False) -> str:
        """Store its files here, all of them or none; returns the folder.

        Raises:
            AlvearyError: other files of these names are there and `overwrite` is False, or a file is damaged.
        """
        from alveary.progress import download

        client = self._workspace._client
        files = self._workspace._call(client.datasets.files(self.name, self.version))
        download(self._workspace, files, Path(target_path), overwrite=overwrite)
        return target_path


def references(datasets: Sequence[Any] | None) -> list[str]:
    """ "name:version" of each Dataset or Input, or of the one in each pair of a purpose and one.

    Raises:
        AlvearyError: there is something else among them.
    """
    found = []
    for one in datasets or ():
        dataset = one[1] if isinstance(one, (tuple, list)) and len(one) == 2 else one
        dataset = dataset.dataset if isinstance(dataset, Input) else dataset
        if not isinstance(dataset, Dataset):
            raise AlvearyError(f"datasets: {one!r} is no dataset: use Dataset.get_by_name(...)", "INVALID_ARGUMENT")
        found.append(f"{dataset.name}:{dataset.version}")
    return found
