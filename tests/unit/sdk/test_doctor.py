"""`alveary doctor` on machines that are not well."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alveary.cli import checks, doctor
from alveary.cli.doctor import examined
from alveary.cli.findings import BROKEN, NOTE, OK, WARNING, Finding, Patient


def run(*words: str, umask: int = 0o022, **variables: str | None) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, findings by check (the worst of each), and what was printed."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("ALVEARY_")}
    env = {k: v for k, v in (clean | variables).items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-m", "alveary.cli", "doctor", "--json", *words], env=env, capture_output=True, text=True, timeout=120, umask=umask
    )
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    order = [OK, NOTE, WARNING, BROKEN]
    found: dict[str, tuple[str, str]] = {}
    for one in told["findings"]:
        if one["check"] not in found or order.index(one["state"]) > order.index(found[one["check"]][0]):
            found[one["check"]] = (one["state"], one["text"])
    assert done.returncode == (1 if told["broken"] else 0)
    return done.returncode, found, done.stdout


def test_a_machine_where_everything_is_odd(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, found, printed = run(
        "--state-dir", str(tmp_path / "file/state"), umask=0o277, HOME=str(tmp_path / "nobody"), LC_ALL="xx_YY.UTF-8",
        http_proxy="http://user:secret@:0", HTTPS_PROXY="http://one:1", https_proxy="http://two:2", TMPDIR=str(tmp_path / "gone"),
        ALVEARY_SOCKETS_DIR=f"/{'long' * 30}", ALVEARY_CONFIG=str(tmp_path / "no-config"),
    )  # fmt: skip
    assert code == 1
    assert found["state dir"] == (BROKEN, f"{tmp_path / 'file'} is not a directory")
    assert found["umask"] == (BROKEN, "0277: new files cannot be used by their own owner")
    assert found["home"] == (WARNING, f"{tmp_path / 'nobody'} is not there, or not writable")
    assert found["locale"][0] == WARNING and "LC_ALL=xx_YY.UTF-8" in found["locale"][1]
    assert found["proxy"][0] == BROKEN and "secret" not in printed
    assert found["tmp"][0] == WARNING and str(tmp_path / "gone") in found["tmp"][1]
    assert found["sockets"][0] == BROKEN and "too long a path" in found["sockets"][1]
    assert found["platform"][0] == NOTE


def test_what_is_said_of_a_directory_and_its_ports(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        from alveary.local.layout import Layout

        layout = Layout.open(tmp_path, 0)
        known = json.loads((tmp_path / "stack.json").read_text())
        known["ports"]["nats"] = taken.getsockname()[1]
        (tmp_path / "stack.json").write_text(json.dumps(known))
        code, found, _ = run("--state-dir", str(tmp_path), ALVEARY_DISK_RESERVE_BYTES=str(10**18), ALVEARY_DISK_RESERVE_FRACTION="1.0")
    assert code == 1
    assert found["ports"][0] == BROKEN and f"{taken_port(known)} (nats)" in found["ports"][1] and layout.ports.s3
    assert found["state dir"][0] == BROKEN and "are free on the disk of" in found["state dir"][1]
    (tmp_path / "stack.json").write_text("{")
    _, found, _ = run("--state-dir", str(tmp_path))
    assert found["ports"][0] == BROKEN and "cannot be read" in found["ports"][1]


def taken_port(known: dict[str, Any]) -> int:
    return int(known["ports"]["nats"])


def states(check: Any, folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in check(Patient(folder)):
        found.setdefault(one.check, []).append(one.state)
    return found


def test_a_host_that_cannot_find_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def resolve(name: str, *_: object) -> list[Any]:
        if name == "localhost":
            return [(2, 1, 6, "", ("10.0.0.7", 0))]
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = states(checks.network, tmp_path)
    assert found["network"] == [BROKEN] and found["hostname"] == [WARNING]


def test_a_docker_socket_that_nobody_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "d.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    assert states(checks.docker, tmp_path) == {"docker": [NOTE]}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert states(checks.docker, tmp_path) == {"docker": [WARNING]}
        server.listen()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nOK")

        thread = threading.Thread(target=serve)
        thread.start()
        assert states(checks.docker, tmp_path) == {"docker": [OK]}
        thread.join(10)


def test_a_check_that_fails_or_hangs_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_PATIENCE", 0.05)
    over = threading.Event()

    def hangs(_: Patient) -> Iterator[Finding]:
        over.wait(60)
        yield Finding("x", OK, "")

    def fails(_: Patient) -> Iterator[Finding]:
        yield Finding("x", OK, "")
        raise OSError("odd")

    (late,) = examined("mount", hangs, Patient(tmp_path))
    over.set()
    assert (late.check, late.state) == ("mount", BROKEN)
    (odd,) = examined("x", fails, Patient(tmp_path))
    assert (odd.state, odd.text) == (WARNING, "it could not be looked at: OSError: odd")


def test_a_network_mount_without_the_right_to_run_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "_mount", lambda folder: ("nfs4", ["rw", "noexec"]))
    assert {WARNING, BROKEN} <= set(states(checks.state_directory, tmp_path / "new" / "er")["state dir"])


def test_time_before_the_program_was_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setenv("ALVEARY_CONFIG", str(tmp_path / "none"))
    assert states(checks.clock, tmp_path)["clock"] == [BROKEN]
