"""The gRPC servicer: translate, call, translate back."""

from __future__ import annotations

from typing import Any

from alveary_contracts.digests import environment_digest
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_contracts.images.v1 import images_pb2_grpc as rpc
from alveary_core import auth
from alveary_core.errors import NotFound
from alveary_images.handlers import Handlers
from alveary_images.projection import ImagesProjection


class ImageService(rpc.ImageServiceServicer):
    """alveary.images.v1.ImageService."""

    def __init__(self, handlers: Handlers, projection: ImagesProjection) -> None:
        self._handlers, self._view = handlers, projection

    async def GetImage(self, request: pb.GetImageRequest, context: Any) -> pb.GetImageResponse:
        who = auth.require("reader")
        await self._view.wait_for(request.min_sequence)
        image = self._view.get(who.workspace, request.digest)
        if image is None:
            raise NotFound("image", request.digest)
        return pb.GetImageResponse(image=image)

    async def ListImages(self, request: pb.ListImagesRequest, context: Any) -> pb.ListImagesResponse:
        return pb.ListImagesResponse(images=self._view.all(auth.require("reader").workspace))

    async def BuildImage(self, request: pb.BuildImageRequest, context: Any) -> pb.BuildImageResponse:
        who = auth.require("writer")
        digest = environment_digest(request.environment)
        image = await self._handlers.request(who.workspace, digest, request.environment, "")
        return pb.BuildImageResponse(image=pb.Image(digest=digest, state=image.state, environment=image.environment, reason=image.reason))
