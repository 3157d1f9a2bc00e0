"""Many runs on one to three nodes, some failing, some cancelled, while their trainers are killed: each ends once, and as it should."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import embedded, processes_of, recorded, submit, until

from alveary import AlvearyError, MpiConfiguration, Run
from alveary.compute import AmlCompute, ComputeTarget
from alveary.environment import Environment
from alveary.local.stack import trainers

HERE = Environment("here", user_managed=True, interpreter=sys.executable)
FINAL = ("Completed", "Failed", "Canceled")
OWN_CODE = 3
CODE = """
    import os, sys, time
    seconds, code, who = sys.argv[1:]
    time.sleep(float(seconds))
    rank = os.environ.get("RANK", os.environ.get("NODE_RANK", "0"))
    open(f"outputs/{rank}", "w").write("x")
    sys.exit(int(code) if rank == who else 0)
    """


@pytest.mark.parametrize("seed", [1])
def test_every_run_ends_once_whatever_dies(mpirun: None, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with embedded(tmp_path / "stack", lease=4.0) as stack:
        workspace = stack.workspace()
        spec = AmlCompute.provisioning_configuration(min_nodes=3, max_nodes=3, cpus=2, idle_seconds_before_scaledown=600)
        target = ComputeTarget.create(workspace, "three", spec)
        until(lambda: len(target.list_nodes()) == 3, "all nodes are there")
        runs: dict[str, tuple[Run, int]] = {}
        for number in range(40):
            source = tmp_path / f"source-{number}"
            source.mkdir()
            nodes, code = chance.choice([1, 1, 2, 2, 3]), chance.choice([0, 0, 0, OWN_CODE])
            options: dict[str, Any] = {"node_count": nodes}
            if chance.random() < 0.3:
                options = {"distributed_job_config": MpiConfiguration(1, nodes)}
            run = submit(
                workspace, source, CODE, chance.choice([0, 0.2, 1]), code, chance.randrange(nodes), compute_target="three", environment=HERE,
                grace_seconds=1, max_attempts=10, cpus=chance.choice([1, 2]), priority=chance.choice([0, 0, -1, 1]), **options,
            )  # fmt: skip
            runs[run.id] = (run, code)
            if chance.random() < 0.15:
                try:
                    run.cancel()
                except AlvearyError:
                    assert run.get_status() in FINAL, "it was refused, and has not ended"
            if chance.random() < 0.15:
                try:
                    chance.choice(trainers(stack.state_dir)).kill()
                except psutil.NoSuchProcess:
                    continue  # it was killed a moment ago
        until(lambda: all(run.get_status() in FINAL for run, _ in runs.values()), "all have ended", 900)
        for run, code in runs.values():
            details = run.get_details()
            # Losing a node is never a run's own fault, and no attempt ran out of them.
            assert details["status"] != "Completed" or code == 0, details
            assert details["status"] != "Failed" or details["exit"]["exit_code"] == code == OWN_CODE, details
            assert not processes_of(run)
        ends = [e.subject for e in recorded(*(run for run, _ in runs.values())) if e.type in {f"run.{f.lower()}" for f in FINAL}]
        assert sorted(e for e in ends if e in runs) == sorted(runs), "a run ended twice, or nobody was told"
        until(lambda: not any(n.run_ids for n in target.list_nodes()), "all places are free")
