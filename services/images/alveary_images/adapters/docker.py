"""The docker builder: an environment becomes a container image, pushed to the platform's registry where there is one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import certifi
import docker
import docker.errors
import urllib3

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_core.objectstore import ObjectStore
from alveary_core.uv import clean_environment, uv_binary, uv_environment
from alveary_images.adapters import conda, horovod
from alveary_images.adapters.builder import Build, Lock, Say
from alveary_images.adapters.credentials import Credentials
from alveary_images.adapters.dockerfile import BUILD, ENV, LABEL, STAGE, dockerfile, faults
from alveary_images.adapters.resolve import BUCKET, BuildFailed, Resolved, local_files, newest, python_of, resolve, run_tool, workplace
from alveary_images.settings import ImagesSettings

# What of uv's settings may travel into the build stage; file:// indexes are replaced by the files themselves.
_TRAVELS = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INSECURE_HOST", "UV_INDEX_STRATEGY", "UV_HTTP_TIMEOUT")


class DockerBuilder:
    """Builds with the Engine API of the daemon that DOCKER_HOST names."""

    kind = "docker"

    def __init__(self, settings: ImagesSettings, store: ObjectStore, credentials: Credentials) -> None:
        self._settings, self._store, self._credentials = settings, store, credentials

    async def build(self, environment: c.Environment, which: Build, say: Say) -> Lock:
        """See Builder."""
        if problems := faults(environment):
            raise BuildFailed("; ".join(problems))
        async with workplace() as work:
            resolved = Resolved(python_of(environment))
            python = f"{ENV}/bin/python"
            base = environment.base_image or self._settings.base_image.format(python=python_of(environment))
            pulls = [base]
            if environment.image:
                pulls, python = [environment.image], environment.interpreter or "python3"
                context(work, {"Dockerfile": f"FROM {environment.image}\n".encode()}, [])
            elif environment.dockerfile:
                pulls, python = bases(environment.dockerfile), environment.interpreter or "python3"
                context(work, {"Dockerfile": environment.dockerfile.encode()}, [])
            elif environment.user_managed:
                # Nothing is installed: the base as it is.
                python = environment.interpreter or "python3"
                context(work, {"Dockerfile": f"FROM {base}\n".encode()}, [])
            else:
                resolved = await self._prepare(work, environment, which, base, say)
            result = await self._run(work, environment, which, pulls, say)
            return Lock(
                which.digest, self.kind, resolved.python_version, resolved.requirements, resolved.wheels, [*resolved.packages, *resolved.conda],
                image=str(result["image"]), python=python, size=int(str(result["size"])),
            )  # fmt: skip

    async def _prepare(self, work: Path, environment: c.Environment, which: Build, base: str, say: Say) -> Resolved:
        """Resolve, and lay out the build context."""
        installed: list[str] = []
        python = python_of(environment)
        files: dict[str, bytes] = {}
        folders: list[tuple[str, Path]] = []
        if environment.conda_packages:
            locked = (await newest(environment, self._store)).conda if environment.locked else []
            prefix = work / "conda"
            installed = await conda.install(environment.conda_packages, environment.conda_channels, prefix, say, locked)
            folders.append(("conda", prefix))
            own = next((p.split("=")[1] for p in installed if p.startswith("conda:python=")), "")
            python = ".".join(own.split(".")[:2]) or python

        async def special(folder: Path, requirements: str, version: str) -> dict[str, str] | None:
            build: horovod.Build = lambda inner, which, py, tell: self._horovod(inner, which, py, base, local_files(folder), tell)  # noqa: E731
            return await horovod.wheel(folder, requirements, version, base, self._store, say, build)

        resolved = await resolve(environment, which.workspace, self._store, say, special, python, installed)
        pip = bool(resolved.requirements)
        if pip:
            wheels = work / "wheels"
            wheels.mkdir()
            for wheel in resolved.wheels:
                await self._store.get_file(BUCKET, f"wheels/{wheel['sha256']}", wheels / wheel["file"], wheel["sha256"])
            for local in resolved.local:
                with contextlib.suppress(FileNotFoundError):  # of an older resolution: it may be on an index as well
                    await asyncio.to_thread(shutil.copy, local, wheels)
            folders.append(("wheels", wheels))
            files |= {"lock.txt": resolved.requirements.encode(), "env.sh": index_settings().encode(), "ca.pem": certificates()}
        extra = horovod.RUN_PACKAGES if any(w["name"] == horovod.NAME for w in resolved.wheels) else ()
        text = dockerfile(environment, which.digest, base, f"python{python}", pip=pip, extra_apt=extra)
        await say(f"building an image on {base}")
        files["Dockerfile"] = text.encode()
        folders.append(("uv", Path(uv_binary())))
        await asyncio.to_thread(context, work, files, folders)
        return resolved

    async def _horovod(self, folder: Path, version: str, python: str, base: str, local: list[str], say: Say) -> Path:
        """Build Horovod in a container of the base, whose system it is to fit."""
        wheels = folder / "wheels"
        wheels.mkdir()
        for file in local:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(shutil.copy, file, wheels)
        packages = " ".join(horovod.BUILD_PACKAGES)
        text = (
            f"FROM {base}\nRUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends {packages}\n"
            f"LABEL {STAGE}=horovod\nCOPY uv /usr/local/bin/uv\nCOPY env.sh ca.pem lock.txt horovod.sh /build/\nCOPY wheels/ /build/wheels/\n"
            "RUN cd /build && . ./env.sh && export UV=/usr/local/bin/uv PIP_CERT=/build/ca.pem PIP_FIND_LINKS=/build/wheels OUT=/out "
            f"UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never PYTHON_VERSION={python} HOROVOD_VERSION={version} && sh horovod.sh\n"
        )
        files = {
            "Dockerfile": text.encode(), "horovod.sh": horovod.SCRIPT.encode(), "lock.txt": (folder / "lock.txt").read_bytes(),
            "env.sh": index_settings().encode(), "ca.pem": certificates(),
        }  # fmt: skip
        await asyncio.to_thread(context, folder, files, [("wheels", wheels), ("uv", Path(uv_binary()))])
        out = folder / "out"
        order = {
            "context": str(folder / "context.tar"), "pull": [base], "tag": f"alveary/horovod:{version}-{os.getpid()}", "push": False,
            "network": self._settings.build_network, "labels": {}, "stage": {STAGE: "horovod"}, "result": str(folder / "result.json"),
            "auths": await self._credentials.auths(), "pull_missing_only": True, "extract": {"path": "/out", "to": str(out)},
        }  # fmt: skip
        command = [sys.executable, "-m", "alveary_images.adapters.docker_build"]
        await run_tool(command, folder, say, clean_environment(), stdin=json.dumps(order).encode() + b"\n")
        return horovod.the_wheel(out)

    async def _run(self, work: Path, environment: c.Environment, which: Build, pulls: list[str], say: Say) -> dict[str, object]:
        registry = self._settings.registry
        name = f"alveary/environment:{which.digest[:16]}-{which.name}"
        tag = f"{registry}/{name}" if registry else name
        result = work / "result.json"
        order = {
            "context": str(work / "context.tar"), "pull": pulls, "tag": tag, "push": bool(registry),
            "network": self._settings.build_network, "labels": {LABEL: which.digest, BUILD: which.name},
            "stage": {STAGE: which.digest}, "result": str(result),
            "auths": await self._credentials.auths(), "pull_missing_only": not (environment.image or environment.rebuild_key),
        }  # fmt: skip
        command = [sys.executable, "-m", "alveary_images.adapters.docker_build"]
        await run_tool(command, work, say, clean_environment(), stdin=json.dumps(order).encode() + b"\n")
        found: dict[str, object] = json.loads(result.read_text())
        return found

    async def remove(self, image: str) -> None:
        """Remove an image here and, where it can, in the registry. Running containers keep theirs."""
        await asyncio.to_thread(self._remove, image)

    def _remove(self, image: str) -> None:
        client = docker.from_env(timeout=60)
        try:
            with contextlib.suppress(docker.errors.ImageNotFound):
                client.images.remove(image, force=True)
        finally:
            client.close()
        repository, at, digest = image.partition("@")
        if at and self._settings.registry:
            host, _, name = repository.partition("/")
            host = self._settings.registry_api or host
            scheme = "https" if self._settings.registry_secure else "http"
            headers = {}
            if self._settings.registry_user:
                pair = f"{self._settings.registry_user}:{self._settings.registry_password.get_secret_value()}"
                headers = urllib3.make_headers(basic_auth=pair)
            reply = urllib3.request(
                "DELETE", f"{scheme}://{host}/v2/{name}/manifests/{digest}", headers=headers, timeout=30.0, retries=False
            )
            if reply.status not in (202, 404, 405):  # 405: this registry deletes nothing
                raise BuildFailed(f"the registry does not delete {image}: {reply.status}")


def bases(text: str) -> list[str]:
    """Images that a Dockerfile builds on, so that they can be pulled with credentials first."""
    stages = {m.lower() for m in re.findall(r"^\s*FROM\s+.*?\s+AS\s+(\S+)\s*$", text, re.IGNORECASE | re.MULTILINE)}
    found = re.findall(r"^\s*FROM\s+(?:--\S+\s+)*(\S+)", text, re.IGNORECASE | re.MULTILINE)
    return sorted({f for f in found if f.lower() not in stages and f != "scratch" and "$" not in f})


def context(work: Path, files: dict[str, bytes], folders: list[tuple[str, Path]]) -> None:
    """Write context.tar; times and owners are left out, so that equal contexts hit the daemon's cache."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = 0
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(work / "context.tar", "w") as archive:
        for name, data in sorted(files.items()):
            entry = plain(tarfile.TarInfo(name))
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
        for name, folder in folders:
            archive.add(folder, name, filter=plain)


def index_settings() -> str:
    """A shell script that sets uv's indexes as they are here."""
    env = uv_environment({})
    for name in _TRAVELS:
        env.setdefault(name, os.environ.get(name, ""))
    # A folder of this machine means nothing in the build; its files are in the context.
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX"):
        env[name] = " ".join(url for url in env.get(name, "").split() if not url.startswith("file://"))
    lines = [f"export {name}={shlex.quote(env[name])}" for name in _TRAVELS if env.get(name)]
    return "\n".join([*lines, "export SSL_CERT_FILE=/build/ca.pem", "export UV_FIND_LINKS=/build/wheels", ""])


def certificates() -> bytes:
    """The certificate authorities that this machine trusts."""
    path = uv_environment({}).get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_FILE") or certifi.where()
    return Path(path).read_bytes()
