"""The Dockerfile's text: order of layers, quoting, refusals. And Horovod's place in a lock."""

from __future__ import annotations

import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_images.adapters import horovod
from alveary_images.adapters.docker import bases
from alveary_images.adapters.dockerfile import dockerfile, faults, name_of, quoted
from alveary_images.adapters.resolve import BuildFailed


def test_what_changes_least_comes_first_and_secrets_stay_in_the_build_stage() -> None:
    environment = c.Environment(
        pip_packages=["six"], apt_packages=["zlib1g", "hello"], conda_packages=["gdal"], environment_variables={"B": "2", "A": "$x"}
    )
    text = dockerfile(environment, "d" * 64, "base:1", "python3.11", pip=True, extra_apt=["openmpi-bin"])
    order = ["FROM base:1 AS system", "apt-get install", "COPY conda/", "FROM system AS build", "COPY uv", "lock.txt", "FROM system\n",
             "COPY --from=build /opt/env", "ENV PATH", "ENV A=", "ENV B=", "LABEL org.alveary.environment"]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "hello openmpi-bin zlib1g" in text and 'ENV A="\\$x"' in text
    final = text[text.index("FROM system\n") :]
    assert "env.sh" not in final and "ca.pem" not in final and "uv" not in final.replace("env", "")
    assert text == dockerfile(environment, "d" * 64, "base:1", "python3.11", pip=True, extra_apt=["openmpi-bin"])


def test_a_base_of_ones_own_keeps_its_packages_and_conda_brings_its_python() -> None:
    own = dockerfile(c.Environment(pip_packages=["six"], base_image="b"), "d", "b", "python3.11", pip=True)
    assert "--system-site-packages --python python3.11" in own
    conda = dockerfile(c.Environment(conda_packages=["python 3.12.*"]), "d", "b", "python3.12", pip=False)
    assert "--python /opt/conda/bin/python" in conda
    assert "--system-site-packages" not in dockerfile(c.Environment(), "d", "b", "python3.11", pip=False)


def test_values_are_taken_literally() -> None:
    assert quoted('a "b" \\ $C\n') == '"a \\"b\\" \\\\ \\$C\\n"'


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (c.Environment(apt_packages=["hello; rm -rf /"]), "apt package"),
        (c.Environment(apt_packages=["--yes"]), "apt package"),
        (c.Environment(base_image="a b"), "no image reference"),
        (c.Environment(image="x\nRUN y"), "no image reference"),
        (c.Environment(image="x", dockerfile="FROM y"), "exclude each other"),
        (c.Environment(image="x", pip_packages=["six"]), "cannot be added"),
        (c.Environment(dockerfile="FROM y", apt_packages=["hello"]), "cannot be added"),
    ],
)
def test_what_cannot_be_built_is_said(environment: c.Environment, words: str) -> None:
    assert words in "; ".join(faults(environment))


def test_what_can_be_built_has_no_faults() -> None:
    fine = c.Environment(
        apt_packages=["hello", "libc6=2.36-9+deb12u7"], base_image="registry.example.com:5000/team/x:1.2", pip_packages=["six"]
    )
    assert faults(fine) == []


def test_names_and_bases() -> None:
    assert [name_of(s) for s in ("python 3.11.*", "conda-forge::Numpy>=1", "x=1=0")] == ["python", "numpy", "x"]
    text = "FROM --platform=linux/amd64 a:1 AS one\nRUN true\nFROM b\nCOPY --from=one / /\nfrom one\nFROM scratch\nFROM $X\n"
    assert bases(text) == ["a:1", "b"]


LOCK = "horovod==0.28.1 \\\n    --hash=sha256:aaa\nnumpy==2.0 \\\n    --hash=sha256:bbb\ntorch==2.13.0+cpu \\\n    --hash=sha256:ccc\n"


def test_horovod_is_found_with_its_torch_and_left_out() -> None:
    assert horovod.asked(LOCK) == ("0.28.1", "2.13.0+cpu")
    assert "horovod" not in horovod.without(LOCK) and "numpy==2.0" in horovod.without(LOCK) and "aaa" not in horovod.without(LOCK)
    assert horovod.asked(horovod.without(LOCK)) is None
    with pytest.raises(BuildFailed, match="add torch"):
        horovod.asked("horovod==0.28.1 \\\n    --hash=sha256:aaa\n")
