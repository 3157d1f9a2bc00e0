import subprocess
import sys
from pathlib import Path

import pytest

from alveary import AlvearyError, MpiConfiguration, PyTorch, PyTorchConfiguration, Run
from alveary.config import load
from alveary.requirements import requirements_of
from alveary.source import manifest_of
from alveary_contracts.common.v1 import common_pb2 as c


def test_outside_a_run_the_context_prints(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.get_context()
    run.log("loss", 0.5, step=3)
    run.tag("a", "b")
    run.flush()
    assert capsys.readouterr().out == "loss: 0.5 (step 3)\ntag a: b\n"
    with pytest.raises(RuntimeError, match="not part of a submitted run"):
        Run.get_context(allow_offline=False)
    run.log("x", [1, 2])
    said = capsys.readouterr()
    assert not said.out and "log('x') is left out: a number or text, not list; use log_list" in said.err
    assert run.register_model("m", "outputs/m.pt") == {"name": "m", "version": 0} and run.get_tags() == {}


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    code = "import sys; from alveary import Run; Run.get_context().log('x', 1); print([m for m in sys.modules if m.split('.')[0] in ('grpc', 'google', 'urllib3', 'rich', 'typer')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "x: 1\n[]\n"


def test_the_first_ignore_file_decides(tmp_path: Path) -> None:
    for name in ("a.py", "b.bin", "c.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text("*.py")
    (tmp_path / ".amlignore").write_text("*.bin")
    assert set(manifest_of(tmp_path, True)[1]) == {".amlignore", ".gitignore", "a.py", "c.txt"}
    (tmp_path / ".alvearyignore").write_text("*.txt\n!keep.txt")
    assert "b.bin" in manifest_of(tmp_path, True)[1] and "c.txt" not in manifest_of(tmp_path, True)[1]
    assert "c.txt" in manifest_of(tmp_path, False)[1]


def test_distributed_training_is_what_either_place_says(tmp_path: Path) -> None:
    mpi = PyTorch(
        str(tmp_path), entry_script="a.py", distributed_training=MpiConfiguration(), node_count=2, process_count_per_node=3
    )._spec()
    assert (mpi.launcher, mpi.node_count, mpi.process_count_per_node) == (c.LAUNCHER_MPI, 2, 3)
    config = PyTorchConfiguration(process_count=4, node_count=2, min_node_count=1, max_restarts=5)
    spec = PyTorch(str(tmp_path), entry_script="a.py", distributed_training=config)._spec()
    assert (spec.launcher, spec.node_count, spec.process_count_per_node) == (c.LAUNCHER_TORCHRUN, 2, 2)
    assert (spec.min_node_count, spec.max_restarts) == (1, 5)
    with pytest.raises(AlvearyError, match="not the same number"):
        PyTorchConfiguration(process_count=3, node_count=2)


def test_what_only_makes_sense_in_azure_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AlvearyError, match="vm_size is not offered: create a compute target"):
        PyTorch(str(tmp_path), vm_size="STANDARD_NC6")
    with pytest.raises(AlvearyError, match="shm_size"):
        PyTorch(str(tmp_path), entry_script="a.py", shm_size="lots")
    with pytest.raises(AlvearyError, match="is not a folder"):
        PyTorch(str(tmp_path / "none"))


def test_script_parameters_become_arguments(tmp_path: Path) -> None:
    spec = PyTorch(str(tmp_path), entry_script="a.py", script_params={"--flag": "", "--n": 3}, compute_target="t")._spec()
    assert list(spec.arguments) == ["--flag", "--n", "3"]
    assert "torch" in spec.environment.pip_packages
    own = PyTorch(str(tmp_path), entry_script="a.py", conda_packages=["x"], custom_docker_base_image="b", shm_size="2g")._spec()
    assert (list(own.environment.conda_packages), own.environment.base_image, own.resources.shm_bytes) == (["x"], "b", 2 << 30)


def test_requirements_files_are_read_and_options_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"
    file.write_text("# comment\ntorch>=2  # why\n\nsix\n")
    assert requirements_of(file) == ["torch>=2", "six"]
    file.write_text("--index-url x")
    with pytest.raises(AlvearyError, match=r"/r.txt, line 1: .*pip settings"):
        requirements_of(file)


def test_configs_are_found_and_faults_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALVEARY_HOME", str(tmp_path / "none"))
    monkeypatch.delenv("ALVEARY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlvearyError, match="alveary up"):
        load()
    (tmp_path / "config.json").write_text('{"endpoint": "h:1", "token": "t", "subscription_id": "azure"}')
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    found = load()
    assert found.endpoint == "h:1" and "t" not in repr(found).split("token")[-1][:3]
    (tmp_path / "config.json").write_text('{"endpoint": ')
    with pytest.raises(AlvearyError, match="is not JSON"):
        load()
