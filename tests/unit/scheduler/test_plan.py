"""The decision core, driven as a state machine: never overcommitted, nobody overtaken, everybody placed in the end."""

from __future__ import annotations

from itertools import count

from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.events import Event, Key, name_of
from alveary_scheduler.core.requests import Placement, Preemption
from alveary_scheduler.plan import Decision, ProvisionGroup, ReleaseGroup, Reserve, Scale, Wait, explain, plan
from alveary_scheduler.resources import resources_of
from alveary_scheduler.state import State, evolve
from alveary_scheduler.wait_reason import render

NODE = c.Resources(cpus=4, memory_bytes=8 << 30, gpus=2)
T = ("w", "t")


class World:
    """A scheduler's state with a clock of sequence numbers."""

    def __init__(self, min_nodes: int = 0, max_nodes: int = 3) -> None:
        self.state, self.sequence, self.names, self.now = State(), count(1), count(1), 0.0
        spec = ev.ComputeSpec(kind=c.TARGET_KIND_LOCAL, min_nodes=min_nodes, max_nodes=max_nodes, node_resources=NODE)
        self.say("target", "t", ev.TargetCreated(spec=spec))

    def say(self, aggregate: str, ident: str, message: Message) -> None:
        event = Event("", Key("w", aggregate, ident), name_of(message)[1], message, next(self.sequence), self.now)
        evolve(self.state, event)

    def submit(self, cpus: float, gpus: int = 0, priority: int = 0, nodes: int = 1, least: int = 0) -> str:
        run = f"r{next(self.names):04}"
        resources = c.Resources(cpus=cpus, gpus=gpus, memory_bytes=1 << 30)
        spec = c.RunSpec(compute_target="t", resources=resources, priority=priority, node_count=nodes, min_node_count=least)
        self.say("run", run, ev.RunPrepared(spec=spec))
        return run

    def join(self) -> None:
        # A name that is free: a node that joins again under its own name is empty, and its old runs hold nothing there.
        name = next(free for number in count() if (free := f"t-{number}") not in self.state.nodes)
        self.say("node", name, ev.NodeJoined(target="t", incarnation=str(next(self.names)), resources=NODE))

    def act(self, starting: int = 0, idle: int = 0) -> list[Decision]:
        decisions = plan(self.state, {T: starting}, {T: idle}, self.now)
        again = plan(self.state, {T: starting}, {T: idle}, self.now)
        assert decisions == again, "not deterministic, or it changed the state"
        for decision in decisions:
            if isinstance(decision, Placement):
                waiting = self.state.queue[decision.run]
                shares = [
                    ev.AllocatedNode(node=s.node, incarnation=self.state.nodes[s.node].incarnation, gpu_indexes=s.gpus)
                    for s in decision.allocation
                ]
                spec = c.RunSpec(resources=resources_of(waiting.request.shape), node_count=waiting.request.count)
                self.say("placement", decision.run, ev.PlacementMade(attempt=waiting.attempt, target="t", nodes=shares, spec=spec))
            elif isinstance(decision, Preemption):
                self.say("placement", decision.run, ev.PlacementPreempting(attempt=decision.attempt, beneficiary=decision.beneficiary))
            elif isinstance(decision, Reserve):
                self.say("placement", decision.run, ev.PlacementReserved(nodes=decision.nodes))
            elif isinstance(decision, Wait):
                provisioning = decision.reason.code == c.WAIT_CODE_PROVISIONING
                kind = ev.PlacementProvisioning if provisioning else ev.PlacementWaiting
                self.say("placement", decision.run, kind(wait_reason=decision.reason))
        return decisions


def _code(world: World, run: str) -> int:
    reason = world.state.queue[run].reason
    assert reason is not None
    return reason.code


class SchedulerMachine(RuleBasedStateMachine):
    """Runs, nodes and losses in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        cpus=st.sampled_from([0.5, 1.0, 4.0]),
        gpus=st.integers(0, 2),
        priority=st.integers(-1, 1),
        nodes=st.integers(1, 3),
        less=st.integers(0, 2),
    )
    def submit(self, cpus: float, gpus: int, priority: int, nodes: int, less: int) -> None:
        self.world.submit(cpus, gpus, priority, nodes, max(nodes - less, 1))

    @rule()
    def join(self) -> None:
        if len(self.world.state.nodes) < 3:
            self.world.join()

    @rule(index=st.integers(0, 20))
    def finish(self, index: int) -> None:
        placed = sorted(self.world.state.placed)
        if placed:
            self.world.say("run", placed[index % len(placed)], ev.RunCompleted(attempt=1))

    @rule(index=st.integers(0, 20))
    def make_room(self, index: int) -> None:
        """A preempted attempt ends; its run comes back."""
        state = self.world.state
        leaving = sorted(run for run, held in state.pools[T].running.items() if held.preempting)
        if leaving:
            held = state.placed[leaving[index % len(leaving)]]
            spec = c.RunSpec(
                compute_target="t", resources=resources_of(held.request.shape), priority=held.request.tier,
                node_count=held.request.count, min_node_count=held.request.min_count,
            )  # fmt: skip
            self.world.say("run", held.run, ev.RunRetrying(attempt=held.attempt + 1, spec=spec, preempted=True))

    @rule(seconds=st.sampled_from([1.0, 10_000.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(index=st.integers(0, 20))
    def cancel(self, index: int) -> None:
        queue = sorted(self.world.state.queue)
        if queue:
            self.world.say("run", queue[index % len(queue)], ev.RunCancelRequested())

    @rule(index=st.integers(0, 20))
    def lose(self, index: int) -> None:
        nodes = sorted(self.world.state.nodes)
        if not nodes:
            return
        node = self.world.state.nodes[nodes[index % len(nodes)]]
        self.world.say("node", node.id, ev.NodeLost(incarnation=node.incarnation))
        for placed in [p for p in self.world.state.placed.values() if p.on(node.id)]:
            self.world.say("placement", placed.run, ev.PlacementRevoked(attempt=placed.attempt))

    @rule(starting=st.integers(0, 2), idle=st.integers(0, 3))
    def plan(self, starting: int, idle: int) -> None:
        starting = min(starting, 3 - len(self.world.state.nodes))
        decisions = self.world.act(starting, idle)
        for decision in decisions:
            if isinstance(decision, Scale):
                assert 0 <= decision.nodes <= 3, "beyond min and max"
        again = self.world.act(starting, 0)
        assert not [d for d in again if isinstance(d, (Placement, Wait))], "the same is said twice"
        for waiting in self.world.state.queue.values():
            assert waiting.reason, "a run waits and nobody says why"

    @invariant()
    def never_overcommitted(self) -> None:
        state = self.world.state
        for node in state.nodes.values():
            held = [p for p in state.placed.values() for _ in range(p.on(node.id))]
            assert sum(p.request.shape.cpu_milli for p in held) <= node.total.cpus * 1000
            assert sum(p.request.shape.memory for p in held) <= node.total.memory_bytes
            indexes = [i for p in state.placed.values() for (n, _), g in zip(p.nodes, p.gpus, strict=True) if n == node.id for i in g]
            assert len(indexes) == len(set(indexes)) and all(0 <= i < node.total.gpus for i in indexes)

    @invariant()
    def all_of_a_gang_or_nothing(self) -> None:
        for placed in self.world.state.placed.values():
            request, names = placed.request, [n for n, _ in placed.nodes]
            assert request.needed <= len(names) <= request.count and len(set(names)) == len(names)

    @invariant()
    def nobody_is_in_two_places(self) -> None:
        assert not self.world.state.queue.keys() & self.world.state.placed.keys()


def test_planning_twice_with_an_aged_gang_and_a_victim_gives_the_same_decisions() -> None:
    world = World()
    world.join()
    world.join()
    aged = world.submit(0.5, nodes=2, priority=-1)
    world.now += 30_000.0
    world.submit(0.5)
    world.submit(4.0)
    first = plan(world.state, {T: 0}, {T: 0}, world.now)
    assert next(d.run for d in first if isinstance(d, Placement)) == aged
    for _ in range(3):
        assert plan(world.state, {T: 0}, {T: 0}, world.now) == first


def test_planning_for_a_later_moment_does_not_change_what_is_planned_for_an_earlier_one() -> None:
    world = World(max_nodes=1)
    world.join()
    low = world.submit(4.0, priority=-1)
    world.now = 1000.0
    world.submit(4.0)
    before = plan(world.state, {}, {}, world.now)
    later = plan(world.state, {}, {}, world.now + 21_000.0)
    assert [d.run for d in later if isinstance(d, Placement)] == [low] != [d.run for d in before if isinstance(d, Placement)]
    assert plan(world.state, {}, {}, world.now) == before


def test_a_run_is_not_placed_and_preempted_by_the_same_plan() -> None:
    world = World(max_nodes=2)
    world.join()
    world.join()
    world.submit(2.0, priority=-1)
    world.submit(2.0, priority=-1)
    world.act()
    world.submit(4.0, gpus=0, nodes=2)
    world.submit(1.0, priority=-1)
    decisions = world.act()
    placed = {d.run for d in decisions if isinstance(d, Placement)}
    assert not placed & {d.run for d in decisions if isinstance(d, Preemption)}


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_priority_then_time_and_nobody_overtakes() -> None:
    world = World(max_nodes=1)
    world.join()
    first = world.submit(4.0)
    world.act()
    late_small, early_big, urgent = world.submit(4.0), world.submit(0.5), world.submit(4.0, priority=5)
    assert not [d for d in world.act() if isinstance(d, Placement)]
    world.say("run", first, ev.RunCompleted(attempt=1))
    placed = [d.run for d in world.act() if isinstance(d, Placement)]
    assert placed == [urgent]
    assert {late_small, early_big} <= world.state.queue.keys()


def test_an_empty_target_scales_up_and_says_so() -> None:
    world = World()
    run = world.submit(1.0)
    decisions = world.act()
    assert Scale("w", "t", 1, "1 runs wait") in decisions
    assert world.state.queue[run].provisioning


def test_idle_nodes_go_but_not_below_the_minimum() -> None:
    world = World(min_nodes=1)
    world.join()
    world.join()
    assert Scale("w", "t", 1, "idle nodes") in world.act(idle=2)


def test_a_queue_of_any_feasible_runs_is_worked_off_in_bounded_rounds() -> None:
    world = World()
    for _ in range(3):
        world.join()
    for number in range(60):
        world.submit(0.5 + number % 4, number % 3, number % 2)
    for _ in range(61):
        world.act()
        for run in sorted(world.state.placed)[:1]:
            world.say("run", run, ev.RunCompleted(attempt=1))
    assert not world.state.queue


def test_runs_of_a_deleted_target_say_what_to_do() -> None:
    world = World()
    run = world.submit(1.0)
    world.say("target", "t", ev.TargetDeleted())
    world.act()
    assert _code(world, run) == c.WAIT_CODE_TARGET_DELETED


def test_a_node_that_comes_back_to_life_is_empty_and_its_old_runs_hold_nothing() -> None:
    world = World(max_nodes=1)
    world.join()
    run = world.submit(4.0)
    world.act()
    ((node, _),) = world.state.placed[run].nodes
    world.say("node", node, ev.NodeJoined(target="t", incarnation="another", resources=NODE))
    assert world.state.pools[T].running == {} and run in world.state.placed
    world.say("placement", run, ev.PlacementRevoked(attempt=1))
    other = world.submit(4.0)
    assert [d.run for d in world.act() if isinstance(d, Placement)] == [other]


def test_a_run_below_zero_makes_room_and_keeps_its_place_in_the_queue() -> None:
    world = World(max_nodes=1)
    world.join()
    low = world.submit(4.0, priority=-1)
    world.act()
    high = world.submit(4.0)
    assert [(d.run, d.beneficiary) for d in world.act() if isinstance(d, Preemption)] == [(low, high)]
    spec = c.RunSpec(compute_target="t", resources=c.Resources(cpus=4.0), priority=-1)
    world.say("run", low, ev.RunRetrying(attempt=2, spec=spec, preempted=True))
    later = world.submit(4.0, priority=-1)
    assert [d.run for d in world.act() if isinstance(d, Placement)] == [high]
    world.say("run", high, ev.RunCompleted(attempt=1))
    assert [d.run for d in world.act() if isinstance(d, Placement)] == [low] and later in world.state.queue


def test_nodes_on_which_runs_fail_for_their_sake_take_nothing_for_a_while() -> None:
    world = World(max_nodes=1)
    world.join()
    for _ in range(3):
        run = world.submit(4.0)
        world.act()
        world.say("run", run, ev.RunFailed(attempt=1, exit=c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED)))
    run = world.submit(4.0)
    assert not [d for d in world.act() if isinstance(d, Placement)]
    world.now = 601.0
    assert [d.run for d in world.act() if isinstance(d, Placement)] == [run]


def test_quotas_shares_of_gpus_and_labels_come_from_specifications() -> None:
    world = World()
    spec = ev.ComputeSpec(
        kind=c.TARGET_KIND_NODES, max_nodes=9, node_resources=NODE, gpu_sharing=True,
        quotas=[ev.Quota(user="me", maximum=c.Resources(cpus=1.5)), ev.Quota(user="you", weight=2, guaranteed=c.Resources(gpus=1))],
    )  # fmt: skip
    world.say("target", "shared", ev.TargetCreated(spec=spec))
    pool = world.state.pools["w", "shared"]
    assert pool.policy == "fgd" and pool.ledger.quotas["w", "me"].maximum.cpu_milli == 1500 and pool.ledger.quotas["w", "you"].weight == 2
    world.say("node", "n", ev.NodeJoined(target="shared", incarnation="1", resources=NODE, gpu_models=["A", "A"], labels={"zone": "z"}))
    run = c.RunSpec(
        compute_target="shared", resources=c.Resources(cpus=1, gpus=1, gpu_milli=500, gpu_models=["A"]), node_labels={"zone": "z"}
    )
    for name in ("one", "two"):
        world.say("run", name, ev.RunPrepared(spec=run, submitted_by="me"))
    other = c.RunSpec(compute_target="shared", resources=c.Resources(cpus=1), node_labels={"zone": "elsewhere"})
    world.say("run", "three", ev.RunPrepared(spec=other, submitted_by="you"))
    decisions = plan(world.state, {}, {}, 0.0)
    assert [d.run for d in decisions if isinstance(d, Placement)] == ["one"]
    share = ev.AllocatedNode(node="n", incarnation="1", gpu_indexes=[0])
    world.say("placement", "one", ev.PlacementMade(attempt=1, target="shared", nodes=[share], spec=run))
    told = {d.run: render(d.reason) for d in plan(world.state, {}, {}, 0.0) if isinstance(d, Wait)}
    assert "quota of 1.5 CPU" in told["two"] and "zone=elsewhere" in told["three"]


def ray_world(max_nodes: int) -> World:
    world = World()
    spec = ev.ComputeSpec(kind=c.TARGET_KIND_RAY, max_nodes=max_nodes, address="h:1")
    world.say("target", "t", ev.TargetCreated(spec=spec))
    return world


def test_of_ray_each_run_that_waits_gets_a_group_up_to_the_maximum() -> None:
    world = ray_world(3)
    pair, single, late = world.submit(1.0, nodes=2), world.submit(1.0), world.submit(1.0)
    decisions = plan(world.state, {}, {}, world.now)
    gathered = [(d.run, d.count) for d in decisions if isinstance(d, ProvisionGroup)]
    assert gathered == [(pair, 2), (single, 1)]
    codes = {d.run: d.reason.code for d in decisions if isinstance(d, Wait)}
    assert codes == {pair: c.WAIT_CODE_PROVISIONING, single: c.WAIT_CODE_PROVISIONING, late: c.WAIT_CODE_IN_USE}
    # Asked for once; and given up when nobody waits for it.
    coming = {T: {pair: 2, single: 1}}
    again = plan(world.state, {}, {}, world.now, coming)
    assert not [d for d in again if isinstance(d, (ProvisionGroup, ReleaseGroup))]
    world.say("run", pair, ev.RunCancelRequested())
    decisions = plan(world.state, {}, {}, world.now, coming)
    assert ReleaseGroup("w", "t", pair) in decisions
    assert [d.run for d in decisions if isinstance(d, ProvisionGroup)] == [late]


def test_of_ray_an_elastic_run_gets_what_the_maximum_leaves() -> None:
    world = ray_world(3)
    run = world.submit(1.0, nodes=5, least=2)
    gathered = [(d.run, d.count) for d in plan(world.state, {}, {}, world.now) if isinstance(d, ProvisionGroup)]
    assert gathered == [(run, 3)]


def test_of_ray_idle_nodes_in_the_way_of_a_run_go_at_once() -> None:
    world = ray_world(2)
    world.join()
    world.join()
    assert not [d for d in plan(world.state, {}, {}, world.now) if isinstance(d, Scale)]
    world.submit(64.0)
    assert Scale("w", "t", 0, "idle nodes") in plan(world.state, {}, {}, world.now)


def test_of_a_cluster_that_does_not_answer_those_who_wait_are_told() -> None:
    world = ray_world(2)
    run = world.submit(1.0)
    (wait,) = [d for d in plan(world.state, {}, {}, world.now, {}, {T: "no answer"}) if isinstance(d, Wait)]
    assert (wait.run, wait.reason.code, render(wait.reason)) == (run, c.WAIT_CODE_PROVIDER_UNAVAILABLE, "no answer")


def test_limits_of_a_target_change_under_its_runs() -> None:
    world = World(max_nodes=1)
    world.join()
    first, second = world.submit(4.0), world.submit(4.0)
    world.act()
    assert first in world.state.placed and second in world.state.queue
    spec = ev.ComputeSpec(kind=c.TARGET_KIND_LOCAL, max_nodes=2, node_resources=NODE)
    world.say("target", "t", ev.TargetUpdated(spec=spec))
    assert first in world.state.placed
    assert Scale("w", "t", 2, "1 runs wait") in world.act()


def _reasons(decisions: list[Decision]) -> list[str]:
    return [render(d.reason) for d in decisions if isinstance(d, Wait)]


def test_a_node_label_named_quota_changes_nothing() -> None:
    world = World(max_nodes=1)
    world.join()
    world.submit(4.0)
    world.act()
    spec = c.RunSpec(compute_target="t", resources=c.Resources(cpus=1), node_labels={"quota": "quota: 1"})
    for run in ("one", "two"):
        world.say("run", run, ev.RunPrepared(spec=spec, submitted_by="quota"))
    world.act()
    assert _code(world, "one") == _code(world, "two") == c.WAIT_CODE_NO_SUCH_NODE


def test_nothing_is_placed_on_a_cordoned_node_and_those_who_wait_are_told_why() -> None:
    world = World(min_nodes=1, max_nodes=3)
    world.join()
    run = world.submit(1)
    decisions = plan(world.state, {T: 0}, {T: 0}, 0.0, cordoned={"t-0": "its disk is full"})
    assert not [d for d in decisions if isinstance(d, (Placement, Scale))], "another node of the machine would have no space either"
    assert len(_reasons(decisions)) == 1 and _reasons(decisions)[0].endswith("node t-0 takes no new runs: its disk is full")
    placed = plan(world.state, {T: 0}, {T: 0}, 0.0, cordoned={"elsewhere": "x"})
    assert [d.run for d in placed if isinstance(d, Placement)] == [run], "it takes runs again by itself"


def test_a_cordon_ends_neither_a_drain_nor_a_quarantine() -> None:
    world = World(min_nodes=2, max_nodes=2)
    world.join()
    world.join()
    pool = world.state.pools[T]
    plan(world.state, {T: 0}, {T: 0}, 0.0, cordoned={"t-0": "x", "t-1": "x"})
    world.say("node", "t-0", ev.NodeDraining(reason="for repair"))
    for run in ("a", "b", "c"):
        pool.quarantine.record_node_failure("t-1", run, 0.0)
    plan(world.state, {T: 0}, {T: 0}, 0.0)
    world.submit(1)
    assert not [d for d in plan(world.state, {T: 0}, {T: 0}, 1.0) if isinstance(d, Placement)]
    assert not [d for d in plan(world.state, {T: 0}, {T: 0}, 700.0, cordoned={"t-1": "x"}) if isinstance(d, Placement)], (
        "its quarantine is over, and its disk is full"
    )
    (place,) = [d for d in plan(world.state, {T: 0}, {T: 0}, 701.0) if isinstance(d, Placement)]
    assert [s.node for s in place.allocation] == ["t-1"]


def test_nodes_that_join_or_leave_give_no_new_reason_where_the_sentence_is_the_same() -> None:
    world = World(max_nodes=3)
    for _ in range(3):
        world.join()
        world.submit(4.0)
    world.act()
    waiting = world.submit(4.0)
    world.act()
    assert _code(world, waiting) == c.WAIT_CODE_IN_USE
    world.say("node", "t-9", ev.NodeJoined(target="t", incarnation="9", resources=c.Resources(cpus=0.5)))
    assert not [d for d in plan(world.state, {}, {}, world.now) if isinstance(d, Wait)]
    (wait,) = [d for d in plan(world.state, {}, {}, world.now, cordoned={"t-0": "x", "t-1": "x"}) if isinstance(d, Wait)]
    assert render(wait.reason).endswith("2 of the 4 nodes of t take no new runs: x")


def test_a_run_that_no_round_has_explained_is_explained_as_the_next_one_does() -> None:
    world = World(max_nodes=1)
    world.join()
    first, second = world.submit(4.0), world.submit(4.0)
    assert explain(world.state, world.state.queue[first], 0, world.now, {}, "", {}) is None, "the next round places it"
    world.act()
    big = world.submit(64.0)
    for run in (second, big):
        found = explain(world.state, world.state.queue[run], 0, world.now, {}, "", {})
        told = {d.run: d.reason for d in plan(world.state, {}, {}, world.now) if isinstance(d, Wait)}
        assert found == told.get(run, world.state.queue[run].reason)
    assert found is not None and found.code == c.WAIT_CODE_NO_SUCH_NODE
    found = explain(world.state, world.state.queue[second], 0, world.now, {}, "", {"t-0": "its disk is full"})
    assert found is not None and (found.code, found.node) == (c.WAIT_CODE_CORDONED, "t-0")
    empty = World(max_nodes=2)
    found = explain(empty.state, empty.state.queue[empty.submit(1.0)], 0, empty.now, {}, "", {})
    assert found is not None and found.code == c.WAIT_CODE_PROVISIONING
    empty.say("target", "t", ev.TargetDeleted())
    found = explain(empty.state, next(iter(empty.state.queue.values())), 0, empty.now, {}, "", {})
    assert found is not None and found.code == c.WAIT_CODE_TARGET_DELETED


def test_the_failure_of_a_placement_without_nodes_blames_none() -> None:
    world = World()
    run = world.submit(1.0)
    world.say("placement", run, ev.PlacementMade(attempt=1, target="t"))
    world.say("run", run, ev.RunFailed(attempt=1, exit=c.ExitStatus(reason=c.EXIT_REASON_STAGING_FAILED)))
    assert run not in world.state.placed


def test_drains_and_quarantines_are_told_as_cordons_are() -> None:
    world = World()
    world.say("target", "t", ev.TargetCreated(spec=ev.ComputeSpec(kind=c.TARGET_KIND_NODES, max_nodes=2)))
    world.join()
    world.join()
    world.submit(1.0)
    world.say("node", "t-1", ev.NodeDraining(reason="for repair"))
    for run in ("a", "b", "c"):
        world.state.pools[T].quarantine.record_node_failure("t-0", run, 0.0)
    (told,) = _reasons(plan(world.state, {}, {}, 1.0))
    assert told.endswith("2 of the 2 nodes of t take no new runs: different runs failed there in a row")
    world.say("node", "t-0", ev.NodeLost(incarnation=world.state.nodes["t-0"].incarnation))
    (told,) = _reasons(plan(world.state, {}, {}, 1.0))
    assert told.endswith("node t-1 takes no new runs: it is being drained")
