"""The message bus as `make compose-init` sets it up: TLS from the first byte for those outside, and nothing unencrypted in its stead."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3

from alveary.local.layout import Ports
from alveary_core.errors import Unavailable
from alveary_core.eventlog import connect
from alveary_core.objectstore import ObjectStore

ROOT = Path(__file__).parents[2]


@dataclass
class Bus:
    """A server, and what `make compose-init` wrote for it."""

    port: int
    monitor: int
    password: str
    ca: Path

    def encrypted(self, name: str) -> bool:
        """As the server sees the connection of that name."""
        found = json.loads(urllib3.request("GET", f"http://127.0.0.1:{self.monitor}/connz", timeout=5.0).data)["connections"]
        (one,) = [c for c in found if c.get("name") == name]
        return "tls_version" in one


def init(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "tools/compose_init.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installation")
    for name in ("tools", "deploy"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "tools/compose_init.py", folder / "tools")
    assert init(folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def bus(installation: Path) -> Iterator[Bus]:
    folder, ports = installation, Ports.choose(0)
    config = (folder / "deploy/secrets/nats.conf").read_text()
    for there, here in {
        "/etc/nats": str(folder / "deploy/secrets"), '"/data"': f'"{folder}/data"', "0.0.0.0:4222": f"127.0.0.1:{ports.nats}",
        "0.0.0.0:8222": f"127.0.0.1:{ports.grpc}",
    }.items():  # fmt: skip
        assert there in config
        config = config.replace(there, here)
    (folder / "nats.conf").write_text(config)
    pairs = dict(line.split("=", 1) for line in (folder / ".env").read_text().splitlines() if not line.startswith("#"))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server", "-c", str(folder / "nats.conf")], stdout=log, stderr=log)  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while b"Server is ready" not in (folder / "log").read_bytes():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield Bus(ports.nats, ports.grpc, pairs["NATS_TRAINER"], folder / "deploy/secrets/ca.crt")
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize(("scheme", "encrypted"), [("nats", False), ("tls", True)])
async def test_those_outside_are_encrypted_and_those_inside_need_not_be(bus: Bus, scheme: str, encrypted: bool) -> None:
    connection = await connect(f"{scheme}://localhost:{bus.port}", "trainer", bus.password, f"a {scheme}", ca=bus.ca)
    try:
        assert (await connection.jetstream().account_info()).streams == 0
        assert bus.encrypted(f"a {scheme}") is encrypted
    finally:
        await connection.close()


async def test_a_server_that_nobody_vouches_for_is_refused_at_once(bus: Bus) -> None:
    with pytest.raises(Unavailable, match=r"cannot show that it is the one \(.*CERTIFICATE_VERIFY_FAILED.*\): is ALVEARY_CA its authority"):
        await connect(f"tls://localhost:{bus.port}", "trainer", bus.password, "x", patience=600)
    with pytest.raises(Unavailable, match="cannot show that it is the one .*0.0.0.0"):
        await connect(f"tls://0.0.0.0:{bus.port}", "trainer", bus.password, "x", patience=600, ca=bus.ca)


async def test_no_password_is_sent_to_a_server_without_tls(bus: Bus, tmp_path: Path) -> None:
    """nats-py alone would go on unencrypted."""
    config = tmp_path / "plain.conf"
    port = Ports.choose(0).nats
    config.write_text(
        f'listen: 127.0.0.1:{port}\nlog_file: "{tmp_path}/log"\ntrace: true\nauthorization {{user: trainer, password: "p"}}\n'
    )
    server = subprocess.Popen([str(Path(sys.executable).parent / "nats-server"), "-c", str(config)])
    try:
        with pytest.raises(Unavailable, match="does not answer within 2 s"):
            await connect(f"tls://127.0.0.1:{port}", "trainer", "p", "x", patience=2, ca=bus.ca)
        assert "CONNECT" not in (tmp_path / "log").read_text()
    finally:
        server.terminate()
        server.wait(30)


async def test_a_certificate_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("nothing")
    with pytest.raises(OSError, match="NO_CERTIFICATE"):
        ObjectStore("127.0.0.1:1", "a", "b", secure=True, ca=tmp_path / "ca.crt")


def test_the_name_is_the_certificates_and_where_it_listens_may_change(installation: Path) -> None:
    other = init(installation, "--host", "hive.example.com")
    assert other.returncode == 2 and "this installation is localhost, and its certificate says so" in other.stderr
    before = (installation / ".env").read_text()
    assert init(installation, "--host", "localhost", "--bind", "10.0.0.5").returncode == 0
    after = (installation / ".env").read_text()
    assert {*after.splitlines()} - {*before.splitlines()} == {"DOOR_BIND=10.0.0.5", "NATS_BIND=10.0.0.5"}
    assert init(installation).returncode == 0 and (installation / ".env").read_text() == after
    assert json.loads((installation / "deploy/secrets/config.json").read_text())["nats_url"].startswith("nats://localhost:")
