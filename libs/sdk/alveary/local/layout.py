"""Where an embedded stack keeps things: ports, secrets, files."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from alveary.errors import AlvearyError
from alveary_core.access import WRITES, nats_users

DEFAULT_PORT = 7460
SERVICES = ("runs", "images", "scheduler", "logs", "registry", "archiver")
# Of the files below a state directory. Raise it with any change that an earlier or later version would misread.
STATE_FORMAT = 1
_WEED = ("master", "volume", "filer", "s3")


@dataclass(frozen=True)
class Ports:
    """Ports of one stack, all on 127.0.0.1."""

    grpc: int
    nats: int
    master: int
    volume: int
    filer: int
    s3: int
    master_grpc: int
    volume_grpc: int
    filer_grpc: int
    s3_grpc: int
    admin: int
    admin_grpc: int
    # One each, for a stack whose services are processes of their own.
    runs: int
    images: int
    scheduler: int
    logs: int
    registry: int
    archiver: int
    # Where other machines reach the object store: it refuses to start where anybody listens on its own port, on any address.
    s3_outside: int

    @classmethod
    def choose(cls, base: int) -> Ports:
        """Consecutive ports from `base`; 0: whatever is free."""
        names = list(cls.__dataclass_fields__)
        if base:
            return cls(**{name: base + i for i, name in enumerate(names)})
        held = [socket.socket() for _ in names]
        try:
            for one in held:
                one.bind(("127.0.0.1", 0))
            return cls(**{name: one.getsockname()[1] for name, one in zip(names, held, strict=True)})
        finally:
            for one in held:
                one.close()

    def taken(self) -> list[str]:
        """Those that somebody listens on, with their names."""
        found = []
        for name, port in asdict(self).items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    found.append(f"{port} ({name})")
        return found


@dataclass(frozen=True)
class Layout:
    """One stack's directory."""

    state_dir: Path
    ports: Ports
    secrets: dict[str, str]
    lease_seconds: float = 30.0
    beat_seconds: float = 1.0
    separate: bool = False
    metrics_port: int = 0
    runtime: str = "process"
    # This machine's address on a network; empty: the stack is reached from this machine alone.
    bind: str = ""

    @classmethod
    def open(
        cls, state_dir: Path, port: int | None, *, lease_seconds: float = 30.0, beat_seconds: float = 1.0, separate: bool = False,
        metrics_port: int = 0, runtime: str = "", bind: str | None = None,
    ) -> Layout:  # fmt: skip
        """Read or make the directory; ports, secrets and (unless given) runtime and `bind` stay what they were.

        Raises:
            AlvearyError: what is there cannot be read, or an earlier or later version of Alveary wrote it.
        """
        state_dir = state_dir.resolve()
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = state_dir / "stack.json"
        try:
            known = json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise AlvearyError(f"{file} cannot be read ({error}): is {state_dir} a stack's directory?", "DATA_LOSS") from error
        if file.exists():
            _check_format(state_dir, known.get("format", 0))
        if port is None and "ports" in known:
            fresh = asdict(Ports.choose(0))
            # A directory of an earlier version may know fewer.
            ports = Ports(**{name: known["ports"].get(name, fresh[name]) for name in fresh})
        else:
            ports = Ports.choose(DEFAULT_PORT if port is None else port)
        names = [*WRITES, "subscriber", "s3_access", "s3_secret", "tokens"]
        made = known.get("secrets", {})
        hidden = {name: made.get(name) or secrets.token_hex(24) for name in names}
        runtime = runtime or known.get("runtime", "process")
        bind = known.get("bind", "") if bind is None else bind
        state = {"format": STATE_FORMAT, "ports": asdict(ports), "secrets": hidden, "runtime": runtime, "bind": bind}
        write_private(file, json.dumps(state, indent=1))
        return cls(state_dir, ports, hidden, lease_seconds, beat_seconds, separate, metrics_port, runtime, bind)

    @property
    def outside(self) -> dict[int, int]:
        """Ports that other machines need (gRPC, the message bus, the object store's S3), and those of this machine behind them."""
        services = [getattr(self.ports, name) for name in SERVICES] if self.separate else [self.ports.grpc]
        return {port: port for port in (*services, self.ports.nats)} | {self.ports.s3_outside: self.ports.s3}

    def joining(self) -> dict[str, str]:
        """ALVEARY_* variables by which the services tell those who join where they are."""
        host, s3 = self.bind or "127.0.0.1", self.ports.s3_outside if self.bind else self.ports.s3
        scheduler, runs, registry = (f"{host}:{self.endpoint_of(s).rpartition(':')[2]}" for s in ("scheduler", "runs", "registry"))
        return {
            "ALVEARY_JOIN_ENDPOINT": scheduler, "ALVEARY_JOIN_RUNS_ENDPOINT": runs, "ALVEARY_JOIN_REGISTRY_ENDPOINT": registry,
            "ALVEARY_JOIN_NATS_URL": f"nats://{host}:{self.ports.nats}", "ALVEARY_JOIN_S3_ENDPOINT": f"{host}:{s3}",
            # Links to files must be good there as well as here.
            "ALVEARY_S3_PUBLIC_ENDPOINT": f"{host}:{s3}",
        }  # fmt: skip

    @property
    def endpoint(self) -> str:
        """Where clients go."""
        return f"127.0.0.1:{self.ports.runs if self.separate else self.ports.grpc}"

    def endpoint_of(self, service: str) -> str:
        """Where one service is."""
        return f"127.0.0.1:{getattr(self.ports, service)}" if self.separate else self.endpoint

    def nats_config(self) -> str:
        """nats-server.conf: a user per service that may write its own subjects alone."""
        return f"""# Written by `alveary up`.
listen: 127.0.0.1:{self.ports.nats}
server_name: alveary
max_payload: 8MB
# An acknowledged event survives kill -9 of every process and a power cut: each write is flushed before its answer.
jetstream {{ store_dir: "{self.state_dir / "nats"}", sync_interval: always
  # Streams with a limit reserve it; without this, a disk with less room than that would refuse them.
  max_file_store: 1TB }}
{nats_users(self.secrets)}"""

    def environment(self, service: str) -> dict[str, str]:
        """ALVEARY_* variables of a service."""
        return {
            "ALVEARY_NATS_URL": f"nats://127.0.0.1:{self.ports.nats}", "ALVEARY_NATS_USER": service,
            "ALVEARY_NATS_PASSWORD": self.secrets[service], "ALVEARY_S3_ENDPOINT": f"127.0.0.1:{self.ports.s3}",
            "ALVEARY_S3_ACCESS_KEY": self.secrets["s3_access"], "ALVEARY_S3_SECRET_KEY": self.secrets["s3_secret"],
            "ALVEARY_TOKEN_SECRET": self.secrets["tokens"], "ALVEARY_STATE_DIR": str(self.state_dir / "services"),
            "ALVEARY_LEASE_SECONDS": str(self.lease_seconds), "ALVEARY_BEAT_SECONDS": str(self.beat_seconds),
            "ALVEARY_LISTEN": self.endpoint_of(service) if service in SERVICES else "127.0.0.1:0",
            "ALVEARY_BUILDER": "docker" if self.runtime == "docker" else "venv",
            "ALVEARY_METRICS_PORT": str(self._metrics_port_of(service)), **self.joining(),
        }  # fmt: skip

    def _metrics_port_of(self, service: str) -> int:
        if not self.metrics_port or service not in SERVICES:
            return 0
        return self.metrics_port + (SERVICES.index(service) if self.separate else 0)

    def weed_command(self, binary: str) -> list[str]:
        """The object store's command line."""
        p = self.ports
        logs = self.state_dir / "logs"
        command = [
            # Its files would otherwise go to the temporary directory, and grow to gigabytes.
            binary, f"-logdir={logs}", "-alsologtostderr=false", "-log_max_size_mb=16", "-log_max_files=2",
            "mini", f"-dir={self.state_dir / 'objects'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false",
            "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
            # It would report to its makers.
            "-master.telemetry=false", f"-admin.port={p.admin}", f"-admin.port.grpc={p.admin_grpc}",
        ]  # fmt: skip
        for name in _WEED:
            command += [f"-{name}.port={getattr(p, name)}", f"-{name}.port.grpc={getattr(p, name + '_grpc')}"]
        return command

    def client_config(self, token: str, *, outside: bool = False) -> str:
        """config.json for clients on this machine, or on others."""
        host = self.bind if outside else "127.0.0.1"
        config: dict[str, object] = {
            "endpoint": self.endpoint.replace("127.0.0.1", host), "token": token, "workspace": "default",
            "nats_url": f"nats://{host}:{self.ports.nats}", "nats_user": "subscriber", "nats_password": self.secrets["subscriber"],
        }  # fmt: skip
        if self.separate:
            config["endpoints"] = {s: self.endpoint_of(s).replace("127.0.0.1", host) for s in SERVICES}
        return json.dumps(config, indent=1) + "\n"


def _check_format(state_dir: Path, found: object) -> None:
    """Refuse a state directory of another format.

    Raises:
        AlvearyError: an earlier or a later version of Alveary wrote it.
    """
    if found == STATE_FORMAT:
        return
    later = isinstance(found, int) and found > STATE_FORMAT
    do = "install the later version that wrote it" if later else "an earlier version wrote it; run that version"
    raise AlvearyError(
        f"the state directory {state_dir} has format {found}, and this version of Alveary reads format {STATE_FORMAT}: "
        f"{do}, or choose another --state-dir",
        "FAILED_PRECONDITION",
    )


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner may read; whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)
        part.rename(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
