"""What a run runs in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from alveary.errors import AlvearyError
from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import environment_digest


class Environment:
    """A Python version, packages and environment variables; or an interpreter that is there already.

    Environments of the same content share one build, whatever they are called. Unpinned packages stay at what the
    first build resolved, until `rebuild_key` changes.
    """

    def __init__(
        self, name: str, pip_packages: Iterable[str] = (), python_version: str = "",
        environment_variables: Mapping[str, str] | None = None, user_managed: bool = False, interpreter: str = "",
        rebuild_key: str = "",
    ) -> None:  # fmt: skip
        self.name = name
        self.pip_packages = list(pip_packages)
        self.python_version = python_version
        self.environment_variables = dict(environment_variables or {})
        self.user_managed = user_managed
        self.interpreter = interpreter
        self.rebuild_key = rebuild_key

    @classmethod
    def from_pip_requirements(cls, name: str, file_path: str, pip_version: str | None = None) -> Environment:
        """From a requirements file; comments and empty lines are left out, options are refused.

        Raises:
            AlvearyError: the file is missing or has options.
        """
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
        return c.Environment(
            name=self.name, pip_packages=self.pip_packages, python_version=self.python_version,
            environment_variables=self.environment_variables, user_managed=self.user_managed, interpreter=self.interpreter,
            rebuild_key=self.rebuild_key,
        )  # fmt: skip


def requirements_of(file: Path) -> list[str]:
    """Requirements of a file.

    Raises:
        AlvearyError: it is missing, or has options, which the platform takes from its own pip settings.
    """
    if not file.exists():
        raise AlvearyError(f"the requirements file {file} does not exist", "NOT_FOUND")
    found = []
    for line in file.read_text().splitlines():
        text = line.partition(" #")[0].strip()
        if text.startswith("-"):
            raise AlvearyError(
                f"{file}: {text!r}: options are not taken from requirements files; indexes come from the platform's pip settings",
                "INVALID_ARGUMENT",
            )
        if text and not text.startswith("#"):
            found.append(text)
    return found
