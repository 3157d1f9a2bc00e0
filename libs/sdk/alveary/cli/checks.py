"""The checks of `alveary doctor`. Each yields findings; what is fine says so in few words."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.util
import json
import locale
import os
import platform
import re
import resource
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from alveary.cli.findings import BROKEN, NOTE, OK, WARNING, Check, Finding, Patient

_GIB = 2**30
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "lustre", "glusterfs", "ceph")
# The standard library's own parts that a Python built without their headers lacks, and who needs them.
_NEEDED = {"ssl": "downloads and TLS", "sqlite3": "the platform's read models", "ctypes": "torch and the supervisor"}
_WANTED = {"lzma": "torchvision's data sets", "bz2": "archives", "readline": "interactive sessions"}


def python(_: Patient) -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", OK, f"{version} at {sys.executable}")
    if sys.platform != "linux":
        yield Finding(
            "python", BROKEN, f"the platform runs on Linux, and this is {platform.system()}", "use a Linux machine; the SDK works here"
        )
    for names, state in ((_NEEDED, BROKEN), (_WANTED, WARNING)):
        for name, why in names.items():
            try:
                importlib.import_module(name)
            except ImportError as error:
                yield Finding(
                    "python", state, f"this Python was built without {name}: {error}", f"{why} need it: install its headers and build again"
                )


def servers(_: Patient) -> Iterator[Finding]:
    missing = [n for n in ("nats-server", "weed", "uv") if not (Path(sys.executable).parent / n).exists() and not shutil.which(n)]
    if importlib.util.find_spec("alveary_core") is None or missing:
        what = ", ".join(missing) or "the services"
        yield Finding(
            "stack", NOTE, f"{what} are not installed: this machine is a client", "for `alveary up`: pip install 'alveary[local]'"
        )
    else:
        yield Finding("stack", OK, "what `alveary up` starts is installed")


def state_directory(patient: Patient) -> Iterator[Finding]:
    folder = patient.state_dir
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        yield Finding("state dir", BROKEN, f"{there} is not a directory", "choose another with --state-dir or ALVEARY_HOME")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".alveary-doctor-") as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        yield Finding(
            "state dir", BROKEN, f"nothing can be written in {there}: {error.strerror}", "choose another with --state-dir or ALVEARY_HOME"
        )
        return
    kind, options = _mount(there)
    if kind in _NETWORK:
        yield Finding("state dir", WARNING, f"{folder} is on a network file system ({kind})", "locks and databases want a local disk")
    if "noexec" in options:
        yield Finding(
            "state dir", BROKEN, f"programs cannot run from {there} (noexec)", "environments live there: choose another directory"
        )
    yield from _space("state dir", there)


def temporary(_: Patient) -> Iterator[Finding]:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        yield Finding("tmp", BROKEN, str(error), "make one writable, or set TMPDIR")
        return
    given = os.environ.get("TMPDIR")
    if given and Path(given) != folder:
        yield Finding("tmp", WARNING, f"TMPDIR={given} cannot be used; {folder} is used instead", "make it, or unset TMPDIR")
    yield from _space("tmp", folder)
    # See alveary_trainer: <sockets>/<node>/<run>-<attempt>.<share>/ranks.sock, and a socket's path may have 107 bytes.
    base = Path(os.environ.get("ALVEARY_SOCKETS_DIR") or folder / f"alveary-{os.getuid()}")
    longest = len(os.fsencode(base)) + len("/123456789012") + len(f"/{'x' * 26}-10.1023/ranks.sock")
    if longest > 107:
        yield Finding(
            "sockets", BROKEN, f"{base} is too long a path for sockets by {longest - 107} bytes", "set ALVEARY_SOCKETS_DIR to a short one"
        )
    else:
        yield Finding("sockets", OK, f"paths below {base} are short enough")


def _space(check: str, folder: Path) -> Iterator[Finding]:
    from_settings = (
        int(os.environ.get("ALVEARY_DISK_RESERVE_BYTES") or _GIB),
        float(os.environ.get("ALVEARY_DISK_RESERVE_FRACTION") or 0.05),
    )
    found = os.statvfs(folder)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    reserve = min(from_settings[0], total * from_settings[1])
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free on the disk of {folder}"
    if free < reserve:
        yield Finding(check, BROKEN, text, f"free some: with less than {reserve / _GIB:.2f} GiB nothing new is run or uploaded")
    elif found.f_files and found.f_favail < min(found.f_files * 0.02, 10_000):
        yield Finding(check, BROKEN, f"{found.f_favail} inodes are free on the disk of {folder}", "remove files: no more can be made")
    elif free < 4 * reserve:
        yield Finding(check, WARNING, text, "environments with torch take 1 to 6 GiB each")
    else:
        yield Finding(check, OK, text)


def _mount(folder: Path) -> tuple[str, list[str]]:
    """File system type and options of the mount that a folder is on."""
    best, found = "", ("", list[str]())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, kind, options, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= len(best):
                best, found = point, (kind, options.split(","))
    return found


def ports(patient: Patient) -> Iterator[Finding]:
    try:
        from alveary.local.layout import DEFAULT_PORT, Ports
        from alveary.local.stack import status
    except ImportError:
        return
    if status(patient.state_dir) is not None:
        yield Finding("ports", OK, f"a stack runs in {patient.state_dir}")
        return
    file = patient.state_dir / "stack.json"
    wanted = Ports.choose(DEFAULT_PORT)
    if file.exists():
        try:
            known = json.loads(file.read_text())["ports"]
            wanted = Ports(**{name: known.get(name, 0) for name in Ports.__dataclass_fields__})
        except (ValueError, KeyError, TypeError) as error:
            yield Finding("ports", BROKEN, f"{file} cannot be read: {error!r}", "restore it, or choose another --state-dir")
            return
    if taken := wanted.taken():
        yield Finding(
            "ports", BROKEN, f"these are taken: {', '.join(taken)}", "`alveary up --port N` takes 19 from N; `ss -ltnp` shows who has them"
        )
    else:
        yield Finding("ports", OK, f"those of a stack in {patient.state_dir} are free")


def memory(_: Patient) -> Iterator[Finding]:
    known = {k: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())}
    total, available = known["MemTotal"], known["MemAvailable"]
    text = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB are available"
    if available < _GIB // 2:
        yield Finding("memory", BROKEN, text, "end something: the platform itself needs half a GiB")
    else:
        yield Finding(
            "memory", WARNING if available < 2 * _GIB else OK, text, "a run with torch needs 1 GiB and more" if available < 2 * _GIB else ""
        )
    shm = Path("/dev/shm")
    try:
        with tempfile.NamedTemporaryFile(dir=shm):
            pass
        found = os.statvfs(shm)
    except OSError as error:
        yield Finding("/dev/shm", BROKEN, f"cannot be used: {error.strerror}", "mount a tmpfs there: data loaders share memory by it")
        return
    size = found.f_blocks * found.f_frsize
    low = size < _GIB
    text = f"{size / _GIB:.2f} GiB, {found.f_bavail * found.f_frsize / _GIB:.2f} free"
    advice = "data loaders with workers need more: in a container, start it with --shm-size=8g or --ipc=host"
    yield Finding("/dev/shm", WARNING if low else OK, text, advice if low else "")


def limits(_: Patient) -> Iterator[Finding]:
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < 1024
    yield Finding(
        "limits",
        WARNING if few else OK,
        f"{files} open files",
        f"ulimit -n {min(hard, 65536)}: each run and connection needs some" if few else "",
    )
    address, _most = resource.getrlimit(resource.RLIMIT_AS)
    if address != resource.RLIM_INFINITY:
        yield Finding(
            "limits",
            WARNING,
            f"address space is limited to {address / _GIB:.1f} GiB",
            "ulimit -v unlimited: torch and Go servers map much more than they use",
        )
    try:
        from alveary.local.groups import sentences
    except ImportError:
        return  # a client alone
    for sentence in sentences():
        used = ": cgroup v" in sentence
        advice = "" if used else "`alveary up` as root, or as a service with Delegate=yes, lets the kernel see to it"
        yield Finding("cgroups", OK if used else NOTE, sentence, advice)


def docker(_: Patient) -> Iterator[Finding]:
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not host.startswith("unix://"):
        yield Finding("docker", NOTE, f"DOCKER_HOST={host}: not looked at")
        return
    path = host.removeprefix("unix://")
    if not Path(path).exists():
        yield Finding("docker", NOTE, "there is no daemon here: `alveary up` uses virtual environments")
        return
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(path)
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            answer = connection.recv(4096)
    except PermissionError:
        yield Finding("docker", WARNING, f"{path} may not be used by {_user()}", "add the user to the group docker, and log in again")
    except OSError as error:
        yield Finding("docker", WARNING, f"{path} is there, and does not answer: {error}", "systemctl start docker")
    else:
        good = b" 200 " in answer.split(b"\r\n")[0]
        yield Finding("docker", OK if good else WARNING, "the daemon answers" if good else f"it answers {answer[:80]!r}")


def gpu(_: Patient) -> Iterator[Finding]:
    cards = []
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            if (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03"):
                cards.append(device.name)
    if not cards and not Path("/dev/nvidiactl").exists():
        yield Finding("gpu", NOTE, "no NVIDIA GPU: runs use CPUs")
        return
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        yield Finding("gpu", OK if count else WARNING, f"driver {driver}: {', '.join(names) or 'no GPU may be used'}")
    except ImportError:
        yield Finding("gpu", NOTE, f"{len(cards)} cards; pynvml is not installed, so the driver was not asked")
    except Exception as error:
        advice = "install the driver, and load it: modprobe nvidia"
        if "mismatch" in str(error).lower():
            advice = "the driver was updated while it was loaded: restart the machine"
        yield Finding("gpu", BROKEN, f"{len(cards)} NVIDIA cards, and the driver does not answer: {error}", advice)


def network(_: Patient) -> Iterator[Finding]:
    try:
        local = {info[4][0] for info in socket.getaddrinfo("localhost", None)}
        if not local <= {"127.0.0.1", "::1"}:
            yield Finding("network", BROKEN, f"localhost is {', '.join(map(str, sorted(local)))}", "give it 127.0.0.1 in /etc/hosts")
    except OSError as error:
        yield Finding("network", BROKEN, f"localhost has no address: {error}", "add '127.0.0.1 localhost' to /etc/hosts")
    name, began = socket.gethostname(), time.monotonic()
    try:
        socket.getaddrinfo(name, None)
        took = time.monotonic() - began
        if took > 1:
            yield Finding("hostname", WARNING, f"{name} takes {took:.1f} s to resolve", "add it to /etc/hosts, or repair the name server")
        else:
            yield Finding("hostname", OK, f"{name} resolves")
    except OSError as error:
        yield Finding(
            "hostname",
            WARNING,
            f"{name} has no address: {error.strerror or error}",
            f"add '127.0.1.1 {name}' to /etc/hosts: MPI and many scripts look it up",
        )
    proxies = {k: v for k in ("http_proxy", "https_proxy", "all_proxy") for v in (os.environ.get(k) or os.environ.get(k.upper()),) if v}
    for key, value in proxies.items():
        both = os.environ.get(key), os.environ.get(key.upper())
        hidden = re.sub(r"//[^@/]*@", "//...@", value)
        try:
            fine = bool(urlsplit(value).hostname) and urlsplit(value).port != 0
        except ValueError:
            fine = False
        if not fine:
            yield Finding("proxy", BROKEN, f"{key}={hidden} is not a proxy's URL", "use http://host:port")
        elif None not in both and both[0] != both[1]:
            yield Finding("proxy", WARNING, f"{key} and {key.upper()} differ", "programs read either: make them the same")
        else:
            yield Finding("proxy", NOTE, f"{key}={hidden}: runs get it too; addresses of the platform are never asked for through it")
    if proxies and "127.0.0.1" not in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""):
        yield Finding("proxy", WARNING, "no_proxy does not name 127.0.0.1", "no_proxy=localhost,127.0.0.1,... for other programs' sake")


def person(_: Patient) -> Iterator[Finding]:
    try:
        home = Path.home()
    except RuntimeError as error:
        yield Finding("home", BROKEN, str(error), "set HOME")
    else:
        writable = home.is_dir() and os.access(home, os.W_OK | os.X_OK)
        advice = "set HOME to a directory of yours; caches of pip, uv and torch go there" if not writable else ""
        yield Finding("home", OK if writable else WARNING, str(home) if writable else f"{home} is not there, or not writable", advice)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        yield Finding("user", WARNING, f"user {os.getuid()} has no name", "set USER: torch and others look it up")
    mask = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")), 8)
    if mask & 0o700:
        yield Finding("umask", BROKEN, f"{mask:04o}: new files cannot be used by their own owner", "umask 0022")
    elif mask & 0o022 != 0o022:
        yield Finding("umask", WARNING, f"{mask:04o}: others may change new files", "umask 0022")
    else:
        yield Finding("umask", OK, f"{mask:04o}")
    encoding, before = sys.getfilesystemencoding(), locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "")
    except locale.Error:
        names = ", ".join(f"{k}={os.environ[k]}" for k in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(k))
        yield Finding("locale", WARNING, f"{names}: this machine does not have that locale", "export LC_ALL=C.UTF-8")
        return
    finally:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, before)
    good = encoding.lower().replace("-", "") == "utf8"
    yield Finding("locale", OK if good else WARNING, f"file names are {encoding}", "" if good else "export LC_ALL=C.UTF-8, or PYTHONUTF8=1")


def clock(_: Patient) -> Iterator[Finding]:
    from alveary import config
    from alveary.errors import AlvearyError

    newest = Path(config.__file__).stat().st_mtime
    if time.time() < newest - 86400:
        yield Finding(
            "clock", BROKEN, f"it says {time.strftime('%Y-%m-%d %H:%M')}, before this program was installed", "set it: TLS and links fail"
        )
    try:
        known = config.load()
    except AlvearyError:
        yield Finding("platform", NOTE, "no config.json is found: `alveary up` writes one")
        return
    try:
        from alveary.workspace import Workspace
        from alveary_contracts.scheduler.v1 import scheduler_pb2 as pb

        workspace = Workspace.from_config()
        client = workspace._client
        began = time.time()
        said = workspace._call(client.call(client.stubs.nodes.GetStatus, pb.GetStatusRequest(), timeout=5))
        ahead = said.time.ToNanoseconds() / 1e9 - (began + time.time()) / 2
    except AlvearyError as error:
        yield Finding("platform", WARNING, f"it does not answer: {error}", f"{known.source} says that it is at {known.endpoint}")
        return
    yield Finding("platform", WARNING if said.trouble else OK, said.trouble or f"version {said.version} answers at {known.endpoint}")
    far = abs(ahead)
    advice = "use NTP on both: tokens and links are refused by clocks that differ" if far > 60 else ""
    state = OK if far <= 60 else WARNING if far <= 300 else BROKEN
    yield Finding("clock", state, f"the platform's is {ahead:+.1f} s from this one", advice)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user {os.getuid()}"


CHECKS: dict[str, Check] = {
    "python": python,
    "stack": servers,
    "state dir": state_directory,
    "tmp": temporary,
    "ports": ports,
    "memory": memory,
    "limits": limits,
    "docker": docker,
    "gpu": gpu,
    "network": network,
    "person": person,
    "platform": clock,
}
