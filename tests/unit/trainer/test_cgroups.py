"""Which control groups are found on machines of all kinds, and what is said where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from alveary_trainer.adapters import cgroups
from alveary_trainer.adapters.cgroups import Groups, describe


def tables(folder: Path, mounts: list[tuple[str, Path, str, str]], own: str) -> tuple[Path, Path]:
    """mountinfo and cgroup of a process; mounts are (root, point, type, options)."""
    info, membership = folder / "mountinfo", folder / "cgroup"
    info.write_text("".join(f"30 23 0:26 {root} {point} rw,nosuid - {kind} cgroup {options}\n" for root, point, kind, options in mounts))
    membership.write_text(own)
    return info, membership


def test_none_at_all(tmp_path: Path) -> None:
    found = cgroups._find(*tables(tmp_path, [], "0::/\n"))
    assert [getattr(found, name).version for name in cgroups.WANTED] == [0, 0, 0]
    kill, memory, pids = found.sentences()
    assert "one by one" in kill and "proportional set size" in memory and pids.endswith("no control groups are mounted")


def test_groups_that_may_not_be_made_are_done_without(tmp_path: Path) -> None:
    # A folder whose new folders have no cgroup.procs: as one that is mounted read-only, nobody can be put into it.
    point = tmp_path / "unified"
    (point / "user.slice/session").mkdir(parents=True)
    found = cgroups._find(*tables(tmp_path, [("/", point, "cgroup2", "rw")], "0::/user.slice/session\n"))
    assert not (found.kill.version or found.memory.version or found.pids.version)
    assert str(point / "user.slice/session") in found.kill.why_not and "Permission denied" in found.kill.why_not
    assert not list(point.rglob("alveary")), "what was tried is left behind"


class Kernel:
    """Enough of cgroup2 for a folder: new groups have files, those that their parent enables have controllers."""

    def __init__(self, point: Path, monkeypatch: pytest.MonkeyPatch, busy: tuple[str, ...] = ()) -> None:
        self.point, self.busy = point, busy
        mkdir, write = Path.mkdir, cgroups._write

        def made(path: Path, *arguments: object, **options: object) -> None:
            mkdir(path, *arguments, **options)  # type: ignore[arg-type]
            if path.is_relative_to(point):
                self.fill(path)

        def wrote(path: Path, text: str) -> None:
            if path.name == "cgroup.subtree_control" and path.parent.relative_to(point).as_posix() in self.busy:
                raise OSError(16, "Device or resource busy")
            write(path, " ".join(sorted(word.removeprefix("+") for word in text.split())))
            for child in (c for c in path.parent.iterdir() if c.is_dir()):
                self.fill(child)

        monkeypatch.setattr(Path, "mkdir", made)
        monkeypatch.setattr(cgroups, "_write", wrote)
        monkeypatch.setattr(Path, "rmdir", lambda path: [child.unlink() for child in path.iterdir()] and None)

    def fill(self, path: Path, controllers: str = "") -> None:
        parent = path.parent / "cgroup.subtree_control"
        controllers = controllers or (parent.read_text() if parent.exists() else "")
        for name, text in {"procs": "", "kill": "", "subtree_control": "", "controllers": controllers, "type": "domain"}.items():
            file = path / f"cgroup.{name}"
            if not file.exists() or name == "controllers":
                file.write_text(text)


def test_a_delegated_unit_has_everything_and_a_shared_session_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = tmp_path / "unified"
    unit = point / "system.slice/alveary.service"
    kernel = Kernel(point, monkeypatch)
    unit.mkdir(parents=True)
    kernel.fill(unit, "cpu memory pids")
    given = tables(tmp_path, [("/", point, "cgroup2", "rw")], "0::/system.slice/alveary.service\n")
    found = cgroups._find(*given)
    assert [(o.version, o.base) for o in (found.kill, found.memory, found.pids)] == [(2, unit)] * 3
    assert (unit / "cgroup.subtree_control").read_text() == "memory pids"
    (unit / "cgroup.subtree_control").write_text("")
    kernel.busy = ("system.slice/alveary.service",)
    shared = cgroups._find(*given)
    assert shared.kill.version == 2 and not shared.memory.version
    assert "holds processes: start the trainer as a systemd unit with Delegate=yes" in shared.memory.why_not


def test_each_controller_is_taken_where_it_is(tmp_path: Path) -> None:
    mounts = [
        ("/", Path("/sys/fs/cgroup/memory"), "cgroup", "rw,memory"), ("/docker/x", Path("/sys/fs/cgroup/pids"), "cgroup", "rw,pids"),
        ("/", Path("/sys/fs/cgroup/cpu"), "cgroup", "rw,cpu,cpuacct"), ("/", Path("/sys/fs/cgroup/unified"), "cgroup2", "rw"),
    ]  # fmt: skip
    info, own = tables(tmp_path, mounts, "4:memory:/a/b\n3:pids:/docker/x/y\n2:cpu,cpuacct:/\n0::/c\n")
    assert cgroups._mounts(info.read_text()) == {
        "memory": ("/", Path("/sys/fs/cgroup/memory")), "pids": ("/docker/x", Path("/sys/fs/cgroup/pids")),
        "": ("/", Path("/sys/fs/cgroup/unified")),
    }  # fmt: skip
    assert cgroups._own(own.read_text())["memory"] == "/a/b"
    assert cgroups._upwards(("/", tmp_path), "/nowhere/to/be/seen") == [tmp_path]
    (tmp_path / "y").mkdir()
    assert cgroups._upwards(("/docker/x", tmp_path), "/docker/x/y") == [tmp_path / "y", tmp_path]


def test_groups_are_made_limited_swept_and_removed(tmp_path: Path) -> None:
    support = describe()
    if not (support.kill.version and support.pids.version):
        pytest.skip("; ".join(support.sentences()))
    groups = Groups(tmp_path, support)
    group = groups.make("r-1", 64 << 20, 10)
    assert group.pids() == [] and group.oom_kills() in (0, None) and group.cpu_seconds() == 0.0
    assert group.pids_folder is not None and (group.pids_folder / "pids.max").read_text().strip() == "10"
    groups.make("r-2", 0, 10)
    assert Groups(tmp_path, support).sweep() == 0 and not any(folder.exists() for folder in group._folders)
    groups.close()
    assert not any(base.exists() for base, _ in groups._bases())
