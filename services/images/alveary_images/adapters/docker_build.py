"""One step with the docker daemon, in a process of its own: `python -m alveary_images.adapters.docker_build`.

Reads one JSON order from stdin, prints lines, and writes the result as JSON to the order's `result` file. Ending the
process closes its connection, upon which the daemon gives the step up: that is how a build is cancelled. Credentials
come on stdin, so that no list of processes shows them.
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import docker
import docker.errors


class Failed(Exception):
    """The daemon's own words."""


def show(stream: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Print what the daemon says; returns the last of its machine-readable facts."""
    facts: dict[str, Any] = {}
    last: dict[str, str] = {}
    for message in stream:
        if "error" in message:
            raise Failed(str(message["error"]).strip())
        if "aux" in message:
            facts |= message["aux"]
        if text := message.get("stream"):
            for line in str(text).splitlines():
                if line.strip():
                    print(line, flush=True)
        elif (status := message.get("status")) and not message.get("progressDetail") and last.get(message.get("id", "")) != status:
            last[message.get("id", "")] = status
            print(f"{message['id']}: {status}" if "id" in message else status, flush=True)
    return facts


def pull(api: docker.APIClient, reference: str, auth: dict[str, str] | None) -> None:
    """Pull an image that is not there."""
    try:
        show(api.pull(reference, stream=True, decode=True, auth_config=auth))
    except (docker.errors.APIError, Failed) as error:
        try:
            api.inspect_image(reference)
        except docker.errors.ImageNotFound:
            raise Failed(f"the image {reference} can neither be pulled nor is it here: {error}") from error
        print(f"{reference} is here already, and cannot be pulled again", flush=True)


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Pull, build, push."""
    api = docker.APIClient(timeout=3600, **docker.utils.kwargs_from_env())
    auths: dict[str, dict[str, str]] = order["auths"]
    for reference in order["pull"]:
        registry = next((r for r in auths if reference.startswith(f"{r}/")), "")
        if not order.get("pull_missing_only") or not present(api, reference):
            pull(api, reference, auths.get(registry))
    tag = order["tag"]
    with Path(order["context"]).open("rb") as context:
        show(
            api.build(
                fileobj=context, custom_context=True, decode=True, tag=tag, rm=True, forcerm=True,
                network_mode=order["network"] or None, labels=order["labels"],
            )
        )  # fmt: skip
    # The stage that installed is as large as the image, and of no more use.
    prune(api, {"dangling": True, "label": [f"{name}={value}" for name, value in order["stage"].items()]})
    if order.get("extract"):
        extract(api, tag, order["extract"]["path"], Path(order["extract"]["to"]))
        api.remove_image(tag, force=True)
        return {}
    found = api.inspect_image(tag)
    image, size = found["Id"], int(found["Size"])
    if order["push"]:
        repository, _, version = tag.rpartition(":")
        registry = repository.partition("/")[0]
        facts = show(api.push(repository, tag=version, stream=True, decode=True, auth_config=auths.get(registry)))
        if "Digest" not in facts:
            raise Failed(f"the registry did not say under which digest it keeps {tag}")
        image = f"{repository}@{facts['Digest']}"
    config = found["Config"]
    return {"image": image, "size": size, "env": config.get("Env") or [], "user": config.get("User") or ""}


def prune(api: docker.APIClient, filters: dict[str, Any], pauses: Sequence[float] = (0.2, 1, 3)) -> None:
    """Remove what a build left behind. The daemon prunes once at a time and refuses a second call meanwhile."""
    for pause in (*pauses, None):
        try:
            api.prune_images(filters)
            return
        except docker.errors.APIError as error:
            if error.status_code != HTTPStatus.CONFLICT:
                raise
        if pause is not None:
            time.sleep(pause)
    # The image is built and good; what is left over has a label by which the next build's prune finds it.
    print("the daemon is busy pruning: the stage that installed is left to the next build", flush=True)


def extract(api: docker.APIClient, image: str, path: str, to: Path) -> None:
    """Copy the plain files of a folder of an image."""
    to.mkdir()
    container = api.create_container(image, ["true"])["Id"]
    try:
        chunks, _ = api.get_archive(container, path)
        with tempfile.SpooledTemporaryFile(64 << 20) as packed:
            for chunk in chunks:
                packed.write(chunk)
            packed.seek(0)
            with tarfile.open(fileobj=packed) as archive:
                for entry in archive:
                    opened = archive.extractfile(entry) if entry.isfile() else None
                    if opened is not None:
                        (to / Path(entry.name).name).write_bytes(opened.read())
    finally:
        api.remove_container(container, force=True)


def present(api: docker.APIClient, reference: str) -> bool:
    """Whether the daemon has an image."""
    try:
        api.inspect_image(reference)
    except docker.errors.ImageNotFound:
        return False
    return True


def main() -> int:
    """Exit code 1: refused, the reason being the last line printed."""
    order = json.loads(sys.stdin.readline())
    try:
        result = work(order)
    except (Failed, docker.errors.DockerException, OSError) as error:
        print(str(error), flush=True)
        return 1
    Path(order["result"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
