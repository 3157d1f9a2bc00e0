"""A root file system of this image's Python, a virtual environment, and nothing else: `python3 deploy/rootfs.py VENV TO`.

What the final image is made of: no shell, no package manager, no tools of the system that nobody calls, so that there
is little to download, to update and to break out with.
"""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

# Of Python's own library: what no service imports.
_UNUSED = (
    "test",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
    "site-packages",
    "dist-packages",
)
_PIP = ("/etc/pip.conf", "/etc/xdg/pip/pip.conf")
_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/openssl.cnf", "/usr/lib/ssl/openssl.cnf", "/etc/nsswitch.conf", "/etc/mime.types",
          # Where this image was told which package index to use, its services are to know as well.
          *_PIP)  # fmt: skip
_ELF = b"\x7fELF"


def copy(source: Path, root: Path) -> None:
    """A file under its own path, and, where its path goes over links, what they lead to."""
    for folder in reversed(source.parents):
        place = root / folder.relative_to("/")
        if folder.is_symlink() and not place.is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(folder.readlink())
            (root / folder.resolve().relative_to("/")).mkdir(parents=True, exist_ok=True)
    place = root / source.relative_to("/")
    if place.exists() or place.is_symlink():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        place.symlink_to(source.readlink())
        copy(Path(os.path.normpath(source.parent / source.readlink())), root)
    else:
        shutil.copy2(source, place)


def binaries(folder: Path) -> list[Path]:
    """Programs and libraries of the machine's own format."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == _ELF:
                    found.append(path)
    return found


def libraries(programs: list[Path]) -> set[Path]:
    """Shared libraries that they load, the loader among them, as the loader itself says."""
    found: set[Path] = set()
    for begin in range(0, len(programs), 50):
        said = subprocess.run(["ldd", *map(str, programs[begin : begin + 50])], capture_output=True, text=True).stdout
        for word in said.split():
            if word.startswith("/") and not word.endswith(":") and Path(word).exists():
                found.add(Path(word))
    return found


def main(venv: Path, root: Path) -> None:
    """Lay it out."""
    python = (venv / "bin/python").resolve()
    shutil.copytree(venv, root / venv.relative_to("/"), symlinks=True)
    for link in (venv / "bin").glob("python*"):
        copy(Path(os.path.normpath(link.parent / link.readlink())), root)
    library = Path(os.__file__).parent
    target = root / library.relative_to("/")
    shutil.copytree(library, target, symlinks=False, ignore=lambda _, names: {n for n in names if n in _UNUSED or n.startswith("config-3")})
    for name in _FILES:
        if Path(name).exists():
            copy(Path(name), root)
    # Constraints and certificates that those settings name.
    for name in filter(os.path.exists, _PIP):
        for word in Path(name).read_text().replace("=", " ").replace("file://", " ").split():
            if word.startswith("/") and Path(word).is_file():
                copy(Path(word), root)
    for path in libraries([python, *binaries(library), *binaries(venv)]):
        copy(path, root)
    # Found by name while running: the resolver's parts on older systems, and threads that are cancelled.
    folder = Path(next(iter(p for p in libraries([python]) if p.name.startswith("libc.so")))).parent
    for name in ("libnss_dns.so.2", "libnss_files.so.2", "libgcc_s.so.1"):
        if (folder / name).exists():
            copy(folder / name, root)
    if subprocess.run(["ldconfig", "-r", str(root)]).returncode:
        raise SystemExit("the loader's cache cannot be made")
    etc = root / "etc"
    etc.mkdir(exist_ok=True)
    home = "/var/lib/alveary"
    (etc / "passwd").write_text(f"root:x:0:0::/:/nonexistent\nalveary:x:10001:10001::{home}:/nonexistent\n")
    (etc / "group").write_text("root:x:0:\nalveary:x:10001:\n")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(stat.S_ISVTX | 0o777)
    (root / "run").mkdir(exist_ok=True)
    (root / home[1:]).mkdir(parents=True)
    os.chown(root / home[1:], 10001, 10001)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
