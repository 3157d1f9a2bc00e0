"""An image's life: requested, building under a lease, ready or failed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.images.v1 import images_pb2 as pb

Events = Sequence[Message]


@dataclass(frozen=True)
class Image:
    """An image as its events left it."""

    state: pb.ImageState.ValueType = pb.IMAGE_STATE_UNSPECIFIED
    environment: c.Environment = field(default_factory=c.Environment)
    builder: str = ""
    lease_until: float = 0.0
    ready: ev.ImageReady | None = None
    reason: str = ""


def request(image: Image, environment: c.Environment, run_id: str) -> Events:
    """It is wanted; an event only if it neither exists nor is being built."""
    if image.state in (pb.IMAGE_STATE_READY, pb.IMAGE_STATE_BUILDING, pb.IMAGE_STATE_REQUESTED):
        return []
    return [ev.ImageRequested(environment=environment, run_id=run_id)]


def claim(image: Image, builder: str, now: float, lease: float) -> Events:
    """`builder` takes or renews the build for `lease` seconds. At most one holds it at a time."""
    if image.state == pb.IMAGE_STATE_REQUESTED:
        return [ev.ImageBuildStarted(builder=builder, lease_until=now + lease)]
    if image.state == pb.IMAGE_STATE_BUILDING and (image.builder == builder or image.lease_until < now):
        return [ev.ImageBuildStarted(builder=builder, lease_until=now + lease)]
    return []


def holds(image: Image, builder: str) -> bool:
    """Whether the build is `builder`'s."""
    return image.state == pb.IMAGE_STATE_BUILDING and image.builder == builder


def ready(image: Image, builder: str, event: ev.ImageReady) -> Events:
    """The build succeeded; one that lost its lease says nothing."""
    return [event] if holds(image, builder) else []


def failed(image: Image, builder: str, reason: str, canceled: bool = False) -> Events:
    """The build failed, or no run wants it any longer."""
    return [ev.ImageFailed(reason=reason, canceled=canceled)] if holds(image, builder) else []


def evict(image: Image, reason: str) -> Events:
    """It is removed to make space; the next run that wants it has it built again."""
    return [ev.ImageEvicted(reason=reason)] if image.state == pb.IMAGE_STATE_READY else []


def evolve(image: Image, event: Message) -> Image:
    """Fold one event."""
    match event:
        case ev.ImageRequested():
            return replace(image, state=pb.IMAGE_STATE_REQUESTED, environment=event.environment, reason="")
        case ev.ImageBuildStarted():
            return replace(image, state=pb.IMAGE_STATE_BUILDING, builder=event.builder, lease_until=event.lease_until)
        case ev.ImageReady():
            return replace(image, state=pb.IMAGE_STATE_READY, ready=event, reason="")
        case ev.ImageFailed():
            return replace(image, state=pb.IMAGE_STATE_FAILED, reason=event.reason, ready=None)
        case ev.ImageEvicted():
            return replace(image, state=pb.IMAGE_STATE_EVICTED, ready=None)
    return image
