"""From a lock to an environment: in seconds from uv's cache, hard-linked, evicted least recently used."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from alveary_core.objectstore import ObjectStore
from alveary_core.uv import uv_binary, uv_environment

Say = Callable[[str], Awaitable[None]]


class StagingFailed(Exception):
    """Something a run needs cannot be had on this node; the text says what."""


class Environments:
    """The environments of one machine's cache, safe to share between trainers."""

    def __init__(self, folder: Path, limit: int, store: ObjectStore) -> None:
        self._folder, self._limit, self._store = folder, limit, store
        folder.mkdir(parents=True, exist_ok=True)
        self._locks: dict[str, asyncio.Lock] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self._in_use: dict[str, int] = {}

    async def python(self, digest: str, interpreter: str, user_managed: bool, say: Say) -> Path:
        """Path of the environment's python; call `release` when the run is over.

        Raises:
            StagingFailed: it cannot be made here.
        """
        if user_managed:
            path = Path(interpreter or sys.executable)
            if not os.access(path, os.X_OK):
                raise StagingFailed(f"the interpreter {path} of the user-managed environment is not on this node")
            return path
        folder = self._folder / digest
        self._in_use[digest] = self._in_use.get(digest, 0) + 1
        try:
            async with self._locks.setdefault(digest, asyncio.Lock()):
                if not (folder / ".complete").exists():
                    await self._make(digest, folder, say)
                os.utime(folder / ".complete")
        except BaseException:
            self.release(digest)
            raise
        return folder / "bin/python"

    def release(self, digest: str) -> None:
        """The run that asked for it is over."""
        left = self._in_use.get(digest, 0) - 1
        if left > 0:
            self._in_use[digest] = left
        else:
            self._in_use.pop(digest, None)

    async def _make(self, digest: str, folder: Path, say: Say) -> None:
        lock = json.loads(await self._store.get("images", f"locks/{digest}.json"))
        part = self._folder / f".{digest[:16]}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            await say(f"environment {digest[:12]}: installing {len(lock['packages'])} packages")
            await self._uv(["venv", "--quiet", "--allow-existing", "--python", lock["python_version"], str(part)], part)
            if lock["packages"]:
                (part / "lock.txt").write_text(lock["requirements"])
                wheels = part / "wheels"
                wheels.mkdir()
                for wheel in lock["wheels"]:
                    await self._store.get_file("images", f"wheels/{wheel['sha256']}", wheels / wheel["file"], wheel["sha256"])
                install = ["pip", "install", "--python", str(part / "bin/python"), "--require-hashes", "--no-deps", "-r", "lock.txt"]
                await self._uv([*install, "--find-links", str(wheels)], part)
                shutil.rmtree(wheels)
            # The path of the interpreter is written into console scripts: they must name the final one.
            for script in (part / "bin").iterdir():
                if script.is_file() and not script.is_symlink() and script.stat().st_size < 1 << 16:
                    text = script.read_bytes()
                    if bytes(part) in text:
                        script.write_bytes(text.replace(bytes(part), bytes(folder)))
            size = await asyncio.to_thread(_size, part)
            (part / ".complete").write_text(str(size))
            shutil.rmtree(folder, ignore_errors=True)
            try:
                part.rename(folder)
            except OSError:  # another trainer of this machine was faster
                if not (folder / ".complete").exists():
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        await say(f"environment {digest[:12]}: ready, {size / 1e6:.0f} MB")
        await asyncio.to_thread(self._evict)

    async def _uv(self, arguments: list[str], cwd: Path) -> None:
        env = uv_environment()
        env.pop("UV_CONSTRAINT", None)  # the lock was resolved under it; with --require-hashes uv refuses ranges
        process = await asyncio.create_subprocess_exec(
            uv_binary(), *arguments, cwd=cwd, env=env, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
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

    def _evict(self) -> None:
        found = []
        for marker in self._folder.glob("*/.complete"):
            found.append((marker.stat().st_mtime, int(marker.read_text() or 0), marker.parent))
        total = sum(size for _, size, _ in found)
        for _, size, folder in sorted(found):
            if total <= self._limit:
                return
            if folder.name not in self._in_use:
                # Renamed first, so that nobody starts with half of it.
                doomed = folder.with_name(f".evicted-{folder.name[:16]}-{os.getpid()}")
                folder.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
                total -= size


def _size(folder: Path) -> int:
    return sum(os.lstat(os.path.join(root, f)).st_size for root, _, files in os.walk(folder) for f in files)
