"""A run from inside: what `Run.get_context()` gives a script. Standard library alone.

Nothing that only records (metrics, pictures, tags) raises for what can be said on stderr instead: hours of training are worth more.
What a script needs the outcome of (register_model, upload_file, flush) raises.
"""

from __future__ import annotations

import functools
import numbers
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from alveary import context
from alveary.errors import AlvearyError
from alveary.unsupported import refuse_model_extras

F = TypeVar("F", bound=Callable[..., None])
_ODD = re.compile(r"[\x00-\x1f\x7f\\%\ud800-\udfff]")
_LONGEST_PART = 200


def recording(method: F) -> F:
    """Make a method say on stderr what it raises."""

    @functools.wraps(method)
    def wrapped(self: Recorder, *arguments: Any, **named: Any) -> None:
        try:
            method(self, *arguments, **named)
        except Exception as error:  # whatever a value makes of it must not end the training
            what = arguments[0] if arguments else named.get("name", named.get("key", ""))
            text = str(error) or type(error).__name__
            self._refuse(f"{method.__name__}({str(what)[:100]!r}) is left out: {text[:500]}")

    return cast(F, wrapped)


class Recorder:
    """What can be logged, wherever it goes."""

    def _metric(self, message: dict[str, Any]) -> None:
        raise NotImplementedError

    def _say_what_is_left_out(self, datasets: Any, *extras: Any) -> None:
        """Of a model's registration. A script ends with it, and hours of training are not lost over what is not offered."""
        if datasets:
            self._refuse("register_model: datasets is left out: the run's inputs are the datasets of its models")
        try:
            refuse_model_extras(*extras)
        except AlvearyError as error:
            self._refuse(f"register_model: {error}")

    def _refuse(self, text: str) -> None:
        print(f"alveary: {text}", file=sys.stderr, flush=True)

    @recording
    def log(self, name: str, value: Any, description: str = "", step: Any = None) -> None:
        """Log a number (or text) under `name`; `step` is its place on the axis, if it has one."""
        kind, plain = _scalar(value)
        self._metric(context.metric(name, kind, plain, description, step))

    @recording
    def log_list(self, name: str, value: Sequence[float], description: str = "") -> None:
        """Log numbers, each as a point of its own series."""
        whole = [float(v) for v in (value.tolist() if hasattr(value, "tolist") else value)]
        for start in range(0, max(len(whole), 1), context.LIST_PART):
            self._metric(context.metric(name, "list", whole[start : start + context.LIST_PART], description))

    @recording
    def log_row(self, name: str, description: str = "", **kwargs: Any) -> None:
        """Log one row of named columns; repeated calls make a table."""
        self._metric(context.metric(name, "row", kwargs, description))

    @recording
    def log_table(self, name: str, value: Mapping[str, Any], description: str = "") -> None:
        """Log a table: columns of equal length by name."""
        self._metric(context.metric(name, "table", dict(value), description))

    @recording
    def log_image(self, name: str, path: str | None = None, plot: Any = None, description: str = "", step: Any = None) -> None:
        """Log a picture: a file, a matplotlib plot (figure or pyplot) or a PIL image, stored among the run's files.

        Each call stores a picture of its own, also under a name that was used before; `step` is part of its file's name.
        """
        if (path is None) == (plot is None):
            raise ValueError("exactly one of path and plot is needed")
        message = context.metric(name, "image", "", description, step)  # what is wrong with it, before anything is stored
        with _as_file(path, plot) as file:
            suffix = f"-step{message['step']}" if "step" in message else ""
            message["value"] = self._picture(f"outputs/images/{file_name(name)}{suffix}{Path(file).suffix}", file)
        self._metric(message)

    def _picture(self, name: str, path: str) -> str:
        """Store a picture under `name`, or one like it that is free; returns the name."""
        raise NotImplementedError


class ContextRun(Recorder):
    """The run that this process is part of."""

    def __init__(self, trainer: context.TrainerConnection) -> None:
        self._trainer = trainer
        self.id = os.environ["ALVEARY_RUN_ID"]
        self.attempt = int(os.environ.get("ALVEARY_ATTEMPT", "1"))
        self.experiment_name = os.environ.get("ALVEARY_EXPERIMENT", "")

    def _metric(self, message: dict[str, Any]) -> None:
        self._trainer.send(message)

    def _refuse(self, text: str) -> None:
        self._trainer.refuse(text)

    def _picture(self, name: str, path: str) -> str:
        return str(self._trainer.request({"op": "upload", "name": name, "path": os.path.abspath(path), "unique": True})["path"])

    def flush(self, timeout_seconds: float = 300) -> None:
        """Wait until everything that was logged is stored.

        Raises:
            ContextError: not within the time.
        """
        self._trainer.flush(timeout_seconds)

    @recording
    def tag(self, key: str, value: str = "") -> None:
        """Set a tag. One that is refused, or not taken within a minute, is said on stderr."""
        self._trainer.request({"op": "tag", "set": {key: str(value)}})

    @recording
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._trainer.request({"op": "tag", "set": {key: str(value) for key, value in tags.items()}})

    @recording
    def add_properties(self, properties: Mapping[str, str]) -> None:
        """Add properties; existing ones cannot change."""
        self._trainer.request({"op": "tag", "properties": {key: str(value) for key, value in properties.items()}})

    def get_tags(self) -> dict[str, str]:
        """Tags that the run was submitted with."""
        return dict(self._trainer.request({"op": "info"})["tags"])

    def upload_file(self, name: str, path_or_stream: Any) -> Any:
        """Store a file of this machine, or what a binary stream holds, as `name` among the run's files, now.

        Raises:
            ContextError: it cannot be stored.
        """
        if not hasattr(path_or_stream, "read"):
            return self._trainer.request({"op": "upload", "name": name, "path": os.path.abspath(path_or_stream)})
        with tempfile.NamedTemporaryFile() as file:
            while data := path_or_stream.read(1 << 20):
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            return self._trainer.request({"op": "upload", "name": name, "path": file.name})

    def upload_folder(self, name: str, path: str) -> None:
        """Store a folder under `name`."""
        for root, _, files in os.walk(path):
            for file in files:
                full = Path(root, file)
                self.upload_file(f"{name}/{full.relative_to(path).as_posix()}", full)

    def register_model(
        self,
        model_name: str,
        model_path: str | None = None,
        tags: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        model_framework: str | None = None,
        model_framework_version: str | None = None,
        description: str | None = None,
        datasets: Any = None,
        sample_input_dataset: Any = None,
        sample_output_dataset: Any = None,
        resource_configuration: Any = None,
    ) -> dict[str, Any]:
        """Register a file or folder of the working directory as a model; returns its name and version.

        The same content under the same name is one version of this run, however often it is registered, in later attempts as well.

        Raises:
            ContextError: it is refused, or the platform does not answer for a minute.
        """
        self._say_what_is_left_out(datasets, sample_input_dataset, sample_output_dataset, resource_configuration)
        message = {
            "op": "register",
            "name": model_name,
            "path": model_path or "outputs",
            "tags": dict(tags or {}),
            "properties": dict(properties or {}),
            "description": description or "",
            "framework": model_framework or "",
            "framework_version": model_framework_version or "",
        }
        return dict(self._trainer.request(message))

    @property
    def resume_path(self) -> str | None:
        """Where the checkpoints of an earlier attempt are; None: there is none."""
        return os.environ.get("ALVEARY_RESUME_FROM") or None

    @recording
    def complete(self) -> None:
        """Flush; the run itself completes when the process ends."""
        self.flush()


class OfflineRun(Recorder):
    """Outside a submitted run: prints what would be logged."""

    id = "OfflineRun"
    attempt = 1
    resume_path = None

    def _metric(self, message: dict[str, Any]) -> None:
        step = f" (step {message['step']})" if "step" in message else ""
        print(f"{message['name']}: {message['value']}{step}", flush=True)

    def _picture(self, name: str, path: str) -> str:
        print(f"upload {path} as {name}")
        return name

    def upload_file(self, name: str, path_or_stream: Any) -> Any:
        """Say where it would go."""
        print(f"upload {path_or_stream} as {name}")

    def upload_folder(self, name: str, path: str) -> None:
        """Say where it would go."""
        print(f"upload {path} as {name}")

    def register_model(
        self,
        model_name: str,
        model_path: str | None = None,
        tags: Mapping[str, str] | None = None,
        properties: Mapping[str, str] | None = None,
        model_framework: str | None = None,
        model_framework_version: str | None = None,
        description: str | None = None,
        datasets: Any = None,
        sample_input_dataset: Any = None,
        sample_output_dataset: Any = None,
        resource_configuration: Any = None,
    ) -> dict[str, Any]:
        """Say what would be registered."""
        self._say_what_is_left_out(datasets, sample_input_dataset, sample_output_dataset, resource_configuration)
        print(f"register {model_path or 'outputs'} as model {model_name}")
        return {"name": model_name, "version": 0}

    def tag(self, key: str, value: str = "") -> None:
        """Say it."""
        print(f"tag {key}: {value}")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Say it."""
        for key, value in tags.items():
            self.tag(key, value)

    add_properties = set_tags

    def get_tags(self) -> dict[str, str]:
        """None: nothing was submitted."""
        return {}

    def flush(self, timeout_seconds: float = 300) -> None:
        """Nothing waits."""

    def complete(self) -> None:
        """Nothing waits."""


def _scalar(value: Any) -> tuple[str, str | float | int]:
    """Kind and plain form of what log() was given.

    Raises:
        TypeError, ValueError, OverflowError: it is neither a number nor text.
    """
    if isinstance(value, str):
        return "text", value
    plain = value
    if hasattr(value, "item") and not isinstance(value, numbers.Number):
        try:
            plain = value.item()
        except (TypeError, ValueError, RuntimeError) as error:
            shape = getattr(value, "shape", "")
            raise TypeError(f"a number or text, not {type(value).__name__} of shape {tuple(shape)}; use log_list") from error
    if isinstance(plain, (bool, float)):
        return "scalar", plain
    if isinstance(plain, numbers.Real) or hasattr(plain, "as_integer_ratio"):  # numpy's, Fraction, Decimal
        return "scalar", plain if isinstance(plain, int) and abs(plain) < 2**53 else float(plain)
    raise TypeError(f"a number or text, not {type(value).__name__}; use log_list, log_row, log_table or log_image")


def file_name(name: str) -> str:
    """The path below outputs/images of pictures of a name: folders where it has slashes, nothing that leads elsewhere."""
    parts = []
    for part in name.split("/"):
        plain = _ODD.sub(lambda found: "".join(f"%{b:02X}" for b in found.group().encode(errors="surrogatepass")), part)[:_LONGEST_PART]
        if part:
            parts.append("_" * len(plain) if plain.strip(".") == "" else plain)
    return "/".join(parts) or "_"


@contextmanager
def _as_file(path: str | None, plot: Any) -> Iterator[str]:
    """A file with the picture."""
    if path is not None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {path!r}")
        yield str(path)
        return
    descriptor, made = tempfile.mkstemp(suffix=".png")
    os.close(descriptor)
    try:
        save = getattr(plot, "savefig", None) or getattr(plot, "save", None)
        if save is None:
            raise TypeError(f"a plot that can be saved (matplotlib, PIL), not {type(plot).__name__}")
        save(made)
        yield made
    finally:
        os.unlink(made)
