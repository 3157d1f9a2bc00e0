"""alveary image."""

from __future__ import annotations

import sys
from typing import Any

import click

from alveary.cli.columns import moment, size
from alveary.cli.common import json_option, open_workspace, plain, print_json
from alveary.cli.table import show
from alveary.errors import AlvearyError
from alveary.text import printable


@click.group(no_args_is_help=True)
def image() -> None:
    """Images of environments."""


def _state(image: Any) -> str:
    from alveary_contracts.images.v1 import images_pb2 as pb

    return pb.ImageState.Name(image.state).removeprefix("IMAGE_STATE_").capitalize()


@image.command("list")
@json_option
def list_images(as_json: bool) -> None:
    """All images, newest use first."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    images = workspace._call(client.call(client.stubs.images.ListImages, pb.ListImagesRequest())).images
    rows = [
        {
            "digest": i.digest[:12],
            "state": _state(i),
            "environment": i.environment.name,
            "python": i.python_version,
            "packages": len(i.packages),
            "size": size(i.size) if i.size else "",
            "used": moment(i.last_used_at),
        }
        for i in images
    ]
    columns = ("digest", "state", "environment", "python", "packages", "size", "used")
    show(rows, columns, as_json, [plain(i) for i in images] if as_json else None, elastic=("environment",))


@image.command("show")
@click.argument("digest")
@json_option
def show_image(digest: str, as_json: bool) -> None:
    """One image, by its digest or the first characters of it: what is in it."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    found = workspace._call(client.call(client.stubs.images.GetImage, pb.GetImageRequest(digest=digest))).image
    if as_json:
        print_json(plain(found))
        return
    lines = {
        "digest": found.digest,
        "state": _state(found),
        "reason": found.reason,
        "builder": found.builder,
        "image": found.image,
        "python": found.python_version,
        "size": f"{found.size / 1e6:.0f} MB" if found.size else "",
        "built in": f"{found.build_seconds:.1f} s",
    }
    for name, value in lines.items():
        if value:
            click.echo(f"{name:<9} {printable(value)}")
    click.echo("\n  ".join(["packages", *map(printable, found.packages)]))


@image.command()
@click.argument("registry")
@click.option("--username", required=True)
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
def login(registry: str, username: str, password_stdin: bool) -> None:
    """Give the platform the credentials of a private registry, for base images and images of your own.

    REGISTRY is host or host:port, as references begin.
    """
    from alveary_contracts.images.v1 import images_pb2 as pb

    password = sys.stdin.readline().rstrip("\n") if password_stdin else click.prompt("password", hide_input=True)
    if not password:
        raise AlvearyError("an empty password: use `alveary image logout` to remove credentials", "INVALID_ARGUMENT")
    workspace = open_workspace()
    client = workspace._client
    request = pb.SetRegistryCredentialsRequest(registry=registry, username=username, password=password)
    workspace._call(client.call(client.stubs.images.SetRegistryCredentials, request))
    click.echo(f"the platform can pull from {registry}")


@image.command()
@click.argument("registry")
def logout(registry: str) -> None:
    """Forget the credentials of a registry."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    workspace._call(client.call(client.stubs.images.SetRegistryCredentials, pb.SetRegistryCredentialsRequest(registry=registry)))
    click.echo("forgotten")


@image.command()
@json_option
def logins(as_json: bool) -> None:
    """Registries that the platform has credentials of."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    found = workspace._call(client.call(client.stubs.images.ListRegistryCredentials, pb.ListRegistryCredentialsRequest())).credentials
    show([{"registry": one.registry, "username": one.username} for one in found], ("registry", "username"), as_json)
