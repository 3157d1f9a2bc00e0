"""The simulator: the published experiment, the queue in virtual time, bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean

import pytest

from alveary_scheduler.core.packing import POLICIES
from alveary_scheduler.core.requests import Request
from alveary_scheduler.core.resources import WHOLE, Machine, Shape
from alveary_scheduler.sim import BadInput, jain, main, read_nodes, read_pods, run, saturate, synthetic

# The authors' means of ten seeds: percent of GPUs allocated when 100 % and 130 % were asked for.
PUBLISHED = {
    "random": (86.30, 87.47), "dot-product": (90.62, 90.85), "gpu-clustering": (91.65, 91.88), "gpu-packing": (91.78, 92.00),
    "best-fit": (92.86, 93.08), "fgd": (95.23, 95.39),
}  # fmt: skip
TRACE = Path(os.environ.get("ALVEARY_OPENB", Path(__file__).parents[4] / "shared/data/openb"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", sorted(PUBLISHED))
@pytest.mark.skipif(not TRACE.is_dir(), reason="the Alibaba 2023 trace is missing: name its folder in ALVEARY_OPENB")
def test_the_published_experiment(policy: str) -> None:
    machines, pods = read_nodes(TRACE / "nodes.csv"), read_pods(TRACE / "pods.csv")
    assert (len(machines), sum(m.gpus for m in machines)) == (1213, 6212)
    results = [saturate(machines, pods, policy, seed) for seed in range(10)]
    for key, published in zip(("allocated_at_100", "allocated_at_130"), PUBLISHED[policy], strict=True):
        assert abs(mean(r[key] for r in results) - published) < 0.5


def files(folder: Path) -> Path:
    nodes = [
        "sn,cpu_milli,memory_mib,gpu,model",
        *(f"n{i},96000,786432,8,{'G2' if i % 2 else 'T4'}" for i in range(20)),
        "cpu,96000,1000,0,",
    ]
    pods = ["name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time"]
    for i in range(200):
        pods.append(f"p{i},{1000 * (1 + i % 12)},{4096},{(0, 1, 1, 1, 2, 8)[i % 6]},{(0, 300, 500, 1000, 1000, 1000)[i % 6]},{'G2|V100' if i % 7 == 1 else ''},LS,Running,{i * 10},{i * 10 + 500},{i * 10}")  # fmt: skip
    (folder / "nodes.csv").write_text("\n".join(nodes) + "\n")
    (folder / "pods.csv").write_text("\n".join(pods) + "\n")
    return folder


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_same_seed_same_bytes_and_json_of_each_policy(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(files(tmp_path))
    said = []
    for seed in ("1", "1", "2"):
        main(["openb", folder, "--policy", policy, "--seed", seed, "--json"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    result = json.loads(said[0])
    assert result["nodes"] == 20 and 0 < result["allocated_at_100"] <= result["allocated_at_130"] <= 100
    assert [x for x, _ in result["curve"]] == list(range(1, 131))
    main(["openb", folder, "--policy", policy, "--replay"])
    first = capsys.readouterr().out
    main(["openb", folder, "--policy", policy, "--replay"])
    assert capsys.readouterr().out == first and "queueing seconds" in first


def test_a_queue_in_virtual_time_adds_up() -> None:
    machines = [Machine("n", 8000, 1 << 34, 1)]
    shape = Shape(1000, 0, 1, WHOLE)
    jobs = [(Request(f"r{i}", "w", "u", shape, i + 1, 0.0), 100.0) for i in range(3)]
    result = run(machines, jobs, "best-fit", 0)
    assert result["finished"] == 3
    assert result["queueing_seconds"] == {"p50": 100.0, "p90": 180.0, "p99": 198.0, "mean": 100.0}
    assert result["slowdown"]["mean"] == 2.0


def test_what_is_preempted_finishes_all_the_same() -> None:
    machines = [Machine("n", 8000, 1 << 34, 1)]
    shape = Shape(1000, 0, 1, WHOLE)
    jobs = [(Request("low", "w", "u", shape, 1, 0.0, tier=-1), 1000.0), (Request("high", "w", "u", shape, 2, 100.0, tier=1), 50.0)]
    result = run(machines, jobs, "best-fit", 0)
    assert (result["finished"], result["preemptions"]) == (2, 1)
    assert result["queueing_seconds"]["p99"] < 30.01  # the grace period


def test_every_run_of_a_busy_cluster_finishes() -> None:
    machines = [Machine(f"n{i}", 96_000, 768 << 30, 8) for i in range(8)]
    result = run(machines, synthetic(machines, 400, 1.1, 1), "fgd", 1)
    assert result["finished"] + result["impossible"] == 400 and result["impossible"] == 0
    assert 30 < result["allocated_gpu_share"] <= 100


def test_jain() -> None:
    assert jain([2.0, 2.0]) == 1.0 and jain([1.0, 0.0]) == 0.5 and jain([]) == 1.0


def test_bad_input_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read_nodes(tmp_path / "nodes.csv")
    (tmp_path / "nodes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="columns sn"):
        read_nodes(tmp_path / "nodes.csv")
    (tmp_path / "pods.csv").write_text("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,1,100\nx,1,1,1\n")
    with pytest.raises(BadInput, match=r"pods.csv, line 3: .*'x'"):
        read_pods(tmp_path / "pods.csv")
    with pytest.raises(SystemExit) as stopped:
        main(["openb", str(tmp_path)])
    assert "alveary-sim:" in str(stopped.value)
