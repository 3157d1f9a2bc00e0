"""A run that was submitted, as its id and a connection show it: state, tags, metrics, files, logs.

Standard library alone until a method is called.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alveary.errors import AlvearyError, RunFailedException
from alveary.live import LivePrinter
from alveary.text import printable
from alveary.unsupported import refuse_given, refuse_run_type

if TYPE_CHECKING:
    from alveary.session import Session
    from alveary_contracts.runs.v1 import runs_pb2 as pb

# Streams that are shown while a run is followed: what its program prints, and what is printed before and around it.
SHOWN = ("stdout", "stderr", "prepare", "launcher-stdout", "launcher-stderr")


class SubmittedRun:
    """A run by its id. Users have a Run, which is one."""

    def __init__(self, workspace: Session, run_id: str) -> None:
        self._workspace = workspace
        self.id = run_id

    def _call(self, work: Any) -> Any:
        return self._workspace._call(work)

    def _get(self) -> pb.Run:
        return self._workspace._call(self._workspace._client.runs.get(self.id))

    def get_status(self) -> str:
        """Its state, for example "Running"."""
        from alveary.client.states import state_name

        return state_name(self._get().state)

    @property
    def status(self) -> str:
        """Its state."""
        return self.get_status()

    def get_details(self) -> dict[str, Any]:
        """Everything about it, as plain data."""
        from alveary.client.states import run_details

        return run_details(self._get())

    @property
    def number(self) -> int:
        """Its place among the experiment's runs, from 1."""
        return self._get().number

    @property
    def display_name(self) -> str:
        """What users call it."""
        return self._get().display_name

    @property
    def tags(self) -> dict[str, str]:
        """Its tags."""
        return dict(self._get().tags)

    def get_tags(self) -> dict[str, str]:
        """Its tags."""
        return self.tags

    @property
    def properties(self) -> dict[str, str]:
        """Its properties."""
        return dict(self._get().properties)

    def get_properties(self) -> dict[str, str]:
        """Its properties."""
        return self.properties

    def get_snapshot_id(self) -> str:
        """Digest of its source."""
        return self._get().spec.snapshot

    def tag(self, key: str, value: str = "") -> None:
        """Set a tag."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._call(self._workspace._client.runs.tag(self.id, set={k: str(v) for k, v in tags.items()}))

    def remove_tags(self, tags: Sequence[str]) -> None:
        """Remove tags."""
        self._call(self._workspace._client.runs.tag(self.id, remove=list(tags)))

    def add_properties(self, properties: Mapping[str, str]) -> None:
        """Add properties; existing ones cannot change."""
        self._call(self._workspace._client.runs.tag(self.id, properties={k: str(v) for k, v in properties.items()}))

    # ---- waiting, ending ------------------------------------------------------------------------------------------

    def wait_for_completion(
        self, show_output: bool = False, wait_post_processing: bool = False, raise_on_error: bool = True
    ) -> dict[str, Any]:
        """Wait for its final state; with show_output, print states, stdout and stderr as they come.

        Raises:
            RunFailedException: it Failed, unless raise_on_error is False.
        """
        if show_output:
            try:
                self._show()
            except KeyboardInterrupt:
                print(f"\nrun {self.id} goes on: wait_for_completion(show_output=True) follows it again, cancel() ends it", file=sys.stderr)
                raise
        details = self._call(self._workspace._client.runs.wait(self.id))
        from alveary.client.states import run_details

        plain = run_details(details)
        if raise_on_error and plain["status"] == "Failed":
            exit_status = plain["exit"]
            last = "\n".join(exit_status.get("last_lines", []))
            raise RunFailedException(f"run {self.id} failed: {plain['reason'] or exit_status.get('reason')}\n{last}".rstrip())
        return plain

    def _show(self, streams: Sequence[str] = SHOWN) -> None:
        """Print its states and log lines as they come, until it is final."""
        screen = LivePrinter()

        def line(one: Any) -> None:
            mark = f"[{printable(one.stream)}] " if one.stream not in SHOWN else ""
            screen.add(one, mark, to_err=one.stream == "stderr")

        def state(name: str, reason: str) -> None:
            screen.say(f"[{name}]{' ' + printable(reason, keep=chr(10)) if reason else ''}")

        try:
            self._call(self._workspace._client.follow_run(self.id, line, state, streams))
        finally:
            screen.close()

    def cancel(self) -> None:
        """Ask for its end."""
        self._call(self._workspace._client.runs.cancel(self.id))

    def delete(self) -> None:
        """Erase it, once it is final: its files, checkpoints, log and metrics. Models that were registered from it stay.

        Raises:
            AlvearyError: it is not final.
        """
        self._call(self._workspace._client.runs.delete(self.id))

    def why_queued(self) -> dict[str, Any]:
        """Position in its target's queue (from 1), what it waits for, what would help, and when it begins at the latest.

        `expected_start` is seconds since 1970, None where it cannot be foreseen (what runs has no max_run_duration).

        Raises:
            AlvearyError: NOT_FOUND when it does not wait for a place.
        """
        found = self._call(self._workspace._client.compute.explain_run(self.id))
        expected = found.expected_start.ToNanoseconds() / 1e9 if found.HasField("expected_start") else None
        return {
            "position": found.waiting.position,
            "priority": found.waiting.priority,
            "waits_for": found.waits_for,
            "would_help": found.would_help,
            "expected_start": expected,
        }

    # ---- metrics, files, logs -------------------------------------------------------------------------------------

    def get_metrics(
        self, name: str | None = None, recursive: bool = False, run_type: str | None = None, populate: bool = False
    ) -> dict[str, Any]:
        """Metrics by name: a value for one logged once, a list for one logged repeatedly.

        Args:
            recursive: also those of its child runs.

        Raises:
            AlvearyError: run_type or populate was given.
        """
        refuse_run_type(run_type)
        refuse_given(populate=(populate or None, "pictures are files of the run: download_file gets one"))
        return dict(self._call(self._workspace._client.metrics.values(self.id, name or "", recursive)))

    def log(self, name: str, value: float, description: str = "", step: int | None = None) -> None:
        """Log a number from outside the run."""
        self._call(self._workspace._client.metrics.log(self.id, name, float(value), step, description))

    def get_file_names(self) -> builtins.list[str]:
        """Names of the files it stored."""
        return [file.path for file in self._call(self._workspace._client.runs.files(self.id)).files]

    def download_file(self, name: str, output_file_path: str | None = None, *, overwrite: bool = False) -> str:
        """Store one of its files here (default: its last name, in this folder); returns the path.

        Raises:
            AlvearyError: it stored no such file, or another file is there and `overwrite` is False.
        """
        from alveary_contracts.names import normal_path

        wanted = normal_path(name)
        links = self._call(self._workspace._client.runs.file_links(self.id, wanted, with_urls=True))
        found = [link for link in links if link.file.path == wanted]
        if not found:
            raise AlvearyError(f"run {self.id} stored no {name!r}; get_file_names() shows what it did", "NOT_FOUND")
        last = wanted.rpartition("/")[2]
        path = Path(output_file_path or last)
        if path.is_dir():
            path = path / last
        self._call(self._workspace._client.transfers.download(found[0], path, overwrite=overwrite))
        return str(path)

    def download_files(
        self,
        prefix: str = "",
        output_directory: str | None = None,
        output_paths: Sequence[str] | None = None,
        batch_size: int | None = None,
        append_prefix: bool = True,
        timeout_seconds: float | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Store its files here, with their folders, all of them or none.

        Raises:
            AlvearyError: it stored none that begin with `prefix`; other files are there and `overwrite` is False; or something
                given is not offered.
        """
        refuse_given(
            output_paths=(output_paths, "files keep their names below output_directory; download_file stores one under another"),
            append_prefix=(None if append_prefix else False, "files keep their whole names below output_directory"),
        )
        from alveary.progress import download

        files = self._call(self._workspace._client.runs.files(self.id, prefix))
        if not files.files:
            raise AlvearyError(f"run {self.id} stored nothing under {prefix!r}; get_file_names() shows what it did", "NOT_FOUND")
        download(self._workspace, files, Path(output_directory or "."), overwrite=overwrite)

    def get_all_logs(self, destination: str | None = None) -> builtins.list[str]:
        """Write each stream of its log to a file; returns the paths."""
        folder = Path(destination or f"logs-{self.id}")
        return [str(p) for p in self._call(self._workspace._client.logs.write_files(self.id, folder))]

    def restore_snapshot(self, snapshot_id: str | None = None, path: str | None = None, *, overwrite: bool = False) -> str:
        """Store its source here; returns the folder."""
        folder = Path(path or f"snapshot-{self.id}")
        files = self._call(self._workspace._client.runs.snapshot_files(snapshot_id or self.get_snapshot_id()))
        self._call(self._workspace._client.transfers.download_all(files, folder, overwrite=overwrite))
        return str(folder)
