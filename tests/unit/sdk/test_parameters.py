"""What a public function accepts it uses, or refuses with a sentence: no parameter is ignored."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import alveary
from alveary import AlvearyError, script_run
from alveary.aio import Client
from alveary.client import compute, datasets, events, logs, metrics, models, runs
from alveary.events import Events
from alveary_contracts.common.v1 import common_pb2 as c

ROOT = Path(alveary.__file__).parent
# Parameters that no body uses, and why that is right.
ALLOWED = {
    "Run.get_context(used_for_context_manager)": "Azure's own flag: a run is ended by its process, with or without `with`",
    "Run.wait_for_completion(wait_post_processing)": "a run's final state always comes after its outputs are stored",
    "Run.download_files(batch_size)": "files are downloaded in parallel as it is",
    "Run.download_files(timeout_seconds)": "a download goes on as long as data arrives",
    "Model.__init__(expand)": "what a version refers to is looked up when it is read: there is nothing to leave out",
    "Model.list(expand)": "the same",
    "Model.list(page_count)": "how many versions travel at once changes nothing that is returned",
    "OfflineRun.flush(timeout_seconds)": "an offline run prints at once: nothing waits",
}
for _name in ("tags", "properties", "description", "model_framework", "model_framework_version"):
    ALLOWED[f"OfflineRun.register_model({_name})"] = "an offline run says what would be registered, and registers nothing"


def classes() -> dict[str, type]:
    """Public classes, and those that users are given by them."""
    found = {name: getattr(alveary, name) for name in alveary.__all__ if isinstance(getattr(alveary, name), type)}
    given = [Client, Events, script_run.ContextRun, script_run.OfflineRun, compute.Compute, datasets.Datasets, events.Events,
             events.DeadLetters, logs.Logs, metrics.Metrics, models.Models, runs.Runs]  # fmt: skip
    return found | {f"{one.__module__}.{one.__qualname__}" if one.__name__ in found else one.__name__: one for one in given}


def functions(one: type) -> Iterator[tuple[str, FunctionType]]:
    """Public functions of a class, those that it inherits from the SDK among them."""
    for name in dir(one):
        value = inspect.getattr_static(one, name)
        function = inspect.unwrap(getattr(value, "__func__", value))
        is_ours = isinstance(function, FunctionType) and function.__module__.startswith("alveary")
        if is_ours and (name == "__init__" or not name.startswith("_")):
            yield name, function


def read_attributes() -> set[str]:
    """Names of attributes that any module of the SDK reads."""
    return {
        node.attr
        for file in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


READ = read_attributes()


def unused(function: Callable[..., Any]) -> set[str]:
    """Parameters that the body does not use: never names, or only stores under an attribute that nothing reads."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # a dataclass's own: its fields are attributes
        return {name for name in inspect.signature(function).parameters if name != "self" and name not in READ}
    definition = tree.body[0]
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    body = [n for n in definition.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    if body and all(isinstance(node, (ast.Raise, ast.ImportFrom)) for node in body):
        return set()  # it refuses whatever is given
    arguments = definition.args
    names = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
    names |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
    used = set()
    for node in body:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load) and not _is_stored_unread(inner.id, node):
                used.add(inner.id)
    return names - used - {"self", "cls"}


def _is_stored_unread(name: str, node: ast.stmt) -> bool:
    """Whether a statement is `self.x = name` (or a tuple of such) where nothing reads an attribute x."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return False
    target, value = node.targets[0], node.value
    pairs = list(zip(target.elts, value.elts)) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
    for one, given in pairs:
        if isinstance(given, ast.Name) and given.id == name:
            return isinstance(one, ast.Attribute) and one.attr not in READ
    return False


def test_every_parameter_is_used_or_has_a_reason() -> None:
    found = {
        f"{name}.{method}({parameter})"
        for name, one in classes().items()
        for method, function in functions(one)
        for parameter in unused(function)
    }
    assert len([1 for one in classes().values() for _ in functions(one)]) > 150, "functions are found at all"
    assert found - set(ALLOWED) == set(), "ignored: use them, or refuse them with alveary.unsupported.refuse_given"
    assert set(ALLOWED) - found == set(), "reasons for parameters that are used"


def test_an_ignored_parameter_would_be_found() -> None:
    class Ignores:
        def method(self, used: Any, ignored: Any, stored: Any, **more: Any) -> Any:
            """used, ignored, stored, more."""
            self.attribute_that_nothing_reads = stored
            return used

    assert unused(Ignores.method) == {"ignored", "stored", "more"}


REFUSED: list[tuple[str, Callable[[Path], Any]]] = [
    ("shared_volumes is not offered", lambda folder: alveary.DockerConfiguration(shared_volumes=False)),
    ("run_config is not offered: give environment", lambda folder: alveary.ScriptRunConfig(str(folder), run_config="x")),
    ("pip_version is not offered", lambda folder: alveary.Environment.from_pip_requirements("e", "r.txt", pip_version="20")),
    ("communication backend 'mpi': 'nccl' or 'gloo'", lambda folder: config(folder, alveary.PyTorchConfiguration("mpi"))._spec()),
    ("is not how a run is distributed", lambda folder: config(folder, "torchrun")),
    ("a Distribution says how many", lambda folder: alveary.PyTorch(str(folder), node_count=2, distributed_training=alveary.Distribution())),
    ("leave distributed_backend out", lambda folder: alveary.PyTorch(str(folder), distributed_backend="mpi", distributed_training=3)),
    ("exit_codes choose among exits", lambda folder: alveary.Retry(exit_codes=[75])),
    ("'oom' is not an exit reason", lambda folder: alveary.Retry(on=["oom"])),
    ("give it user_managed, pip_packages as well", lambda folder: alveary.PyTorch(
        str(folder), environment_definition=alveary.Environment("e"), user_managed=True, pip_packages=["x"])),
    ("pip_requirements_file and pip_requirements_file_path are the same", lambda folder: alveary.PyTorch(
        str(folder), pip_requirements_file="a", pip_requirements_file_path="b")),
    ("cannot be split into words: No closing quotation", lambda folder: alveary.ScriptRunConfig(str(folder), "a.py", "--name it's")),
    ("remote_login_port_public_access", lambda folder: alveary.AmlCompute.provisioning_configuration(
        remote_login_port_public_access="Enabled")),
]  # fmt: skip


def config(folder: Path, distributed: Any) -> alveary.ScriptRunConfig:
    return alveary.ScriptRunConfig(str(folder), "a.py", distributed_job_config=distributed)


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_is_not_offered_is_refused_with_what_to_use(tmp_path: Path, number: int) -> None:
    text, make = REFUSED[number]
    with pytest.raises(AlvearyError, match=text):
        make(tmp_path)


def test_options_of_a_run_reach_its_specification(tmp_path: Path) -> None:
    spread = alveary.Distribution(3, 2, "torchrun", min_node_count=2, max_restarts=4, pack_nodes=True, backend="Gloo")
    needs = alveary.Resources(1.5, 2, 0.5, ["A100"], {"zone": "a"}, "1g")
    made = alveary.ScriptRunConfig(
        str(tmp_path), "a.py", "--lr 0.1 'two words'", distributed_job_config=spread, resources=needs,
        retry=alveary.Retry(4, on=["exited"], exit_codes=[75], backoff_seconds=3),
    )._spec()  # fmt: skip
    assert list(made.arguments) == ["--lr", "0.1", "two words"]
    assert (made.node_count, made.process_count_per_node, made.min_node_count, made.max_restarts, made.pack_nodes) == (3, 2, 2, 4, True)
    # Another backend is no other environment: no image is built for it.
    assert made.communication_backend == c.COMMUNICATION_BACKEND_GLOO and not made.environment.environment_variables
    assert (made.resources.cpus, made.resources.memory_bytes, made.resources.shm_bytes) == (1.5, 2 << 30, 1 << 30)
    assert (made.resources.gpus, made.resources.gpu_milli, list(made.resources.gpu_models)) == (1, 500, ["A100"])
    assert dict(made.node_labels) == {"zone": "a"}
    assert (made.max_attempts, list(made.retry.on), list(made.retry.exit_codes), made.retry.backoff_seconds) == (
        4,
        [c.EXIT_REASON_EXITED],
        [75],
        3,
    )
    assert not config(tmp_path, None)._spec().HasField("retry")


@pytest.mark.parametrize("make", [
    lambda folder: alveary.PyTorch(str(folder), use_docker=True),
    lambda folder: alveary.DockerConfiguration(use_docker=False),
])  # fmt: skip
def test_what_notebooks_pass_by_habit_is_taken_with_a_warning(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    with pytest.warns(alveary.AlvearyWarning, match="use_docker has no effect"):
        make(tmp_path)


def test_a_script_that_registers_a_model_does_not_fail_over_what_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    made = script_run.OfflineRun().register_model("m", datasets=[("training", object())], sample_input_dataset=1)
    assert made["name"] == "m"
    said = capsys.readouterr().err
    assert "datasets is left out" in said and "sample_input_dataset is not offered" in said


def test_datasets_of_a_model_are_given_as_azure_has_them() -> None:
    from alveary.dataset import Dataset, references
    from alveary_contracts.registry.v1 import registry_pb2

    data = Dataset(None, registry_pb2.DatasetVersion(name="d", version=2))  # type: ignore[arg-type]
    assert references(None) == [] and references([data, ("training", data), ["test", data.as_mount()]]) == ["d:2"] * 3


def test_an_estimator_sizes_shared_memory_beside_its_container(tmp_path: Path) -> None:
    made = alveary.PyTorch(str(tmp_path), entry_script="a.py", docker_runtime_config=alveary.DockerConfiguration(), shm_size="8g")
    assert made._spec().resources.shm_bytes == 8 << 30
