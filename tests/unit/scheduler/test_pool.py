"""The decision core, driven as a state machine and by cases."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alveary_scheduler.core.fairness import Quota
from alveary_scheduler.core.planner import Obstacle, Proposal
from alveary_scheduler.core.pool import Pool
from alveary_scheduler.core.requests import AllocatedNode, Request
from alveary_scheduler.core.resources import WHOLE, Machine, ResourceVector, Shape
from alveary_scheduler.core.sizing import nodes_needed

GIB = 1 << 30
QUOTAS = {
    ("a", ""): Quota(weight=2.0),
    ("b", ""): Quota(maximum=ResourceVector(16_000, None, 4000)),
    ("c", ""): Quota(guaranteed=ResourceVector(4000, 8 * GIB, 2000)),
    ("a", "u2"): Quota(maximum=ResourceVector(None, None, 3000)),
}


def machine(name: str, cpus: int = 8, gpus: int = 4, model: str = "", labels: frozenset[tuple[str, str]] = frozenset()) -> Machine:
    return Machine(name, cpus * 1000, 32 * GIB, gpus, model, labels)


shapes = st.builds(
    lambda cpus, memory, gpu, models, labels: Shape(cpus * 500, memory * GIB, gpu[0], gpu[1], models if gpu[0] else frozenset(), labels),
    st.integers(1, 10), st.integers(0, 4), st.sampled_from([(0, WHOLE), (1, 300), (1, 500), (1, WHOLE), (2, WHOLE), (4, WHOLE)]),
    st.sampled_from([frozenset[str](), frozenset(["A"]), frozenset(["A", "B"])]),
    st.sampled_from([frozenset[tuple[str, str]](), frozenset([("zone", "z")])]),
)  # fmt: skip


class PoolMachine(RuleBasedStateMachine):
    """Two pools are told the same: what one decides the other must."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = [Pool(policy, quotas=QUOTAS, aging_seconds=500.0, max_placements=8) for policy in ("fgd", "fgd", "best-fit")]
        self.pool, self.twin, self.other = self.pools
        self.now, self.names, self.sequence = 0.0, count(1), count(1)

    @rule(cpus=st.integers(2, 8), gpus=st.integers(0, 4), model=st.sampled_from(["", "A", "B"]), zone=st.booleans())
    def join(self, cpus: int, gpus: int, model: str, zone: bool) -> None:
        if len(self.pool.nodes.cluster.rows) < 6:
            labels = frozenset([("zone", "z")]) if zone else frozenset[tuple[str, str]]()
            name = f"n{next(self.names)}"
            for pool in self.pools:
                pool.add(machine(name, cpus, gpus, model, labels))

    @rule(
        shape=shapes, workspace=st.sampled_from("abc"), user=st.sampled_from(["u1", "u2"]), gang=st.integers(1, 3), elastic=st.booleans(),
        spread=st.booleans(), tier=st.integers(-1, 1), duration=st.sampled_from([0.0, 50.0, 500.0]), preemptible=st.booleans(),
    )  # fmt: skip
    def submit(
        self, shape: Shape, workspace: str, user: str, gang: int, elastic: bool, spread: bool, tier: int, duration: float, preemptible: bool
    ) -> None:
        request = Request(
            f"r{next(self.names)}", workspace, user, shape, next(self.sequence), self.now, gang, 1 if elastic else 0, spread, tier, duration,
            preemptible,
        )  # fmt: skip
        for pool in self.pools:
            pool.submit(request)

    @rule(index=st.integers(0, 50))
    def finish(self, index: int) -> None:
        for pool in self.pools:
            if running := sorted(pool.running):
                pool.finish(running[index % len(running)], self.now)

    @rule(index=st.integers(0, 50))
    def cancel(self, index: int) -> None:
        for pool in self.pools:
            if waiting := sorted(pool.waiting):
                pool.withdraw(waiting[index % len(waiting)])

    @rule(index=st.integers(0, 50))
    def lose(self, index: int) -> None:
        if nodes := sorted(self.pool.nodes.cluster.rows):
            for pool in self.pools:
                held = {run: pool.running[run].request for run in pool.running}
                for run in pool.remove(nodes[index % len(nodes)]):
                    pool.submit(held[run])  # a new attempt, in its old place

    @rule(seconds=st.sampled_from([1.0, 60.0, 600.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for pool in self.pools:
            for run in [r for r, held in pool.running.items() if held.ends <= self.now]:
                pool.finish(run, self.now)

    @rule()
    def propose(self) -> None:
        for _ in range(200):
            proposal = self.pool.propose(self.now)
            assert proposal == self.pool.propose(self.now), "proposing changed the pool"
            self.pool.order(self.now + 100.0)
            assert proposal == self.pool.propose(self.now), "looking ahead changed the pool"
            assert proposal == self.twin.propose(self.now), "not deterministic"
            self.check(proposal)
            for pool in (self.pool, self.twin):
                pool.apply(proposal, self.now)
                # An attempt that was asked to make room ends, and its run comes back with a new one.
                for run in sorted(pool.running.preempting):
                    self.leave(pool, run)
            if not (proposal.placements or proposal.preemptions):
                break
        else:
            raise AssertionError("it places for ever")
        for _ in range(200):
            proposal = self.other.propose(self.now)
            self.other.apply(proposal, self.now)
            for preemption in proposal.preemptions:
                self.leave(self.other, preemption.run)
            if not (proposal.placements or proposal.preemptions):
                break
        self.conserving(self.pool)
        self.conserving(self.other)

    def check(self, proposal: Proposal) -> None:
        assert len(proposal.placements) <= 8
        for preemption in proposal.preemptions:
            victim = self.pool.running[preemption.run].request
            winner = self.pool.waiting[preemption.beneficiary]
            assert victim.preemptible and victim.tier <= winner.tier
            if victim.tier == winner.tier:
                assert winner.workspace == "c" != victim.workspace, "only for a guarantee, and never from within one"

    def leave(self, pool: Pool, run: str) -> None:
        request = replace(pool.running[run].request, arrived=self.now)
        pool.finish(run, self.now)
        pool.submit(request)

    def conserving(self, pool: Pool) -> None:
        """Nobody waits for what is free and kept for nobody."""
        planner = pool.planner(self.now)
        proposal = planner.propose()
        assert not proposal.placements
        for request in pool.waiting.values():
            count = planner.shares.allowed_count(request)
            if count and (found := planner.find(request, count, planner.hold)) is not None:
                raise AssertionError(f"{request} waits for {found}, which is free")

    @invariant()
    def never_overcommitted(self) -> None:
        for pool in self.pools:
            cluster = pool.nodes.cluster
            for name, row in cluster.rows.items():
                whole = cluster.machines[row]
                assert whole is not None
                held = [(h.request.shape, s) for h in pool.running.values() for s in h.allocation if s.node == name]
                assert sum(s.cpu_milli for s, _ in held) == whole.cpu_milli - cluster.cpu[row] <= whole.cpu_milli
                assert sum(s.memory for s, _ in held) == whole.memory - cluster.memory[row] <= whole.memory
                gpus = Counter[int]()
                for shape, share in held:
                    assert len(set(share.gpus)) == len(share.gpus) == shape.gpus
                    assert not shape.gpus or not shape.models or whole.model in shape.models
                    assert shape.labels <= whole.labels
                    for index in share.gpus:
                        gpus[index] += shape.gpu_milli
                assert all(0 <= i < whole.gpus and v <= WHOLE for i, v in gpus.items())
                assert all(cluster.gpu[row, i] == WHOLE - gpus[i] for i in range(whole.gpus))

    @invariant()
    def never_half_a_gang(self) -> None:
        for pool in self.pools:
            assert not pool.waiting.keys() & pool.running.keys()
            for held in pool.running.values():
                least = held.request.needed
                assert least <= len(held.allocation) <= held.request.count
                assert not held.request.spread or len({s.node for s in held.allocation}) == len(held.allocation)

    @invariant()
    def never_above_quota(self) -> None:
        for pool in self.pools:
            for (workspace, user), quota in QUOTAS.items():
                used = ResourceVector()
                for held in pool.running.values():
                    if held.request.workspace == workspace and user in ("", held.request.user):
                        used = used.plus(held.request.shape, len(held.allocation))
                assert used == pool.used(workspace, user) and used.within(quota.maximum)

    def teardown(self) -> None:
        """No starvation: when what runs ends, everybody that there is room for gets a place, in bounded time."""
        for pool in self.pools:
            pool.ledger.quotas = {}
            left = len(pool.waiting)
            for _ in range(20 * left + 20):
                while (proposal := pool.propose(self.now)).placements:
                    pool.apply(proposal, self.now)
                pool.apply(proposal, self.now)
                for run in sorted(pool.running.preempting):
                    self.leave(pool, run)
                self.now += 1.0
                if not [r for r in pool.waiting.values() if pool.possible(r)]:
                    break
                if pool.running:
                    pool.finish(min(pool.running, key=lambda r: pool.running[r].started), self.now)
            assert not [r for r in pool.waiting.values() if pool.possible(r)], "starved"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class World:
    """A pool with nodes n0, n1, ... and runs r0, r1, ... in order."""

    def __init__(self, nodes: int, gpus: int = 4, **options: object) -> None:
        self.pool, self.names, self.now = Pool(**options), count(), 0.0  # type: ignore[arg-type]
        for index in range(nodes):
            self.pool.add(machine(f"n{index}", 32, gpus))

    def submit(self, gpus: int, milli: int = WHOLE, **options: object) -> str:
        number = next(self.names)
        options = {"workspace": "w", "user": "u", "arrived": self.now} | options
        self.pool.submit(Request(f"r{number}", shape=Shape(1000, 0, gpus, milli), sequence=number + 1, **options))  # type: ignore[arg-type]
        return f"r{number}"

    def propose(self) -> Proposal:
        """A proposal that is carried out."""
        proposal = self.pool.propose(self.now)
        self.pool.apply(proposal, self.now)
        return proposal

    def placed(self) -> list[str]:
        return [placement.run for placement in self.propose().placements]

    def preempted(self) -> list[tuple[str, str]]:
        return [(preemption.run, preemption.beneficiary) for preemption in self.propose().preemptions]


def test_a_gang_gets_all_or_nothing_on_nodes_of_its_own() -> None:
    world = World(3)
    first = world.submit(4, count=2)
    gang = world.submit(4, count=2)
    assert world.placed() == [first]
    assert world.pool.waiting.keys() == {gang}
    world.pool.finish(first, 1.0)
    assert world.placed() == [gang]
    assert len({s.node for s in world.pool.running[gang].allocation}) == 2


def test_an_elastic_gang_takes_what_there_is_from_its_minimum_on() -> None:
    world = World(3)
    run = world.submit(4, count=5, min_count=2)
    assert world.placed() == [run] and len(world.pool.running[run].allocation) == 3


def test_small_runs_fill_the_gaps_but_do_not_delay_a_blocked_gang() -> None:
    world = World(2)
    long = world.submit(4, duration=100.0)
    assert world.placed() == [long]
    gang = world.submit(4, count=2)
    short, endless, late = world.submit(4, duration=50.0), world.submit(1), world.submit(1, duration=101.0)
    assert world.placed() == [short]
    planner = world.pool.planner(world.now)
    planner.propose()
    assert planner.hold is not None and planner.hold.at == 100.0
    assert {gang, endless, late} == set(world.pool.waiting)
    world.now = 50.0
    world.pool.finish(short, 50.0)
    assert world.placed() == []
    world.now = 100.0
    world.pool.finish(long, 100.0)
    assert world.placed() == [gang]


def test_fair_share_follows_weights_and_remembers_usage() -> None:
    world = World(4, quotas={("heavy", ""): Quota(weight=3.0), ("light", ""): Quota(weight=1.0)})
    for _ in range(16):
        world.submit(1, workspace="light")
        world.submit(1, workspace="heavy")
    while world.placed():
        pass
    held = Counter(h.request.workspace for h in world.pool.running.values())
    assert held == {"heavy": 12, "light": 4}
    # A day later all end; who used much lately comes after who used little.
    world.now = 86400.0
    for run in list(world.pool.running):
        world.pool.finish(run, world.now)
    for run in list(world.pool.waiting):
        world.pool.withdraw(run)
    world.pool.ledger.quotas = {}
    for workspace in ("heavy", "light"):
        for _ in range(16):
            world.submit(1, workspace=workspace)
    while world.placed():
        pass
    held = Counter(h.request.workspace for h in world.pool.running.values())
    assert held["light"] > held["heavy"]


def test_users_of_one_workspace_share_it() -> None:
    world = World(2)
    for _ in range(8):
        world.submit(1, user="first")
    for _ in range(8):
        world.submit(1, user="second")
    world.placed()
    assert Counter(h.request.user for h in world.pool.running.values()) == {"first": 4, "second": 4}


def test_a_higher_tier_preempts_least_work_lost_first_and_victims_come_back() -> None:
    world = World(2)
    old = world.submit(4, tier=0)
    world.placed()
    world.now = 500.0
    young = world.submit(4, tier=0)
    world.placed()
    world.now = 600.0
    urgent = world.submit(4, tier=1)
    assert world.preempted() == [(young, urgent)]
    assert not world.preempted(), "asked twice"
    request = world.pool.running[young].request
    world.pool.finish(young, 601.0)
    world.pool.submit(request)
    assert world.placed() == [urgent]
    # A checkpoint makes it cheap: now the old one is.
    world.pool.record_checkpoint(old, 700.0)
    world.now = 701.0
    last = world.submit(4, tier=2)
    assert world.preempted() == [(old, last)]


def test_a_guarantee_is_taken_back_from_borrowers_alone() -> None:
    quotas = {
        ("owed", ""): Quota(guaranteed=ResourceVector(None, None, 4000)),
        ("kept", ""): Quota(guaranteed=ResourceVector(None, None, 4000)),
    }
    world = World(2, quotas=quotas)
    kept, borrower = world.submit(4, workspace="kept"), world.submit(4, workspace="other")
    assert set(world.placed()) == {kept, borrower}
    owed = world.submit(4, workspace="owed")
    world.now = 1.0
    assert world.preempted() == [(borrower, owed)]


def test_a_run_that_waited_too_long_comes_first_whatever_its_tier() -> None:
    world = World(1, aging_seconds=1000.0)
    running = world.submit(4, tier=5, preemptible=False)
    world.placed()
    patient = world.submit(4, tier=-5)
    for step in range(5):
        world.now = step * 300.0
        world.submit(4, tier=5, preemptible=False)
        world.placed()
    world.pool.finish(running, world.now)
    assert world.placed() == [patient]


def test_fractions_share_a_gpu_and_whole_ones_do_not() -> None:
    world = World(1, gpus=2)
    halves = [world.submit(1, 500) for _ in range(3)]
    assert set(world.placed()) == set(halves)
    whole = world.submit(1)
    assert world.placed() == [] and whole in world.pool.waiting
    used = Counter(s.gpus[0] for h in world.pool.running.values() for s in h.allocation)
    assert sorted(used.values()) == [1, 2]


def test_quarantine_takes_different_runs_in_a_row_and_ends() -> None:
    world = World(1)
    pool = world.pool
    quarantine = pool.quarantine
    assert [quarantine.record_node_failure("n0", run, 0.0) for run in ("x", "x", "y")] == [False] * 3
    quarantine.clear_failures("n0", 0.0)
    assert [quarantine.record_node_failure("n0", run, 0.0) for run in ("x", "y", "z")] == [False, False, True]
    run = world.submit(1)
    assert world.placed() == []
    world.now = 600.0
    assert world.placed() == [run]


def test_scale_up_is_sized_for_the_whole_queue_and_stays_below_the_maximum() -> None:
    pool = World(0).pool
    world = World(0)
    world.pool = pool
    for _ in range(5):
        world.submit(2)  # two fit a node
    world.submit(1, count=4)  # a node each
    for _ in range(100):
        world.submit(8)  # fits no such node: starts none
    counts = pool.planner(0.0).waiting_kinds()
    assert nodes_needed(counts, machine("x"), 0, 10) == 5
    assert nodes_needed(counts, machine("x"), 0, 2) == 2
    assert nodes_needed(counts, machine("x"), 3, 10) == 5


def test_why_is_it_queued() -> None:
    world = World(1, quotas={("poor", ""): Quota(maximum=ResourceVector(None, None, 1000))})
    running = world.submit(4, duration=100.0)
    world.placed()
    waits, big, poor = world.submit(2), world.submit(8), world.submit(2, workspace="poor")
    found = {run: world.pool.explain(run, 1.0) for run in (waits, big, poor)}
    assert found[waits].obstacle is Obstacle.IN_USE and found[big].obstacle is Obstacle.NO_SUCH_NODE
    assert (found[poor].obstacle, str(found[poor].limit)) == (Obstacle.QUOTA, "1 GPU")
    assert found[waits].position == 2 and found[waits].expected == 100.0
    assert found[big].expected is None
    assert running in world.pool.running, "asking changes nothing"
    closed = world.pool.explain(waits, 1.0, cordoned=["n0"])
    assert closed.obstacle is Obstacle.NO_SUCH_NODE and closed.expected is None, "the node takes nothing, however long it waits"


def test_shares_of_a_node_that_is_lost_go_with_it() -> None:
    world = World(2)
    run = world.submit(4, count=2)
    world.placed()
    assert world.pool.remove("n0") == [run]
    assert (
        world.pool.used("w") == ResourceVector()
        and int(world.pool.nodes.cluster.gpu[world.pool.nodes.cluster.rows["n1"]].sum()) == 4 * WHOLE
    )
    assert AllocatedNode("n1") != AllocatedNode("n0")


def test_an_aged_run_over_its_quota_holds_up_no_other_account() -> None:
    world = World(1, quotas={("w", "x"): Quota(maximum=ResourceVector(None, None, 1000))})
    world.submit(1, user="x")
    world.placed()
    over, free = world.submit(1, user="x"), [world.submit(1, user=user) for user in ("y", "z")]
    world.now = 7 * 3600.0
    assert world.placed() == free and over in world.pool.waiting


def test_of_the_aged_the_first_within_its_quota_gets_the_reservation() -> None:
    world = World(1, quotas={("w", "x"): Quota(maximum=ResourceVector(None, None, 1000))})
    world.submit(1, user="x")
    world.submit(3, user="y")
    world.placed()
    world.submit(1, user="x")
    first = world.submit(1, user="y")
    world.now = 7 * 3600.0
    assert world.placed() == []
    reservation = world.pool.reservations.current
    assert reservation is not None and reservation.run == first


def test_aged_runs_of_one_round_keep_to_their_quotas() -> None:
    world = World(1, quotas={("w", "x"): Quota(maximum=ResourceVector(None, None, 1000))})
    one, two, other = world.submit(1, user="x"), world.submit(1, user="x"), world.submit(1, user="y")
    world.now = 7 * 3600.0
    assert world.placed() == [one, other] and two in world.pool.waiting
