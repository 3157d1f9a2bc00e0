"""From a lock to an environment: in seconds from uv's cache, hard-linked, evicted least recently used."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from alveary_contracts.digests import lock_key
from alveary_core import telemetry
from alveary_core.errors import NotFound
from alveary_core.objectstore import ObjectStore
from alveary_core.uv import python_for, uv_binary, uv_environment
from alveary_trainer.adapters.fingerprint import Change
from alveary_trainer.adapters.runtime import ProgressCallback, StagingFailed
from alveary_trainer.adapters.shared_cache import SharedCache


class Environments:
    """The environments of one machine's cache, safe to share between trainers."""

    def __init__(self, folder: Path, limit: int, store: ObjectStore) -> None:
        # Not strict: uv links the files of one package into every environment, which sets their ctime.
        self._cache, self._store = SharedCache(folder, limit, strict=False), store

    @asynccontextmanager
    async def use(
        self, workspace: str, digest: str, interpreter: str, user_managed: bool, progress: ProgressCallback
    ) -> AsyncIterator[Path]:
        """Path of the environment's python; the environment stays as long as this context does.

        Raises:
            StagingFailed: it cannot be made here.
        """
        if user_managed:
            path = Path(interpreter or sys.executable)
            if not os.access(path, os.X_OK):
                raise StagingFailed(f"the interpreter {path} of the user-managed environment is not on this node")
            yield path
            return
        # Each workspace has resolved its own.
        name = hashlib.sha256(lock_key(workspace, digest).encode()).hexdigest()

        async def changed(change: Change) -> None:
            telemetry.logger().warning("cache.changed", bucket="environments", digest=digest, what=change.words)
            await progress(
                f"environment {digest[:12]} was changed on this node since it was installed: {change.words}; it is installed again"
            )
            if change.linked:  # what was changed is uv's own copy, from which it would be installed again
                await self._uv(["cache", "clean", "--quiet"], Path("/"))

        async with self._cache.use(name, lambda part, final: self._make(workspace, digest, part, final, progress), changed) as folder:
            yield folder / "bin/python"

    async def _make(self, workspace: str, digest: str, part: Path, final: Path, progress: ProgressCallback) -> None:
        try:
            lock = json.loads(await self._store.get("images", lock_key(workspace, digest)))
        except NotFound as error:
            raise StagingFailed(f"the lock of environment {digest[:12]} is gone from the object store") from error
        await progress(f"environment {digest[:12]}: installing {len(lock['packages'])} packages")
        python = await python_for(lock["python_version"], progress)
        await self._uv(["venv", "--quiet", "--allow-existing", "--python", python, str(part)], part)
        if lock["packages"]:
            (part / "lock.txt").write_text(lock["requirements"])
            wheels = part / "wheels"
            wheels.mkdir()
            for wheel in lock["wheels"]:
                await self._store.get_file("images", f"wheels/{wheel['sha256']}", wheels / wheel["file"], wheel["sha256"])
            install = ["pip", "install", "--python", str(part / "bin/python"), "--require-hashes", "--no-deps", "-r", "lock.txt"]
            await self._uv(install, part, wheels)
            await asyncio.to_thread(shutil.rmtree, wheels)
        # The path of the interpreter is written into console scripts: they must name the final one.
        for script in (part / "bin").iterdir():
            if script.is_file() and not script.is_symlink() and script.stat().st_size < 1 << 16:
                text = script.read_bytes()
                if bytes(part) in text:
                    script.write_bytes(text.replace(bytes(part), bytes(final)))
        await progress(f"environment {digest[:12]}: ready")

    async def _uv(self, arguments: list[str], cwd: Path, wheels: Path | None = None) -> None:
        env = uv_environment()
        if wheels is not None:  # beside the machine's own find-links, which an option would replace
            env["UV_FIND_LINKS"] = ",".join(filter(None, [env.get("UV_FIND_LINKS"), str(wheels)]))
        env.pop("UV_CONSTRAINT", None)  # the lock was resolved under it; with --require-hashes uv refuses ranges
        # In the trainer's session, by which it is told from orphans of runs (process.end_orphans).
        process = await asyncio.create_subprocess_exec(
            uv_binary(), *arguments, cwd=cwd, env=env, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, process_group=0,
        )  # fmt: skip
        try:
            async with asyncio.timeout(3600):
                _, errors = await process.communicate()
        except BaseException:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            raise
        if process.returncode:
            raise StagingFailed("the environment could not be installed:\n" + errors.decode(errors="replace")[-4000:])
