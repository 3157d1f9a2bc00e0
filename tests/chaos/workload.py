"""The runs of a chaos trial: what is submitted, and what must be true of each at the end."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import tail

from alveary import AlvearyError, Distribution, Experiment, PyTorchConfiguration, Resources, Retry, Run, Workspace
from alveary.environment import Environment
from alveary.model import Model
from alveary.script_run_config import ScriptRunConfig
from alveary_contracts.ids import new_id
from alveary_contracts.runs.v1 import runs_pb2

HERE = Environment("here", user_managed=True, interpreter=sys.executable)
EXPERIMENT = "chaos"
OWN_CODE = 7

SCRIPT = """
import hashlib, os, random, sys, time
from alveary import Run

kind, seed, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
run = Run.get_context()
if kind == "failing":
    print("about to fail", flush=True)
    sys.exit(7)
elif kind == "lines":
    for i in range(size):
        print("line", i, flush=i % 100 == 0)
        if i % (size // 10) == 0:
            time.sleep(0.3)
elif kind == "files":
    for i in range(size):
        with open(f"outputs/{i}.bin", "wb") as file:
            file.write(chance.randbytes(chance.randrange(200_000)))
elif kind == "metrics":
    for i in range(size):
        run.log("loss", 1 / (i + 1), step=i)
        if i % (size // 10) == 0:
            time.sleep(0.2)
elif kind == "torchrun":
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    print("total", int(total.item()), flush=True)
    dist.destroy_process_group()
elif kind == "nodes":
    rank = os.environ.get("NODE_RANK", "0")
    time.sleep(0.5)
    with open(f"outputs/{rank}.txt", "w") as file:
        file.write(rank)
elif kind == "waiting":
    time.sleep(900)
elif kind == "register":
    with open("outputs/model.bin", "wb") as file:
        file.write(chance.randbytes(50_000))
    run.register_model(f"chaos-{seed}", "outputs/model.bin")
elif kind == "tags":
    for i in range(size):
        run.tag(f"tag-{i}", str(i))
        time.sleep(0.1)
print("end", kind, flush=True)
"""


@dataclass
class Submitted:
    """A run that the platform accepted, and what is known of what it must become."""

    kind: str
    run: Run
    seed: int
    size: int
    key: str
    at: float
    state: str = "Completed"
    cancel_at: float = 0.0
    cancel_accepted: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of run. `check` returns what is wrong with a run that ended as it should."""

    name: str
    size: int = 0
    state: str = "Completed"
    weight: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Submitted], list[str]] = lambda submitted: []


def _lines(submitted: Submitted) -> list[str]:
    wrong = []
    found: dict[int, list[str]] = {}
    for one in tail(submitted.run, streams=("stdout",)):
        found.setdefault(one.line.attempt, []).append(one.line.data.decode())
    newest = submitted.run.get_details()["attempt"]
    expected = [f"line {i}" for i in range(submitted.size)] + ["end lines"]
    if found.get(newest) != expected:
        have = found.get(newest, [])
        wrong.append(f"its log has {len(have)} lines instead of {len(expected)}; missing {sorted(set(expected) - set(have))[:3]}")
    for attempt, have in found.items():
        if have != expected[: len(have)]:
            wrong.append(f"the log of attempt {attempt} has gaps or doubles: {_first_difference(have, expected)}")
    return wrong


def _first_difference(have: list[str], expected: list[str]) -> str:
    for number, (one, other) in enumerate(zip(have, expected)):
        if one != other:
            return f"line {number} is {one!r}"
    return f"{len(have) - len(expected)} lines too many"


def _digests(seed: int, size: int) -> dict[str, str]:
    chance = random.Random(seed)
    return {f"outputs/{i}.bin": hashlib.sha256(chance.randbytes(chance.randrange(200_000))).hexdigest() for i in range(size)}


def _files(submitted: Submitted) -> list[str]:
    client, call = submitted.run._workspace._client, submitted.run._workspace._call
    links = call(client.runs.file_links(submitted.run.id, "outputs/", with_urls=True))
    expected = _digests(submitted.seed, submitted.size)
    said = {link.file.path: link.file.sha256 for link in links}
    if said != expected:
        return [f"its files are {len(said)}, expected {len(expected)}, or their digests differ: {sorted(set(said) ^ set(expected))[:3]}"]
    return []


def _metrics(submitted: Submitted) -> list[str]:
    values = submitted.run.get_metrics().get("loss", [])
    expected = [1 / (i + 1) for i in range(submitted.size)]
    return (
        [] if values == expected else [f"{len(values)} points of its metric are there instead of {len(expected)}, or their order is wrong"]
    )


def _torchrun(submitted: Submitted) -> list[str]:
    newest = submitted.run.get_details()["attempt"]
    said = Counter(o.line.data.decode() for o in tail(submitted.run, streams=("stdout",)) if o.line.attempt == newest)
    return [] if said["total 3"] == 2 else [f"its ranks said {dict(said)}"]


def _nodes(submitted: Submitted) -> list[str]:
    names = set(submitted.run.get_file_names())
    return [] if {"outputs/0.txt", "outputs/1.txt"} <= names else [f"it stored {sorted(names)}"]


def _register(submitted: Submitted) -> list[str]:
    models = Model.list(submitted.run._workspace, name=f"chaos-{submitted.seed}")
    if len(models) != 1:
        return [f"its model has {len(models)} versions instead of 1"]
    return []


def _tags(submitted: Submitted) -> list[str]:
    tags = {k: v for k, v in submitted.run.get_tags().items() if k.startswith("tag-")}
    return [] if tags == {f"tag-{i}": str(i) for i in range(submitted.size)} else [f"its tags are {tags}"]


KINDS = (
    Kind("quick", weight=3),
    Kind("failing", state="Failed"),
    Kind("lines", size=20_000, weight=2, check=_lines),
    Kind("files", size=20, check=_files),
    Kind("metrics", size=2_000, check=_metrics),
    Kind("torchrun", options={"distributed_job_config": PyTorchConfiguration("Gloo", 2)}, check=_torchrun),
    Kind("nodes", options={"distributed_job_config": Distribution(2)}, check=_nodes),
    Kind("waiting", state="Canceled"),
    Kind("register", check=_register),
    Kind("tags", size=5, check=_tags),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def submit(workspace: Workspace, source: Path, chance: random.Random, targets: list[str], deadline: float) -> list[Submitted]:
    """Submit a run of some kind, trying again while the platform cannot be reached; some are submitted twice with one key.

    Raises:
        AlvearyError: it is refused, or is not accepted before `deadline` (time.monotonic()).
    """
    kind = chance.choices(KINDS, [k.weight for k in KINDS])[0]
    seed = chance.randrange(10**9)
    target = "three" if kind.options else chance.choice(targets)
    config = ScriptRunConfig(
        str(source), "train.py", [kind.name, seed, kind.size], environment=HERE, compute_target=target, retry=Retry(10),
        resources=Resources(cpus=0.5), grace_seconds=2, **kind.options,
    )  # fmt: skip
    key = new_id()
    found: list[Submitted] = []
    for _ in range(2 if chance.random() < 0.2 else 1):
        run_id = _again(lambda: _submit(workspace, config, key), deadline)
        run = Run(Experiment(workspace, EXPERIMENT), run_id)
        found.append(Submitted(kind.name, run, seed, kind.size, key, time.time(), kind.state))
    if kind.state == "Canceled":
        found[0].cancel_at = time.monotonic() + chance.uniform(0, 6)
    return found


def _submit(workspace: Workspace, config: ScriptRunConfig, key: str) -> str:
    client = workspace._client
    spec = config._spec()
    spec.experiment = EXPERIMENT

    async def work() -> str:
        spec.snapshot = await client.runs.upload_snapshot(Path(config.source_directory))
        request = runs_pb2.SubmitRunRequest(spec=spec, idempotency_key=key)
        return str((await client.call(client.stubs.runs.SubmitRun, request)).run.id)

    return workspace._call(work())


_AGAIN = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "RESOURCE_EXHAUSTED", "CANCELLED")


def _again(work: Callable[[], str], deadline: float) -> str:
    pause = 0.2
    while True:
        try:
            return work()
        except AlvearyError as error:
            if error.code not in _AGAIN or time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 3.0)


def cancel(submitted: Submitted) -> None:
    """Ask for its end, if it is time; what could not be asked now is asked the next time."""
    if submitted.cancel_accepted or not submitted.cancel_at or time.monotonic() < submitted.cancel_at:
        return
    try:
        submitted.run.cancel()
        submitted.cancel_accepted = True
    except AlvearyError as error:
        if error.code not in _AGAIN:
            raise
