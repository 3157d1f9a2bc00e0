"""alveary image."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from alveary.cli.common import AsJson, ago, open_workspace, plain, show
from alveary.errors import AlvearyError

image_app = typer.Typer(no_args_is_help=True, help="Images of environments.")


def _state(image: Any) -> str:
    from alveary_contracts.images.v1 import images_pb2 as pb

    return pb.ImageState.Name(image.state).removeprefix("IMAGE_STATE_").capitalize()


@image_app.command("list")
def image_list(as_json: AsJson = False) -> None:
    """All images, newest use first."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    images = workspace._call(client.call(client.images.ListImages, pb.ListImagesRequest())).images
    rows = [
        {
            "digest": i.digest[:12], "state": _state(i), "environment": i.environment.name, "python": i.python_version,
            "packages": len(i.packages), "size": f"{i.size / 1e6:.0f} MB" if i.size else "", "used": ago(i.last_used_at),
        }
        for i in images
    ]  # fmt: skip
    show(rows, ("digest", "state", "environment", "python", "packages", "size", "used"), as_json, [plain(i) for i in images])


@image_app.command("show")
def image_show(digest: Annotated[str, typer.Argument(help="Or its first characters.")], as_json: AsJson = False) -> None:
    """One image: what is in it."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    image = workspace._call(client.call(client.images.GetImage, pb.GetImageRequest(digest=digest))).image
    if as_json:
        print(json.dumps(plain(image), indent=1))
        return
    lines = {
        "digest": image.digest, "state": _state(image), "reason": image.reason, "builder": image.builder, "image": image.image,
        "python": image.python_version, "size": f"{image.size / 1e6:.0f} MB" if image.size else "", "built in": f"{image.build_seconds:.1f} s",
    }  # fmt: skip
    for name, value in lines.items():
        if value:
            print(f"{name:<9} {value}")
    print("packages", *image.packages, sep="\n  ")


@image_app.command("login")
def image_login(
    registry: Annotated[str, typer.Argument(help="host or host:port, as references begin.")],
    username: Annotated[str, typer.Option()],
    password_stdin: Annotated[bool, typer.Option("--password-stdin", help="Read the password from standard input.")] = False,
) -> None:
    """Give the platform the credentials of a private registry, for base images and images of your own."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    password = sys.stdin.readline().rstrip("\n") if password_stdin else typer.prompt("password", hide_input=True)
    if not password:
        raise AlvearyError("an empty password: use `alveary image logout` to remove credentials", "INVALID_ARGUMENT")
    workspace = open_workspace()
    client = workspace._client
    request = pb.SetRegistryCredentialsRequest(registry=registry, username=username, password=password)
    workspace._call(client.call(client.images.SetRegistryCredentials, request))
    print(f"the platform can pull from {registry}")


@image_app.command("logout")
def image_logout(registry: str) -> None:
    """Forget the credentials of a registry."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    workspace._call(client.call(client.images.SetRegistryCredentials, pb.SetRegistryCredentialsRequest(registry=registry)))
    print("forgotten")


@image_app.command("logins")
def image_logins(as_json: AsJson = False) -> None:
    """Registries that the platform has credentials of."""
    from alveary_contracts.images.v1 import images_pb2 as pb

    workspace = open_workspace()
    client = workspace._client
    found = workspace._call(client.call(client.images.ListRegistryCredentials, pb.ListRegistryCredentialsRequest())).credentials
    show([{"registry": one.registry, "username": one.username} for one in found], ("registry", "username"), as_json)
