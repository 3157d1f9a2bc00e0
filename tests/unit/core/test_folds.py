"""Folds are total: every event that the contracts know, with any values and in any order, through everything that folds events."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st
from strategies import few, messages

import alveary_images.domain
import alveary_registry.domain
import alveary_runs.domain
from alveary_contracts import rules
from alveary_contracts.events.v1 import events_pb2
from alveary_contracts.names import AGGREGATES, event_name
from alveary_core.events import Event, Key, MalformedEvent, UnknownEvent, body, decode, envelope
from alveary_core.projection import Projection, Raw
from alveary_scheduler.plan import plan
from alveary_scheduler.state import State as SchedulerState
from alveary_scheduler.state import evolve as evolve_scheduler

EVENTS = [d for d in events_pb2.DESCRIPTOR.message_types_by_name.values() if event_name(d.name)]
IDS = ("a", "b", "a-1", "b-2", "n1", "n2", "t")
TEXTS = (
    *IDS,
    "",
    "local",
    "best-fit",
    "fgd",
    "lowpriority",
    "exited",
    "preempted",
    "out_of_memory",
    "staging_failed",
    "x" * 1000,
    "\0",
    "*",
    "é",
)
# What a random number would make too long to wait for: as many nodes as that are looked at one after another.
FIXED = {
    "ComputeSpec.kind": (0, 1, 2, 3), "ComputeSpec.max_nodes": (0, 1, 4, -1), "ComputeSpec.min_nodes": (0, 1, -1),
    "RunSpec.compute_target": ("t", ""), "RunSpec.node_count": (0, 1, 2, -1, 1024, 2**31 - 1), "PlacementMade.target": ("t", ""),
    "NodeJoined.target": ("t", ""), "AllocatedNode.node": ("n1", "n2", ""), "AllocatedNode.incarnation": ("", "i"), "NodeJoined.incarnation": ("", "i"),
}  # fmt: skip


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Events of a few aggregates, in no order that makes sense."""
    kinds = draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=12))
    found = []
    for sequence, kind in enumerate(kinds, 1):
        named = event_name(kind.name)
        assert named is not None
        key = Key("w", named[0], draw(st.sampled_from({"node": ("n1", "n2"), "target": ("t",)}.get(named[0], IDS))))
        message = draw(messages(kind, TEXTS, FIXED, depth=4))
        found.append(Event("", key, named[1], message, sequence, draw(st.sampled_from([0.0, 1.7e9, 1.8e9]))))
    return found


def test_every_aggregate_has_events() -> None:
    assert {named[0] for d in EVENTS if (named := event_name(d.name))} == set(AGGREGATES)


@few(150)
@given(histories())
def test_states_of_aggregates_survive_any_history(history: list[Event]) -> None:
    run: Any = alveary_runs.domain.Run()
    image: Any = alveary_images.domain.Image()
    model: Any = alveary_registry.domain.Model()
    dataset: Any = alveary_registry.domain.Dataset()
    for event in history:
        run = alveary_runs.domain.evolve(run, event.message)
        image = alveary_images.domain.evolve(image, event.message)
        model = alveary_registry.domain.evolve(model, event.message)
        dataset = alveary_registry.domain.evolve_dataset(dataset, event.message)


@few(150)
@given(histories())
def test_the_schedulers_state_survives_any_history_and_can_be_planned_with(history: list[Event]) -> None:
    state = SchedulerState()
    for event in history:
        evolve_scheduler(state, event)
        plan(state, {}, {}, event.time)


def projections() -> list[type[Projection]]:
    """All there are in the services."""
    for package in ("runs", "images", "scheduler", "logs", "registry"):
        found = importlib.import_module(f"alveary_{package}")
        for module in pkgutil.iter_modules(found.__path__):
            if module.name in ("projection", "service", "metrics"):
                importlib.import_module(f"alveary_{package}.{module.name}")

    def below(kind: type[Projection]) -> Iterator[type[Projection]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return [k for k in below(Projection) if k.__module__.startswith("alveary_") and k.stream == Projection.stream]


_numbers = itertools.count()


def opened(kind: type[Projection], folder: Path) -> Projection:
    """A model in a file of its own, with those that it wants to have beside it."""
    hints = get_type_hints(kind.__init__)
    others = [opened(k, folder) for k in hints.values() if isinstance(k, type) and issubclass(k, Projection)]
    return kind(str(folder / f"{next(_numbers)}.sqlite"), *others)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", projections(), ids=lambda k: k.__name__)
def test_read_models_survive_any_history(kind: type[Projection], tmp_path: Path) -> None:
    @few(40)
    @given(histories())
    def check(history: list[Event]) -> None:
        view = opened(kind, tmp_path)
        try:
            for event in history:
                if kind.inline and rules.problems(event.message, texts=False):
                    continue  # it is set aside with a sentence
                view.db.execute("BEGIN")
                view.apply(event)
                view.flush()
                view.db.execute("COMMIT")
        finally:
            view.close()

    check()


@few(60)
@given(st.sampled_from(EVENTS).flatmap(lambda d: messages(d, TEXTS, FIXED, depth=4)))
def test_what_can_be_appended_can_be_read(message: Message) -> None:
    if rules.problems(message, texts=False):
        return
    named = event_name(message.DESCRIPTOR.name)
    assert named is not None
    key = Key("w", named[0], "a")
    event = decode(key.subject(named[1]), envelope(key, message, "id", "test", ""), body(message), 7)
    assert event.message == message and event.sequence == 7 and abs(event.time - time.time()) < 3600


@few(60)
@given(st.sampled_from(EVENTS), st.binary(max_size=200), st.text(max_size=20))
def test_bytes_that_are_no_event_are_set_aside_by_a_read_model(kind: Any, data: bytes, at: str) -> None:
    named = event_name(kind.name)
    assert named is not None
    raw = Raw(Key("w", named[0], "a").subject(named[1]), {"ce-id": "x", "ce-time": at}, data, 1)
    try:
        decode(raw.subject, raw.headers, raw.data, raw.sequence)
    except (MalformedEvent, UnknownEvent):
        return
    assert GetMessageClass(kind) is not None
