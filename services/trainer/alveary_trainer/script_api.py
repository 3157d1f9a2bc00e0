"""What a script may ask the trainer for, over the socket of its attempt; see context_server.py for how it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alveary_contracts.names import path_problem
from alveary_trainer.adapters.runtime import AttemptPaths
from alveary_trainer.assignment import Assignment
from alveary_trainer.context_server import Ask
from alveary_trainer.outputs import OutputStore


def operations(assignment: Assignment, paths: AttemptPaths, outputs: OutputStore, log: Callable[[str], None]) -> dict[str, Ask]:
    """The operations by name. `log` writes to the run's system log."""
    node, run_id, spec = assignment.node, assignment.run_id, assignment.spec
    runtime = node.runtime

    async def upload(message: dict[str, Any]) -> Any:
        name = str(message["name"])
        if problem := path_problem(name):
            raise ValueError(problem)
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"{name!r} is not UTF-8: files cannot be stored under such a name")
        path = runtime.host_path(paths, str(message["path"]))
        entry = await outputs.upload(path, name, unique=bool(message.get("unique")))
        return {"path": entry.path, "size": entry.size, "sha256": entry.sha256}

    async def tag(message: dict[str, Any]) -> Any:
        await node.tag(run_id, message)
        return True

    async def register(message: dict[str, Any]) -> Any:
        path = _within(paths.work, str(message["path"]))
        return await node.register(run_id, path, message, paths.root, runtime.readable_below(paths), log)

    async def info(_: dict[str, Any]) -> Any:
        return {"run_id": run_id, "attempt": assignment.number, "tags": dict(spec.tags), "properties": dict(spec.properties)}

    async def refused(message: dict[str, Any]) -> Any:
        # The script's side did not send it, and said so on stderr; others look here.
        log(f"not logged: {str(message.get('text', ''))[:1000]}")
        return True

    return {"upload": upload, "tag": tag, "register": register, "info": info, "refused": refused}


def _within(work: Path, path: str) -> Path:
    found = (work / path).resolve()
    if not found.is_relative_to(work.resolve()) or not found.exists():
        raise ValueError(f"model_path {path!r} is no file or folder of this run's working directory")
    return found
