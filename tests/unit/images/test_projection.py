"""Which images may go."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event, Key, name_of
from alveary_images.projection import ImagesProjection


def say(view: ImagesProjection, aggregate: str, ident: str, message: Message, at: float, workspace: str = "w") -> None:
    view.apply(Event("", Key(workspace, aggregate, ident), name_of(message)[1], message, 1, at))


async def test_the_oldest_and_what_is_beyond_the_limit_go_but_never_what_a_run_waits_for(tmp_path: Path) -> None:
    view = ImagesProjection(tmp_path / "i.sqlite")
    for digest, at in (("a", 100.0), ("b", 200.0), ("c", 300.0), ("d", 400.0)):
        say(view, "image", digest, ev.ImageRequested(run_id="r"), at)
        say(view, "image", digest, ev.ImageReady(size=10), at)
    assert await view.superfluous(0.0, 100) == []
    assert [d for _, d, _ in await view.superfluous(0.0, 25)] == ["b", "a"]
    assert [d for _, d, _ in await view.superfluous(250.0, 100)] == ["b", "a"]
    say(view, "run", "r1", ev.RunSubmitted(image_digest="a"), 500.0)  # used again, and waited for
    assert [d for _, d, _ in await view.superfluous(250.0, 25)] == ["b"]
    say(view, "run", "other", ev.RunSubmitted(image_digest="b"), 500.0, "v")  # another workspace has its own
    say(view, "run", "r1", ev.RunPrepared(), 501.0)  # it may be queued for long
    assert await view.waiting("w", "a") == [] and [d for _, d, _ in await view.superfluous(600.0, 100)] == ["d", "c", "b"]
    say(view, "run", "r1", ev.RunCompleted(), 502.0)
    assert [d for _, d, _ in await view.superfluous(450.0, 100)] == ["d", "c", "b"]
    say(view, "image", "tag", ev.ImageRequested(run_id="r", environment=c.Environment(image="python:3")), 600.0)
    say(view, "image", "tag", ev.ImageReady(size=1000), 600.0)
    assert [d for _, d, _ in await view.superfluous(0.0, 40)] == [] and "tag" in [d for _, d, _ in await view.superfluous(700.0, 40)]
    view.close()
