"""A scheduler that restarts, from its rows or from a replay of all events, decides as one that never did."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event, Key, name_of
from alveary_scheduler.core.requests import Placement, Preemption
from alveary_scheduler.plan import Decision, Reserve, Wait, plan
from alveary_scheduler.projection import SchedulerProjection
from alveary_scheduler.resources import resources_of
from alveary_scheduler.state import State, evolve

NODE = c.Resources(cpus=4, memory_bytes=8 << 30, gpus=2)
T = ("w", "t")
QUOTAS = [
    ev.Quota(user="", weight=2, guaranteed=c.Resources(cpus=4, memory_bytes=8 << 30)),
    ev.Quota(user="b", maximum=c.Resources(cpus=6)),
]


class World:
    """A scheduler with its projection, and every event that it has seen."""

    def __init__(self, path: Path, policy: str, quotas: bool) -> None:
        self.path = str(path)
        self.view = SchedulerProjection(self.path)
        self.events: list[Event] = []
        self.sequence, self.names, self.now = count(1), count(1), 1000.0
        spec = ev.ComputeSpec(kind=c.TARGET_KIND_NODES, max_nodes=9, placement_policy=policy, quotas=QUOTAS if quotas else [])
        self.say("target", "t", ev.TargetCreated(spec=spec))

    @property
    def state(self) -> State:
        return self.view.state

    def say(self, aggregate: str, ident: str, message: Message) -> None:
        event = Event("", Key("w", aggregate, ident), name_of(message)[1], message, next(self.sequence), self.now)
        self.events.append(event)
        self.view.db.execute("BEGIN")
        self.view.apply(event)
        self.view.flush()
        self.view.db.execute("COMMIT")
        self.check()

    def check(self) -> None:
        restarted = SchedulerProjection(self.path)
        replayed = State()
        for event in self.events:
            evolve(replayed, event)
        try:
            for later in (0.0, 650.0, 30_000.0):
                expected = decide(self.state, self.now + later)
                assert decide(restarted.state, self.now + later) == expected, "a restart decides otherwise"
                assert decide(replayed, self.now + later) == expected, "a replay decides otherwise"
        finally:
            restarted.close()

    def step(self, action: str, number: int) -> None:
        self.now += (1.0, 40.0, 4000.0)[number % 3]
        getattr(self, action)(number)

    def join(self, number: int) -> None:
        name = f"n{number % 5}"
        model = ("A", "B")[number % 2]
        if len(self.state.nodes) < 4 or name in self.state.nodes:
            joined = ev.NodeJoined(target="t", incarnation=str(next(self.names)), resources=NODE, gpu_models=[model, model])
            old = self.state.nodes.get(name)
            self.say("node", name, joined)
            if old is not None:
                self.revoke(name)

    def lose(self, number: int) -> None:
        if nodes := sorted(self.state.nodes):
            node = self.state.nodes[nodes[number % len(nodes)]]
            self.say("node", node.id, ev.NodeLost(incarnation=node.incarnation))
            self.revoke(node.id)

    def revoke(self, node: str) -> None:
        for placed in [p for p in self.state.placed.values() if p.on(node)]:
            self.say("placement", placed.run, ev.PlacementRevoked(attempt=placed.attempt))
            self.retry(placed.run, placed.attempt, self.spec(0))

    def drain(self, number: int) -> None:
        if nodes := sorted(self.state.nodes):
            self.say("node", nodes[number % len(nodes)], ev.NodeDraining())

    def spec(self, number: int) -> c.RunSpec:
        resources = c.Resources(cpus=(0.5, 1, 4)[number % 3], gpus=number % 4 // 2, memory_bytes=1 << 30)
        if number % 7 == 1:
            resources = c.Resources(cpus=1, gpus=1, gpu_milli=500, gpu_models=["A"])
        nodes = 2 if number % 5 == 0 else 1
        return c.RunSpec(
            compute_target="t", resources=resources, priority=number % 3 - 1, node_count=nodes,
            max_run_duration_seconds=5000.0 * (number % 2),
        )  # fmt: skip

    def submit(self, number: int) -> None:
        self.say("run", f"r{next(self.names):03}", ev.RunPrepared(spec=self.spec(number), submitted_by="ab"[number % 2]))

    def act(self, number: int) -> None:
        for decision in decide(self.state, self.now)[: 1 + number % 6]:
            self.carry_out(decision)

    def carry_out(self, decision: Decision) -> None:
        if isinstance(decision, Placement):
            waiting = self.state.queue[decision.run]
            parts = [
                ev.AllocatedNode(node=p.node, incarnation=self.state.nodes[p.node].incarnation, gpu_indexes=p.gpus)
                for p in decision.allocation
            ]
            spec = c.RunSpec(resources=resources_of(waiting.request.shape), node_count=waiting.request.count)
            self.say("placement", decision.run, ev.PlacementMade(attempt=waiting.attempt, target="t", nodes=parts, spec=spec))
        elif isinstance(decision, Preemption):
            self.say("placement", decision.run, ev.PlacementPreempting(attempt=decision.attempt, beneficiary=decision.beneficiary))
        elif isinstance(decision, Reserve):
            self.say("placement", decision.run, ev.PlacementReserved(nodes=decision.nodes))
        elif isinstance(decision, Wait):
            self.say("placement", decision.run, ev.PlacementWaiting(wait_reason=decision.reason))

    def finish(self, number: int) -> None:
        if placed := sorted(self.state.placed):
            self.say("run", placed[number % len(placed)], ev.RunCompleted(attempt=1))

    def fail(self, number: int) -> None:
        for run in sorted(self.state.placed)[: 1 + number % 3]:
            self.say("run", run, ev.RunFailed(attempt=1, exit=c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED)))

    def checkpoint(self, number: int) -> None:
        if placed := sorted(self.state.placed):
            held = self.state.placed[placed[number % len(placed)]]
            self.say("placement", held.run, ev.PlacementCheckpointed(attempt=held.attempt, stored_at=self.now - 5))

    def give_way(self, number: int) -> None:
        for run in sorted(self.state.pools[T].running.preempting):
            self.retry(run, self.state.placed[run].attempt, self.spec(number))

    def retry(self, run: str, attempt: int, spec: c.RunSpec) -> None:
        self.say("run", run, ev.RunRetrying(attempt=attempt + 1, spec=spec, submitted_by="a", delay_seconds=30.0 * (attempt % 2)))

    def cancel(self, number: int) -> None:
        if queue := sorted(self.state.queue):
            run = queue[number % len(queue)]
            self.say("run", run, ev.RunCancelRequested())
            self.say("placement", run, ev.PlacementReleased())
            self.say("run", run, ev.RunCanceled())

    def recreate(self, number: int) -> None:
        if number % 4 == 0 and not self.state.placed:
            spec = self.state.targets[T].spec
            self.say("target", "t", ev.TargetDeleted())
            self.say("target", "t", ev.TargetCreated(spec=spec))


ACTIONS = ("join", "join", "submit", "submit", "submit", "act", "act", "act", "finish", "finish", "fail", "lose", "drain", "checkpoint",
           "give_way", "cancel", "recreate")  # fmt: skip


def decide(state: State, now: float) -> list[Decision]:
    return plan(state, {}, {}, now)


@pytest.mark.parametrize("policy", ["best-fit", "fgd", "random"])
def test_a_restart_after_any_event_changes_no_decision(policy: str, tmp_path: Path) -> None:
    numbers = count(1)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 60)), min_size=5, max_size=30), st.booleans())
    def check(steps: list[tuple[str, int]], quotas: bool) -> None:
        world = World(tmp_path / f"{next(numbers)}.sqlite", policy, quotas)
        try:
            for name in range(2):
                world.join(name)
            for action, number in steps:
                world.step(action, number)
        finally:
            world.view.close()

    check()


def test_fair_shares_and_quarantine_survive_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path / "s.sqlite", "best-fit", quotas=False)
    world.join(0)
    for user in ("heavy", "light"):
        world.say("run", user, ev.RunPrepared(spec=c.RunSpec(compute_target="t", resources=c.Resources(cpus=4)), submitted_by=user))
        world.act(0)
        world.now += 50_000.0 if user == "heavy" else 10.0
        world.say("run", user, ev.RunCompleted(attempt=1))
    for user in ("heavy", "light"):
        world.say("run", f"{user}-2", ev.RunPrepared(spec=c.RunSpec(compute_target="t", resources=c.Resources(cpus=4)), submitted_by=user))
    again = SchedulerProjection(world.path)
    assert [d.run for d in decide(again.state, world.now) if isinstance(d, Placement)] == ["light-2"]
    again.close()
    for number in range(3):
        run = f"broken-{number}"
        world.say("run", run, ev.RunPrepared(spec=c.RunSpec(compute_target="t", resources=c.Resources(cpus=4), priority=5)))
        world.act(0)
        world.say("run", run, ev.RunFailed(attempt=1, exit=c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED)))
    again = SchedulerProjection(world.path)
    assert not [d for d in decide(again.state, world.now + 599) if isinstance(d, Placement)]
    assert [d for d in decide(again.state, world.now + 601) if isinstance(d, Placement)]
    again.close()
    world.view.close()
