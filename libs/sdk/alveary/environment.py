"""What a run runs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alveary.errors import AlvearyError
from alveary.requirements import requirement_problem, requirements_of
from alveary.unsupported import refuse_given
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import environment_digest


class Environment:
    """A Python version, packages and environment variables; or an interpreter that is there already.

    On a platform that runs containers also: `apt_packages`, `conda_packages` (from `conda_channels`, default
    conda-forge), a `base_image` to build on, a `dockerfile` (its text) or a ready `image` by reference. `locked` builds
    from the set of packages that the same environment was last resolved to.

    Environments of the same content share one build, whatever they are called. Unpinned packages stay at what the
    first build resolved, until `rebuild_key` changes.
    """

    def __init__(
        self,
        name: str,
        pip_packages: Iterable[str] = (),
        python_version: str = "",
        environment_variables: Mapping[str, str] | None = None,
        user_managed: bool = False,
        interpreter: str = "",
        rebuild_key: str = "",
        *,
        conda_packages: Iterable[str] = (),
        conda_channels: Iterable[str] = (),
        apt_packages: Iterable[str] = (),
        base_image: str = "",
        dockerfile: str = "",
        image: str = "",
        locked: bool = False,
    ) -> None:
        self.name = name
        self.pip_packages = list(pip_packages)
        self.python_version = python_version
        self.environment_variables = dict(environment_variables or {})
        self.user_managed = user_managed
        self.interpreter = interpreter
        self.rebuild_key = rebuild_key
        self.conda_packages, self.conda_channels = list(conda_packages), list(conda_channels)
        self.apt_packages = list(apt_packages)
        self.base_image, self.dockerfile, self.image = base_image, dockerfile, image
        self.locked = locked

    @classmethod
    def from_docker_image(
        cls,
        name: str,
        image: str,
        container_registry: object = None,
        conda_specification: str | None = None,
        pip_requirements: str | None = None,
    ) -> Environment:
        """A ready image by reference; with `pip_requirements` (a file) they are installed on top of it.

        Raises:
            AlvearyError: container_registry or conda_specification was given, or the file is missing.
        """
        if container_registry is not None:
            raise AlvearyError("container_registry: give the platform its credentials once, with `alveary image login`", "INVALID_ARGUMENT")
        if conda_specification is not None:
            raise AlvearyError("conda_specification: use Environment(conda_packages=..., base_image=...)", "INVALID_ARGUMENT")
        if pip_requirements is not None:
            return cls(name, requirements_of(Path(pip_requirements)), base_image=image)
        return cls(name, image=image)

    @classmethod
    def from_dockerfile(
        cls, name: str, dockerfile: str, conda_specification: str | None = None, pip_requirements: str | None = None
    ) -> Environment:
        """From the text of a Dockerfile, or a file that holds it. Its build context is empty.

        Raises:
            AlvearyError: packages were given beside it.
        """
        if conda_specification is not None or pip_requirements is not None:
            raise AlvearyError("packages belong into the Dockerfile itself", "INVALID_ARGUMENT")
        file = Path(dockerfile) if "\n" not in dockerfile else None
        return cls(name, dockerfile=file.read_text() if file is not None and file.is_file() else dockerfile)

    @classmethod
    def from_pip_requirements(cls, name: str, file_path: str, pip_version: str | None = None) -> Environment:
        """From a requirements file, read as pip reads it (`alveary.requirements`).

        Raises:
            AlvearyError: it is missing, or has what is not taken; names file and line. Or pip_version was given.
        """
        refuse_given(pip_version=(pip_version, "packages are resolved by uv; leave it out"))
        return cls(name, requirements_of(Path(file_path)))

    def clone(self, new_name: str) -> Environment:
        """The same under another name."""
        copy = Environment(new_name)
        copy.__dict__.update({k: v.copy() if isinstance(v, (list, dict)) else v for k, v in self.__dict__.items()})
        copy.name = new_name
        return copy

    @property
    def digest(self) -> str:
        """The cache key of its image."""
        return environment_digest(self._proto())

    def _proto(self) -> c.Environment:
        for package in self.pip_packages:
            if problem := requirement_problem(package):
                raise AlvearyError(f"pip_packages: {package[:200]!r}: {problem}", "INVALID_ARGUMENT")
        return c.Environment(
            name=self.name,
            pip_packages=self.pip_packages,
            python_version=self.python_version,
            environment_variables=self.environment_variables,
            user_managed=self.user_managed,
            interpreter=self.interpreter,
            rebuild_key=self.rebuild_key,
            conda_packages=self.conda_packages,
            conda_channels=self.conda_channels,
            apt_packages=self.apt_packages,
            base_image=self.base_image,
            dockerfile=self.dockerfile,
            image=self.image,
            locked=self.locked,
        )
