"""A chaos trial: mixed runs are under way while processes die and stand still, links break and the disk fills.

At the end every submitted run must have exactly one final event, the right one; its log complete, without gaps or doubles; its
files, metrics, tags and model versions right; and nothing may be left over. `make chaos MINUTES=10 SEED=7`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from chaos.faults import LEASE_SECONDS, Faults, Platform
from chaos.workload import BY_NAME, SCRIPT, Submitted, cancel, submit
from support import until
from tcp_proxy import Proxy

from alveary import AlvearyError, Workspace, config
from alveary.compute import AmlCompute, ComputeTarget
from alveary.events import Event

FINAL = ("Completed", "Failed", "Canceled")
_DISK_MIB = 4096
# Where sockets of attempts are: it may stay, empty.
_EMPTY = re.compile(rf"alveary-{os.getuid()}$")
# So many runs are under way at a time: more than the nodes have room for.
_UNDER_WAY = 8
_SUBMITTERS = 3
_SUBMIT_SECONDS = 180.0
# What must have happened this long after the last fault, without anything that changes, will not happen.
_STUCK_SECONDS = 180.0


@dataclass
class Report:
    """What a trial did and found."""

    faults: dict[str, int] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    excused: int = 0
    violations: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people."""
        faults = ", ".join(f"{n} {name}" for name, n in sorted(self.faults.items()))
        runs = ", ".join(f"{n} {name}" for name, n in sorted(self.runs.items()))
        return "\n".join(
            [
                f"{sum(self.faults.values())} faults ({faults})",
                f"{sum(self.runs.values())} runs ({runs}); {self.excused} of them failed because the disk was full, which is right",
                f"{len(self.violations)} violations", *self.violations,
            ]
        )  # fmt: skip


@contextmanager
def disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own at `folder`, so that it can be filled; None where only root could mount it."""
    folder.mkdir(parents=True)
    if os.getuid() != 0:
        yield None
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run(seconds: float, seed: int, *, most_faults: int = 10**9, keep: Path | None = None, without: Sequence[str] = ()) -> Report:
    """Make faults for `seconds`, or until there were `most_faults`, then look at everything.

    `keep`: where the logs of all processes go if something was violated. `without`: kinds of faults that are left out.
    """
    chance = random.Random(seed)
    report = Report()
    # Short: the sockets of attempts go below it.
    with tempfile.TemporaryDirectory(prefix="alv-chaos-", dir="/tmp") as name:
        root = Path(name)
        temporary = root / "tmp"
        temporary.mkdir()
        with pytest.MonkeyPatch.context() as patch, disk(root / "disk") as mounted:
            patch.setenv("TMPDIR", str(temporary))
            if mounted is None:
                print("the disk is not filled: only root can mount one of its own", flush=True)
            _trial(root, mounted, chance, seconds, most_faults, report, without)
            if keep is not None and report.violations:
                _keep_logs(root, keep)
        left = [str(p.relative_to(temporary)) for p in temporary.rglob("*") if not (p.is_dir() and _EMPTY.match(p.name))]
        if left:
            report.violations.append(f"these temporary files are left: {left}")
    return report


def _keep_logs(root: Path, keep: Path) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    for file in [*root.glob("disk/stack/logs/*.log"), *root.glob("disk/stack/services/nodes/*.log"), *root.rglob("far.log")]:
        shutil.copy(file, keep / file.name)


def _trial(
    root: Path, mounted: Path | None, chance: random.Random, seconds: float, most_faults: int, report: Report, without: Sequence[str]
) -> None:
    platform = Platform(root / "disk" / "stack", mounted)
    try:
        workspace = platform.stack.workspace()
        three = AmlCompute.provisioning_configuration(min_nodes=3, max_nodes=3, cpus=2, idle_seconds_before_scaledown=600)
        targets = {"three": ComputeTarget.create(workspace, "three", three)}
        targets["far"] = ComputeTarget.create(workspace, "far", AmlCompute.provisioning_configuration(kind="nodes"))
        platform.add_far_node("far", root / "disk" / "far")
        until(lambda: len(targets["three"].list_nodes()) == 3 and len(targets["far"].list_nodes()) == 1, "all nodes are there", 120)
        faults = Faults(platform, chance, lambda text: print(f"{datetime.now(UTC):%H:%M:%S.%f} {text}", flush=True), without)
        submitted = _under_faults(_through_links(platform), faults, root, chance, seconds, most_faults, report)
        report.faults = faults.kinds
        _drain(submitted, report)
        _verify(workspace, submitted, faults, report)
        _leftovers(platform, list(targets.values()), submitted, report)
    finally:
        platform.close()
    alive = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]
    if alive:
        report.violations.append(f"these processes are left after the end: {alive}")


def _through_links(platform: Platform) -> Workspace:
    """A client whose way to each service is a link that can be cut."""
    direct = config.load(platform.stack.config)
    for service, endpoint in direct.endpoints.items():
        platform.links[f"client-{service}"] = Proxy(int(endpoint.rpartition(":")[2]))
    endpoints = {s: f"127.0.0.1:{platform.links[f'client-{s}'].port}" for s in direct.endpoints}
    return Workspace(replace(direct, endpoint=endpoints["runs"], endpoints=endpoints))


class _Submitters:
    """Threads that keep so many runs under way; each call may wait for a platform that does not answer."""

    def __init__(self, workspace: Workspace, source: Path, seed: int) -> None:
        self._workspace, self._source = workspace, source
        self._lock = threading.Lock()
        self._over: set[str] = set()
        self._stopping = threading.Event()
        self.submitted: list[Submitted] = []
        self.refused: list[str] = []
        chances = [random.Random(seed * 1000 + number) for number in range(_SUBMITTERS)]
        self._threads = [threading.Thread(target=self._submit, args=(chance,), daemon=True) for chance in chances]
        self._threads.append(threading.Thread(target=self._watch, daemon=True))
        for thread in self._threads:
            thread.start()

    def _submit(self, chance: random.Random) -> None:
        while not self._stopping.wait(0.1):
            with self._lock:
                under_way = len({s.run.id for s in self.submitted} - self._over)
            if under_way >= _UNDER_WAY:
                continue
            try:
                found = submit(self._workspace, self._source, chance, ["three", "far"], time.monotonic() + _SUBMIT_SECONDS)
            except AlvearyError as error:
                self.refused.append(f"a run could not be submitted for {_SUBMIT_SECONDS:g} s: {error.code}: {error}")
                continue
            with self._lock:
                self.submitted += found

    def _watch(self) -> None:
        while not self._stopping.wait(2.0):
            with self._lock:
                waiting = [s for s in self.submitted if s.run.id not in self._over]
            for one in waiting:
                cancel(one)
            try:
                over = _final_ids(self._workspace)
            except AlvearyError:
                continue  # asked again in two seconds
            with self._lock:
                self._over |= over

    def stop(self) -> list[Submitted]:
        """No more; returns what was accepted."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(_SUBMIT_SECONDS + 120)
        return self.submitted


def _under_faults(
    workspace: Workspace, faults: Faults, root: Path, chance: random.Random, seconds: float, most_faults: int, report: Report
) -> list[Submitted]:
    source = root / "source"
    source.mkdir()
    (source / "train.py").write_text(SCRIPT)
    submitters = _Submitters(workspace, source, chance.randrange(10**9))
    end = time.monotonic() + seconds
    while time.monotonic() < end and faults.count < most_faults:
        time.sleep(chance.uniform(1, 3))
        faults.one()
    faults.undo()
    submitted = submitters.stop()
    report.violations += submitters.refused
    return submitted


def _final_ids(workspace: Workspace) -> set[str]:
    client = workspace._client
    found: set[str] = set()
    for state in FINAL:
        found |= {run.id for run in workspace._call(client.runs.list(f"state = {state}", limit=500))}
    return found


def _drain(submitted: list[Submitted], report: Report) -> None:
    """Wait until every run has ended; gives up once nothing has changed for a long time."""
    print(f"no more faults; waiting for the last of {len(submitted)} runs", flush=True)
    states: dict[str, str] = {}
    changed = time.monotonic()
    while time.monotonic() - changed < _STUCK_SECONDS:
        for one in submitted:
            if states.get(one.run.id) in FINAL:
                continue
            try:
                cancel(one)
                state = one.run.get_status()
            except AlvearyError as error:
                state = f"not known: {error}"
            if state != states.get(one.run.id):
                states[one.run.id], changed = state, time.monotonic()
        if all(state in FINAL for state in states.values()):
            return
        time.sleep(0.5)
    stuck = {run_id: state for run_id, state in states.items() if state not in FINAL}
    report.violations += [f"run {run_id} never ended: {state}" for run_id, state in stuck.items()]


def _verify(workspace: Workspace, submitted: list[Submitted], faults: Faults, report: Report) -> None:
    events: dict[str, list[Event]] = {}
    for event in workspace.events.subscribe("*.*", from_sequence=1, timeout=10):
        events.setdefault(event.subject.split("/")[-1].rsplit("-", 1)[0] if "-" in event.subject else event.subject, []).append(event)
    by_key: dict[str, set[str]] = {}
    report.runs = dict(Counter(one.kind for one in submitted))
    for one in submitted:
        by_key.setdefault(one.key, set()).add(one.run.id)
    report.violations += [f"key {key} was given to {len(ids)} runs: {sorted(ids)}" for key, ids in by_key.items() if len(ids) > 1]
    for one in {s.run.id: s for s in submitted}.values():
        told = events.get(one.run.id, [])
        try:
            problems = _problems(one, told, faults, report)
        except AlvearyError as error:
            problems = [f"it cannot be looked at: {error}"]
        for problem in problems:
            report.violations.append(f"run {one.run.id} ({one.kind}): {problem}\n{_timeline(told)}")


def _problems(one: Submitted, told: list[Event], faults: Faults, report: Report) -> list[str]:
    ends = [e.type for e in told if e.type in {f"run.{state.lower()}" for state in FINAL}]
    if len(ends) != 1:
        return [f"it has the final events {ends}"]
    details = one.run.get_details()
    state = str(details["status"])
    if state != one.state:
        if state == "Failed" and _for_want_of_space(one, details, faults):
            report.excused += 1
            return []
        return [f"it is {state}, and should be {one.state}: {details['reason']} {json.dumps(details['exit'])}"]
    if state == "Failed" and details["exit"].get("exit_code") != 7:
        return [f"it failed otherwise than it should: {json.dumps(details['exit'])}"]
    return BY_NAME[one.kind].check(one)


def _for_want_of_space(one: Submitted, details: dict[str, object], faults: Faults) -> bool:
    said = json.dumps(details).lower()
    overlaps = any(to >= one.at for _, to in faults.full)
    return overlaps and ("no space left" in said or "disk" in said or "space" in said)


def _timeline(told: list[Event]) -> str:
    return "\n".join(f"    {e.time:%H:%M:%S.%f} {e.type:<24} {json.dumps(e.data)[:300]}" for e in told)


def _leftovers(platform: Platform, targets: list[ComputeTarget], submitted: list[Submitted], report: Report) -> None:
    def placed() -> dict[str, object]:
        return {n.id: list(n.run_ids) for t in targets for n in t.list_nodes() if n.run_ids}

    ids = {one.run.id for one in submitted}

    def alive() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ALVEARY_RUN_ID") in ids and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            except psutil.Error:
                continue
        return found

    def folders() -> list[str]:
        places = [platform.state_dir / "trainer" / "work", platform.state_dir.parent / "far" / "work"]
        return [str(f) for p in places if p.exists() for f in p.glob("*/*") if not f.name.startswith(".")]

    for what, look in (("placements", placed), ("processes of runs", alive), ("folders of attempts", folders)):
        deadline = time.monotonic() + 10 * LEASE_SECONDS
        while look() and time.monotonic() < deadline:
            time.sleep(0.5)
        if found := look():
            report.violations.append(f"these {what} are left: {found}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=10**9, help="end after so many faults")
    parser.add_argument(
        "--without", action="append", default=[], help="a kind of fault to leave out: kill, kill_all, stop, cut, slow, fill"
    )
    parser.add_argument("--keep", type=Path, help="where the logs of all processes go if something was violated")
    asked = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    begun = time.monotonic()
    report = run(asked.minutes * 60, asked.seed, most_faults=asked.faults, keep=asked.keep, without=asked.without)
    print(f"seed {asked.seed}, {time.monotonic() - begun:.0f} s: {report.text()}")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
