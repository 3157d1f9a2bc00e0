"""Control groups of attempts: what the kernel counts, limits and kills, where this machine lets the trainer use it.

Three things are wanted, and each is looked for by itself, as machines differ (cgroups(7)):

- kill: end every process of an attempt at once, however it detached. Version 2 (`cgroup.kill`, Linux 5.14).
- memory: what an attempt really uses, and a limit that the kernel enforces. Version 2, else version 1.
- pids: how many processes and threads an attempt may have. Version 2, else version 1.

What is not there is done without: see `adapters/process.py`. `describe()` says which of them this machine offers, and
why not the others.

Groups are called `alveary/<node>/<name>`, below the first group, from the trainer's own upwards, in which that works. The name
is that of the attempt, or `spare-<id>` where a shim enters it before there is an attempt; no name is used twice.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TOP = "alveary"
# Where the processes of a delegated group go: one that has controllers for its children may have none itself.
_LEAF = "alveary-platform"
WANTED = ("kill", "memory", "pids")
_REMOVE_SECONDS = 2.0
# Trainers of one machine may look at the same time.
_TRIES = 20


@dataclass(frozen=True)
class Offer:
    """One of `WANTED` on this machine. `base` is the group below which groups are made; `version` 0 means that it is not offered."""

    version: int = 0
    base: Path = Path()
    why_not: str = ""


@dataclass(frozen=True)
class Support:
    """What this process may use."""

    kill: Offer
    memory: Offer
    pids: Offer

    def sentences(self) -> list[str]:
        """One line for each of `WANTED`: what is used, or what is used instead and why."""
        instead = {
            "kill": "processes are ended one by one, and orphans are adopted",
            "memory": "the proportional set size of all processes is summed up four times a second",
            "pids": "processes are counted four times a second",
        }
        said = []
        for name in WANTED:
            offer: Offer = getattr(self, name)
            how = f"cgroup v{offer.version} below {offer.base}" if offer.version else f"{instead[name]}: {offer.why_not}"
            said.append(f"{name}: {how}")
        return said


def describe() -> Support:
    """What a trainer that runs as this process would use. Makes and removes empty groups to find out."""
    return _find(Path("/proc/self/mountinfo"), Path("/proc/self/cgroup"))


def _find(mountinfo: Path, membership: Path) -> Support:
    mounts = _mounts(mountinfo.read_text())
    own = _own(membership.read_text())
    none = Offer(why_not="no control groups are mounted")
    found = dict.fromkeys(WANTED, none)
    if "" in mounts:
        for name, offer in _version_2(_upwards(mounts[""], own.get("", "/")), own.get("", "/")).items():
            found[name] = offer
    for name in ("memory", "pids"):
        if not found[name].version and name in mounts:
            found[name] = _version_1(_upwards(mounts[name], own.get(name, "/")))
    return Support(**found)


def _mounts(text: str) -> dict[str, tuple[str, Path]]:
    """(root, mount point) by controller of version 1, and of version 2 under ""; see proc_pid_mountinfo(5)."""
    found: dict[str, tuple[str, Path]] = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(maxsplit=2)
        if kind == "cgroup2":
            found.setdefault("", (fields[3], Path(fields[4])))
        elif kind == "cgroup":
            for name in options.split(","):
                if name in WANTED:
                    found.setdefault(name, (fields[3], Path(fields[4])))
    return found


def _own(text: str) -> dict[str, str]:
    """The group of a process, by controller."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _upwards(mount: tuple[str, Path], own: str) -> list[Path]:
    root, point = mount
    below = own.removeprefix(root).lstrip("/") if own.startswith(root) and ".." not in own else ""
    here = point / below
    if not here.is_dir():  # a namespace of its own, seen from outside
        here = point
    return [here, *(p for p in here.parents if p.is_relative_to(point))]


def _version_2(groups: list[Path], own: str) -> dict[str, Offer]:
    kill = pids = memory = Offer(why_not=f"{groups[0]} is not writable")
    for base in groups:
        try:
            top = _made(base)
        except OSError as error:
            if base is groups[0]:
                kill = pids = memory = Offer(why_not=f"{base}: {error.strerror}")
            continue
        if not kill.version:
            there = (top / "cgroup.kill").exists()
            kill = Offer(2, base) if there else Offer(why_not="cgroup.kill needs Linux 5.14")
        missing = _enable(base, own if base is groups[0] else "")
        enabled = _words(top / "cgroup.controllers")
        if "memory" in enabled and not memory.version:
            memory = Offer(2, base)
        elif not memory.version and base is groups[0]:
            memory = Offer(why_not=missing or f"{base} has no memory controller of version 2")
        if "pids" in enabled and not pids.version:
            pids = Offer(2, base)
        elif not pids.version and base is groups[0]:
            pids = Offer(why_not=missing or f"{base} has no pids controller of version 2")
        _drop(top)
        if memory.version and pids.version:
            # One group for all: the one that has everything.
            return {"kill": Offer(2, base) if kill.version else kill, "memory": memory, "pids": pids}
    return {"kill": kill, "memory": memory, "pids": pids}


def _enable(base: Path, own: str) -> str:
    """Let the children of `base` have memory and pids; returns why they do not."""
    wanted = {"memory", "pids"} & _words(base / "cgroup.controllers")
    missing = wanted - _words(base / "cgroup.subtree_control")
    if not missing:
        return ""
    order = " ".join(f"+{name}" for name in sorted(missing))
    try:
        try:
            _write(base / "cgroup.subtree_control", order)
        except OSError as error:
            if error.errno != errno.EBUSY or not own or not _ours(base, own):
                raise
            leaf = base / _LEAF
            leaf.mkdir(exist_ok=True)
            for pid in (base / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    _write(leaf / "cgroup.procs", pid)
            _write(base / "cgroup.subtree_control", order)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return f"{base} holds processes: start the trainer as a systemd unit with Delegate=yes"
        return f"{base}: {error.strerror}"
    return ""


def _ours(base: Path, own: str) -> bool:
    """Whether the processes of a group may be moved: systemd delegated it, or it is the root of a container."""
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(base, name) == b"1":
                return True
        except OSError:
            continue  # it has no such mark
    return own == "/" and (base / "cgroup.type").exists()


def _version_1(groups: list[Path]) -> Offer:
    why = ""
    for base in groups:
        try:
            _drop(_made(base))
            return Offer(1, base)
        except OSError as error:
            why = why or f"{base}: {error.strerror}"
    return Offer(why_not=why)


def _made(base: Path) -> Path:
    """`base`/alveary, which lets processes in."""
    top = base / _TOP
    for _ in range(_TRIES):
        top.mkdir(exist_ok=True)
        if os.access(base / "cgroup.procs", os.W_OK) and os.access(top / "cgroup.procs", os.W_OK):
            return top
        if top.exists():
            break
        # Another trainer that looked at the same moment has removed it, empty as it was.
    _drop(top)
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _drop(group: Path) -> None:
    with contextlib.suppress(OSError):  # others use it
        group.rmdir()


def _words(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except OSError:
        return set()


def _write(path: Path, text: str) -> None:
    # One write(2), with no buffer whose flush could fail later.
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


@dataclass
class Group:
    """The control groups of one attempt; with no folders nothing is counted and `kill` does nothing."""

    kill_folder: Path | None = None
    memory_folder: Path | None = None
    memory_version: int = 0
    pids_folder: Path | None = None
    _folders: list[Path] = field(default_factory=list)

    @property
    def order(self) -> dict[str, object]:
        """For the shim: which files the process writes itself into, and which of them end everything."""
        return {
            "enter": [str(folder / "cgroup.procs") for folder in self._folders],
            "kill": str(self.kill_folder / "cgroup.kill") if self.kill_folder else "",
            "no_forks": str(self.pids_folder / "pids.max") if self.pids_folder else "",
        }

    def limit_memory(self, memory_bytes: int) -> None:
        """Let the kernel enforce a limit, bytes; 0, or without a group for it: none.

        Raises:
            OSError: the kernel refuses it.
        """
        if memory_bytes and self.memory_folder is not None:
            _limit(self.memory_folder, self.memory_version, memory_bytes)

    def pids(self) -> list[int] | None:
        """Processes in the group; None: it is not known."""
        if not self._folders:
            return None
        found: set[int] = set()
        for folder in self._folders:
            with contextlib.suppress(OSError):  # removed
                found |= {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
        return sorted(found - {0})  # 0: of another pid namespace

    def kill(self) -> None:
        """SIGKILL to every process."""
        if self.pids_folder:
            with contextlib.suppress(OSError):  # removed
                _write(self.pids_folder / "pids.max", "0")  # nobody forks away
        if self.kill_folder:
            with contextlib.suppress(OSError):
                _write(self.kill_folder / "cgroup.kill", "1")
        for pid in self.pids() or ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def memory_bytes(self) -> int | None:
        """What the kernel could not take back without writing: all that is charged, less clean page cache. None: unknown."""
        if self.memory_folder is None:
            return None
        try:
            stat = _table(self.memory_folder / "memory.stat")
            if self.memory_version == 2:
                charged = int((self.memory_folder / "memory.current").read_text())
                clean = stat["file"] - stat["shmem"] - stat.get("file_dirty", 0) - stat.get("file_writeback", 0)
            else:
                charged = int((self.memory_folder / "memory.usage_in_bytes").read_text())
                clean = stat["total_cache"] - stat["total_shmem"] - stat.get("total_dirty", 0) - stat.get("total_writeback", 0)
        except (OSError, KeyError):
            return None
        return max(charged - max(clean, 0), 0)

    def oom_kills(self) -> int | None:
        """How many of its processes the kernel killed for want of memory; None: unknown."""
        if self.memory_folder is None:
            return None
        name = "memory.events" if self.memory_version == 2 else "memory.oom_control"
        try:
            return _table(self.memory_folder / name).get("oom_kill", 0)
        except OSError:
            return None

    def cpu_seconds(self) -> float | None:
        """CPU time of all its processes, past ones too; None: unknown."""
        if self.kill_folder is None:
            return None
        try:
            return _table(self.kill_folder / "cpu.stat")["usage_usec"] / 1e6
        except (OSError, KeyError):
            return None

    def remove(self) -> bool:
        """Remove the groups, whose processes were killed; false: some are left, which a later sweep removes."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        for folder in self._folders:
            while True:
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    if time.monotonic() < deadline:
                        time.sleep(0.01)
                        continue
                break
        return not any(folder.exists() for folder in self._folders)


def _table(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


class Groups:
    """The control groups of one node."""

    def __init__(self, runs_dir: Path, support: Support | None = None) -> None:
        """`runs_dir`: the folder that this node alone holds; it names the groups."""
        self.support = support or describe()
        self._node = hashlib.sha256(str(runs_dir.resolve()).encode()).hexdigest()[:16]

    def _bases(self) -> Iterator[tuple[Path, list[str]]]:
        """The folder of this node in each hierarchy, and what it is for."""
        uses: dict[Path, list[str]] = {}
        for name in WANTED:
            offer: Offer = getattr(self.support, name)
            if offer.version:
                uses.setdefault(offer.base / _TOP / self._node, []).append(f"{name}{offer.version}")
        yield from uses.items()

    def make(self, name: str, memory_bytes: int, processes: int) -> Group:
        """Groups for an attempt: at most `memory_bytes` (0: no limit) and `processes` (threads count).

        Raises:
            OSError: the machine offered them before, and does not any more.
        """
        group = Group()
        try:
            for base, uses in self._bases():
                self._add_folder(group, base, name, uses, processes)
            group.limit_memory(memory_bytes)
        except OSError:
            group.remove()
            raise
        return group

    def _add_folder(self, group: Group, base: Path, name: str, uses: list[str], processes: int) -> None:
        folder = base / name
        for _ in range(3):  # a sweep of another node may remove `base` in between, while it is empty
            try:
                folder.mkdir(parents=True, exist_ok=True)
                break
            except FileNotFoundError:
                continue
        group._folders.append(folder)
        wanted = [use[:-1] for use in uses if use in ("memory2", "pids2")]
        for parent in (base.parent, base) if wanted else ():
            if set(wanted) - _words(parent / "cgroup.subtree_control"):
                _write(parent / "cgroup.subtree_control", " ".join(f"+{use}" for use in wanted))
        if "kill2" in uses:
            group.kill_folder = folder
        if "pids1" in uses or "pids2" in uses:
            group.pids_folder = folder
            _write(folder / "pids.max", str(processes))
        for version in (1, 2):
            if f"memory{version}" in uses:
                group.memory_folder, group.memory_version = folder, version

    def sweep(self) -> int:
        """Kill and remove what an earlier life of this node left; returns how many processes that were."""
        killed = 0
        for base, uses in self._bases():
            for folder in _folders(base):
                old = Group(_folders=[folder])
                if "kill2" in uses:
                    old.kill_folder = folder
                if "pids1" in uses or "pids2" in uses:
                    old.pids_folder = folder
                killed += len(old.pids() or ())
                old.kill()
                old.remove()
            for other in _folders(base.parent):  # of nodes that are no more
                if not any(_folders(other)):
                    _drop(other)
        return killed

    def close(self) -> None:
        """Remove the groups of this node, and the platform's where this was its last."""
        for base, _ in self._bases():
            _drop(base)
            _drop(base.parent)


def _folders(group: Path) -> list[Path]:
    try:
        return [child for child in group.iterdir() if child.is_dir()]
    except FileNotFoundError:
        return []


def _limit(folder: Path, version: int, limit: int) -> None:
    """No more than `limit` bytes of memory, and none of it swapped out; beyond that the kernel kills."""
    if version == 2:
        _write(folder / "memory.max", str(limit))
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            if (folder / name).exists():
                _write(folder / name, value)
        return
    _write(folder / "memory.limit_in_bytes", str(limit))
    with contextlib.suppress(FileNotFoundError):  # kernels without swap accounting
        _write(folder / "memory.memsw.limit_in_bytes", str(limit))
