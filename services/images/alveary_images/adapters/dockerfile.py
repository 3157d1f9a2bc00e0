"""The Dockerfile of an environment. Pure: text in, text out.

What changes least comes first: the base, Debian's packages, conda's, pip's, variables. Installing happens in a stage
of its own that sees the machine's package indexes and their credentials; the final image gets the result alone, so no
secret and no tool of the build is in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from alveary_contracts.common.v1 import common_pb2 as c

ENV, CONDA = "/opt/env", "/opt/conda"
LABEL, BUILD, STAGE = "org.alveary.environment", "org.alveary.build", "org.alveary.stage"
_APT = re.compile(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*(@sha256:[0-9a-f]{64})?")


def faults(environment: c.Environment) -> list[str]:
    """What cannot be built, in sentences."""
    found = [f"apt package {p[:80]!r}: use NAME or NAME=VERSION" for p in environment.apt_packages if not _APT.fullmatch(p)]
    for name in ("base_image", "image"):
        value = getattr(environment, name)
        if value and not _REFERENCE.fullmatch(value):
            found.append(f"{name} {value[:80]!r} is no image reference")
    sources = [name for name in ("dockerfile", "image", "base_image") if getattr(environment, name)]
    if len(sources) > 1:
        found.append(f"{' and '.join(sources)} exclude each other: say one of them")
    extra = [name for name in ("pip_packages", "conda_packages", "apt_packages") if getattr(environment, name)]
    if extra and (environment.dockerfile or environment.image):
        found.append(f"{', '.join(extra)} cannot be added to a {sources[0]} of your own: put them into it, or use base_image")
    return found


def quoted(value: str) -> str:
    """A value for ENV and LABEL, taken literally."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$").replace("\n", "\\n")
    return f'"{escaped}"'


def dockerfile(environment: c.Environment, digest: str, base: str, python: str, *, pip: bool, extra_apt: Sequence[str] = ()) -> str:
    """The text for an environment without a Dockerfile of its own.

    The context holds uv, env.sh (the machine's indexes), lock.txt and wheels/ where `pip` is set, and conda/ (a ready
    prefix) where conda packages were asked for.
    """
    conda = bool(environment.conda_packages)
    lines = [f"FROM {base} AS system"]
    apt = sorted({*environment.apt_packages, *extra_apt})
    if apt:
        packages = " ".join(apt)
        lines.append(
            "RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "
            f"{packages} && rm -rf /var/lib/apt/lists/*"
        )
    if conda:
        lines.append(f"COPY conda/ {CONDA}/")
    lines += ["FROM system AS build", f"LABEL {STAGE}={quoted(digest)}", "COPY uv /usr/local/bin/uv"]
    interpreter = f"{CONDA}/bin/python" if conda and any(name_of(p) == "python" for p in environment.conda_packages) else python
    site = " --system-site-packages" if environment.base_image or interpreter.startswith(CONDA) else ""
    venv = f"UV_PYTHON_DOWNLOADS=never uv venv --quiet{site} --python {interpreter} {ENV}"
    if pip:
        lines.append("COPY env.sh ca.pem lock.txt /build/")
        lines.append("COPY wheels/ /build/wheels/")
        install = f"uv pip install --no-cache --python {ENV}/bin/python --require-hashes --no-deps -r /build/lock.txt"
        lines.append(f"RUN {venv} && . /build/env.sh && {install}")
    else:
        lines.append(f"RUN {venv}")
    lines += ["FROM system", f"COPY --from=build {ENV} {ENV}"]
    path = f"{ENV}/bin:{CONDA}/bin" if conda else f"{ENV}/bin"
    lines.append(f"ENV PATH={path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    lines += [f"ENV {name}={quoted(value)}" for name, value in sorted(environment.environment_variables.items())]
    lines.append(f"LABEL {LABEL}={quoted(digest)}")
    return "\n".join(lines) + "\n"


def name_of(spec: str) -> str:
    """Name of a conda match spec."""
    found = re.match(r"\s*(?:[^\s:]+::)?([A-Za-z0-9_.-]+?)(?=[\s=<>!~]|$)", spec)
    return found[1].lower() if found else ""
