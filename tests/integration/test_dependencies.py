"""The SDK beside other people's packages: with the oldest protobuf and grpcio that it says it works with, and the newest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from alveary_core.uv import uv_binary, uv_environment

ROOT = Path(__file__).resolve().parents[2]
# What a user's script does, short of a platform: every class, a specification there and back, a client's channels, JSON.
SCRIPT = """
import logging, multiprocessing, os, signal, socket, ssl, sys, threading

def surroundings():
    return (
        list(logging.root.handlers), logging.root.level, sys.excepthook, threading.excepthook, list(sys.path), dict(os.environ),
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), multiprocessing.get_start_method(True),
        socket.getdefaulttimeout(), ssl._create_default_https_context, print, open,
    )

before = surroundings()
import alveary
for name in alveary.__all__:
    getattr(alveary, name)
assert before == surroundings()

from alveary import Environment, Resources, ScriptRunConfig, Workspace
from alveary.client.states import run_details
from alveary.config import Config
from alveary_contracts.common.v1 import common_pb2
from alveary_contracts.runs.v1 import runs_pb2

spec = ScriptRunConfig(".", "train.py", ["--lr", 0.1], environment=Environment("e", ["numpy"]), resources=Resources(cpus=1.5))._spec()
assert common_pb2.RunSpec.FromString(spec.SerializeToString()) == spec
run = runs_pb2.Run(id="r", spec=spec, metrics={"loss": 0.5})
run.started_at.GetCurrentTime()
assert run_details(run)["metrics"] == {"loss": 0.5}
Workspace(Config("127.0.0.1:1", "t"))
import google.protobuf, grpc
print(google.protobuf.__version__, grpc.__version__)
"""


@pytest.mark.parametrize("packages", [("protobuf==5.26.1", "grpcio==1.64.3"), ("protobuf", "grpcio")], ids=["oldest", "newest"])
def test_the_sdk_installs_and_works_with_every_protobuf_since_5_26(tmp_path: Path, packages: tuple[str, ...]) -> None:
    if sys.version_info >= (3, 13) and "grpcio==1.64.3" in packages:
        pytest.skip("grpcio 1.64.3 has no wheel for this Python")
    python = tmp_path / "venv/bin/python"

    def uv(*words: str) -> None:
        done = subprocess.run([uv_binary(), *words], env=uv_environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    uv("venv", "--python", sys.executable, str(tmp_path / "venv"))
    # Resolved together: the ranges of the SDK's own pyproject.toml have to allow them.
    uv("pip", "install", "--python", str(python), *packages, str(ROOT / "libs/contracts"), str(ROOT / "libs/sdk"))
    done = subprocess.run([python, "-W", "error", "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    versions = dict(zip(("protobuf", "grpcio"), done.stdout.split(), strict=True))
    assert all(versions[name] == version for name, _, version in (p.partition("==") for p in packages) if version)
    done = subprocess.run([python, "-W", "error", "-m", "alveary.cli", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "run" in done.stdout, done.stderr
