"""Writes what docker-compose.yml needs: .env and deploy/secrets/, with random values, readable by their owner alone.

Run again it keeps what is there and adds what is missing, so it may follow an upgrade. `--host NAME` is the name by
which clients reach the platform (default localhost); it is in the certificate. `--bind ADDRESS` is where the door and the
message bus listen (default 127.0.0.1).
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import secrets
from pathlib import Path

import bcrypt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from alveary_core.access import BUCKETS, WRITES, nats_users, weed_identities
from alveary_core.auth import Principal, issue

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "secrets"
YEARS = 5


def write(file: Path, text: str | bytes) -> None:
    """Whole or not at all, mode 0600."""
    part = file.with_name(f".{file.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(text if isinstance(text, bytes) else text.encode())
    part.rename(file)


def settings(host: str, bind: str, trainers: Path) -> dict[str, str]:
    """All variables of .env; those that are there stay, but for what was asked for by `bind`.

    Raises:
        ValueError: the host is another one than that of the certificate.
    """
    file = ROOT / ".env"
    known = (
        dict(line.split("=", 1) for line in file.read_text().splitlines() if "=" in line and not line.startswith("#"))
        if file.exists()
        else {}
    )
    socket = Path(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://"))
    group = socket.stat().st_gid if socket.is_socket() else 0
    wanted = {
        "PUBLIC_HOST": host or "localhost", "DOOR_PORT": "7461", "NATS_PORT": "7462", "REGISTRY_PORT": "7463", "DOCKER_SOCKET": str(socket),
        "DOCKER_GID": str(group), "ALVEARY_TRAINER_DIR": str(trainers), "TOKEN_SECRET": secrets.token_hex(32),
        "S3_ROOT_ACCESS": "alveary-root", "S3_ROOT_SECRET": secrets.token_hex(24), "REGISTRY_USER": "alveary",
        "REGISTRY_PASSWORD": secrets.token_hex(24), "GRAFANA_PASSWORD": secrets.token_hex(12),
    }  # fmt: skip
    for service in (*WRITES, "subscriber"):
        wanted[f"NATS_{service.upper()}"] = secrets.token_hex(24)
    for service in BUCKETS:
        wanted |= {f"S3_ACCESS_{service.upper()}": f"alveary-{service}", f"S3_SECRET_{service.upper()}": secrets.token_hex(24)}
    found = wanted | known | ({"DOOR_BIND": bind, "NATS_BIND": bind} if bind else {})
    if host and host != found["PUBLIC_HOST"]:
        raise ValueError(
            f"--host {host}: this installation is {found['PUBLIC_HOST']}, and its certificate says so; to rename it, remove "
            "PUBLIC_HOST from .env, and tls.crt, tls.key and ca.crt from deploy/secrets"
        )
    found["NODE_TOKEN"] = known.get("NODE_TOKEN") or issue(found["TOKEN_SECRET"], Principal("node", "default", "writer"))
    lines = [f"{name}={value}" for name, value in sorted(found.items())]
    write(file, "# Written by `make compose-init`. Secrets: never commit it.\n" + "\n".join(lines) + "\n")
    return found


def certificate(host: str) -> None:
    """An authority of this installation's own, and the ingress's certificate; not if there is another one already."""
    if (FOLDER / "tls.crt").exists():
        return
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        names.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        names += [x509.DNSName(host)] if host != "localhost" else []

    def make(
        subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, authority: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=365 * YEARS))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(signer, hashes.SHA256())

    root, door = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = make("Alveary", "Alveary", root, root, True)
    write(FOLDER / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    write(FOLDER / "tls.key", door.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    write(FOLDER / "tls.crt", make(host, "Alveary", door, root, False).public_bytes(serialization.Encoding.PEM))


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="")
    parser.add_argument("--bind", default="", help="address that the door and the message bus listen at; 0.0.0.0: all")
    parser.add_argument(
        "--trainers", type=Path, default=Path("/var/lib/alveary"), help="folder of trainers, the same on the host and inside"
    )
    asked = parser.parse_args()
    if len(str(asked.trainers)) > 45:
        parser.error(f"--trainers {asked.trainers}: too long, sockets below it would not fit (45 characters)")
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    try:
        env = settings(asked.host, asked.bind, asked.trainers)
    except ValueError as error:
        parser.error(str(error))
    certificate(env["PUBLIC_HOST"])
    passwords = {name: env[f"NATS_{name.upper()}"] for name in (*WRITES, "subscriber")}
    write(
        FOLDER / "nats.conf",
        "# Written by `make compose-init`.\nlisten: 0.0.0.0:4222\nhttp: 0.0.0.0:8222\nserver_name: alveary\nmax_payload: 8MB\n"
        # Services inside speak unencrypted, and wait that long for the server to see that they do; those outside begin with
        # TLS, and have that long for their first bytes to come.
        'tls { cert_file: "/etc/nats/tls.crt", key_file: "/etc/nats/tls.key", handshake_first: "300ms" }\nallow_non_tls: true\n'
        'jetstream { store_dir: "/data", sync_interval: always, max_file_store: 1TB }\n' + nats_users(passwords),
    )
    keys = {s: (env[f"S3_ACCESS_{s.upper()}"], env[f"S3_SECRET_{s.upper()}"]) for s in BUCKETS}
    write(FOLDER / "s3.json", weed_identities(keys, (env["S3_ROOT_ACCESS"], env["S3_ROOT_SECRET"])))
    hashed = bcrypt.hashpw(env["REGISTRY_PASSWORD"].encode(), bcrypt.gensalt()).decode()
    write(FOLDER / "htpasswd", f"{env['REGISTRY_USER']}:{hashed}\n")
    scheme = "nats" if env["PUBLIC_HOST"] in ("localhost", "127.0.0.1") else "tls"
    config = {
        "endpoint": f"{env['PUBLIC_HOST']}:{env['DOOR_PORT']}", "tls": True,
        "ca": (FOLDER / "ca.crt").read_text() if (FOLDER / "ca.crt").exists() else "",
        "token": issue(env["TOKEN_SECRET"], Principal("owner", "default", "owner")), "workspace": "default",
        "nats_url": f"{scheme}://{env['PUBLIC_HOST']}:{env['NATS_PORT']}", "nats_user": "subscriber", "nats_password": env["NATS_SUBSCRIBER"],
    }  # fmt: skip
    write(FOLDER / "config.json", json.dumps(config, indent=1) + "\n")
    print(f"wrote .env and {FOLDER.relative_to(ROOT)}/; clients use {FOLDER.relative_to(ROOT)}/config.json")


if __name__ == "__main__":
    main()
