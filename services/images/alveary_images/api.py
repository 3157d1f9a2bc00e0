"""The gRPC servicer: translate, call, translate back."""

from __future__ import annotations

import re
from typing import Any

from alveary_contracts.digests import image_digest
from alveary_contracts.ids import new_id
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_contracts.images.v1 import images_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.errors import InvalidArgument, NotFound
from alveary_images.adapters.credentials import Credentials
from alveary_images.handlers import Handlers
from alveary_images.projection import ImagesProjection

_REGISTRY = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?")


class ImageService(rpc.ImageServiceServicer):
    """alveary.images.v1.ImageService."""

    def __init__(self, handlers: Handlers, projection: ImagesProjection, credentials: Credentials) -> None:
        self._handlers, self._view, self._credentials = handlers, projection, credentials

    async def GetImage(self, request: pb.GetImageRequest, context: Any) -> pb.GetImageResponse:
        who = auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        image = await self._view.get(who.workspace, request.digest)
        if image is None:
            raise NotFound("image", request.digest)
        return pb.GetImageResponse(image=image)

    async def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=await self._view.all(auth.require("reader").workspace))

    async def BuildImage(self, request: pb.BuildImageRequest, context: Any) -> pb.BuildImageResponse:
        who = auth.require("writer")
        digest = image_digest(request.environment, new_id())
        image = await self._handlers.request(who.workspace, digest, request.environment, "")
        return pb.BuildImageResponse(image=pb.Image(digest=digest, state=image.state, environment=image.environment, reason=image.reason))

    async def SetRegistryCredentials(
        self, request: pb.SetRegistryCredentialsRequest, context: Any
    ) -> pb.SetRegistryCredentialsResponse:  # fmt: skip
        auth.require("owner")
        if not _REGISTRY.fullmatch(request.registry):
            raise InvalidArgument(("registry", f"{request.registry[:80]!r}: host or host:port, as references begin"))
        if request.password and not request.username:
            raise InvalidArgument(("username", "a password needs its user"))
        await self._credentials.set(request.registry, request.username, request.password)
        return pb.SetRegistryCredentialsResponse()

    async def ListRegistryCredentials(
        self, request: pb.ListRegistryCredentialsRequest, context: Any
    ) -> pb.ListRegistryCredentialsResponse:  # fmt: skip
        auth.require("owner")
        known = await self._credentials.all()
        found = [pb.RegistryCredentials(registry=name, username=one["username"]) for name, one in sorted(known.items())]
        return pb.ListRegistryCredentialsResponse(credentials=found)
