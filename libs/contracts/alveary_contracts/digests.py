"""Digests that several rooms must compute alike."""

from __future__ import annotations

import hashlib
import json

from google.protobuf.json_format import MessageToDict

from alveary_contracts.common.v1 import common_pb2 as c


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def manifest_json(manifest: c.Manifest) -> bytes:
    """The canonical JSON of a manifest: files sorted by path, keys sorted, no white space."""
    files = [
        {"executable": f.executable, "path": f.path, "sha256": f.sha256, "size": f.size}
        for f in sorted(manifest.files, key=lambda f: f.path)
    ]
    return _canonical({"files": files})


def manifest_from_json(data: bytes) -> c.Manifest:
    """The inverse of `manifest_json`.

    Raises:
        ValueError, KeyError: `data` is not such JSON.
    """
    return c.Manifest(files=[c.FileEntry(**f) for f in json.loads(data)["files"]])


def manifest_digest(manifest: c.Manifest) -> str:
    """Hex SHA-256 of `manifest_json`."""
    return hashlib.sha256(manifest_json(manifest)).hexdigest()


def environment_digest(environment: c.Environment) -> str:
    """Hex SHA-256 over all of the environment but its name and version: the order of packages does not matter."""
    copy = c.Environment()
    copy.CopyFrom(environment)
    copy.name, copy.version = "", 0
    for packages in (copy.pip_packages, copy.conda_packages, copy.apt_packages):
        packages[:] = sorted({" ".join(p.split()) for p in packages}, key=str.lower)
    return hashlib.sha256(_canonical(MessageToDict(copy))).hexdigest()


def image_digest(environment: c.Environment, occasion: str) -> str:
    """The digest under which an environment's image is built and found.

    It is `environment_digest`, except for a ready image by tag: what a tag means changes, so each `occasion` (a run's
    id) pins it again.
    """
    digest = environment_digest(environment)
    if environment.image and "@sha256:" not in environment.image:
        return hashlib.sha256(f"{digest} {occasion}".encode()).hexdigest()
    return digest


def lock_key(workspace: str, digest: str) -> str:
    """Object, in bucket images, of what a build left for the trainers."""
    return f"locks/{workspace}/{digest}.json"


def lock_digest(environment: c.Environment) -> str:
    """Digest of what an environment is resolved from: the same for all its rebuilds."""
    copy = c.Environment()
    copy.CopyFrom(environment)
    copy.rebuild_key, copy.locked = "", False
    return environment_digest(copy)
