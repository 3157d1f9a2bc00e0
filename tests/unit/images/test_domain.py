"""The image's state machine: at most one builder at a time, nobody's word counts but the builder's."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_contracts.images.v1 import images_pb2 as pb
from alveary_images import domain

BUILDERS = st.sampled_from(["a", "b", "c"])
LEASE = 10.0


class ImageMachine(RuleBasedStateMachine):
    """Requests, builders that come and die, in any order, with a clock that only goes forward."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.now = domain.Image(), 0.0
        self.holder, self.until = "", 0.0

    def do(self, events: domain.Events) -> domain.Events:
        for event in events:
            self.image = domain.evolve(self.image, event)
        return events

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def request(self) -> None:
        before = self.image.state
        asked = self.do(domain.request(self.image, c.Environment(pip_packages=["six"]), "r"))
        assert bool(asked) == (before not in (pb.IMAGE_STATE_READY, pb.IMAGE_STATE_BUILDING, pb.IMAGE_STATE_REQUESTED))

    @rule(builder=BUILDERS)
    def claim(self, builder: str) -> None:
        building = self.image.state == pb.IMAGE_STATE_BUILDING
        claimed = self.do(domain.claim(self.image, builder, self.now, LEASE))
        if claimed:
            assert not building or builder == self.holder or self.until < self.now, "taken from a living builder"
            self.holder, self.until = builder, self.now + LEASE

    @rule(builder=BUILDERS, ok=st.booleans(), canceled=st.booleans())
    def finish(self, builder: str, ok: bool, canceled: bool) -> None:
        mine = domain.holds(self.image, builder)
        done = domain.ready(self.image, builder, ev.ImageReady()) if ok else domain.failed(self.image, builder, "no", canceled)
        assert bool(done) == mine == (self.image.state == pb.IMAGE_STATE_BUILDING and builder == self.holder)
        self.do(done)

    @rule()
    def evict(self) -> None:
        self.do(domain.evict(self.image, "room"))

    @invariant()
    def ready_means_there_is_something(self) -> None:
        assert (self.image.state == pb.IMAGE_STATE_READY) == (self.image.ready is not None)

    @invariant()
    def can_always_become_ready(self) -> None:
        """From every state, a request and a builder that lives lead to an image."""
        image = self.image
        for event in domain.request(image, c.Environment(), "r"):
            image = domain.evolve(image, event)
        for event in domain.claim(image, "z", self.now + 1000, LEASE):
            image = domain.evolve(image, event)
        for event in domain.ready(image, "z", ev.ImageReady()):
            image = domain.evolve(image, event)
        assert image.state == pb.IMAGE_STATE_READY


TestImage = ImageMachine.TestCase
TestImage.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
