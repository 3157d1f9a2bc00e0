import pytest

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_core.errors import InvalidArgument
from alveary_runs import query
from alveary_runs.validation import problems, with_defaults

CPU = ev.ComputeSpec(max_nodes=4, node_resources=c.Resources(cpus=2, memory_bytes=4 << 30))
BASE = {"entry_script": "train.py", "snapshot": "0" * 64, "compute_target": "t"}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"entry_script": "no.py"}, "entry_script", "train.py"),
        ({"entry_script": "../x.py"}, "entry_script", "'..'"),
        ({"entry_script": ""}, "entry_script", "exactly one"),
        ({"command": ["x"]}, "entry_script", "exactly one"),
        ({"module": "m", "entry_script": ""}, "module", "platform itself"),
        ({"use_gpu": True}, "use_gpu", "no GPU"),
        ({"resources": c.Resources(cpus=64)}, "resources.cpus", "has 2"),
        ({"resources": c.Resources(memory_bytes=1 << 50)}, "resources.memory_bytes", "GiB"),
        ({"resources": c.Resources(gpus=1)}, "resources.gpus", "has 0"),
        ({"node_count": 5}, "node_count", "at most 4"),
        ({"node_count": 5, "min_node_count": 6}, "min_node_count", "which is 5"),
        ({"node_count": 2000}, "node_count", "1024"),
        ({"max_restarts": 1}, "max_restarts", "only torchrun"),
        ({"process_count_per_node": 2}, "process_count_per_node", "torchrun"),
        ({"experiment": "a b"}, "experiment", "letters"),
        ({"max_run_duration_seconds": -1}, "max_run_duration_seconds", "21 days"),
        ({"priority": 5000}, "priority", "1000"),
        ({"max_attempts": 99}, "max_attempts", "10"),
        ({"environment": c.Environment(pip_packages=["--index-url x"])}, "environment.pip_packages", "options"),
        ({"environment": c.Environment(environment_variables={"ALVEARY_X": "1"})}, "environment.environment_variables", "ALVEARY_"),
        ({"environment": c.Environment(user_managed=True, interpreter="python")}, "environment.interpreter", "absolute"),
        ({"tags": {"alveary.export": "x"}}, "properties", "platform"),
    ],
)
def test_each_fault_is_named_with_its_field(change: dict[str, object], field: str, words: str) -> None:
    spec = with_defaults(c.RunSpec(**BASE | change))  # type: ignore[arg-type]
    found = problems(spec, CPU, ["t"], {"train.py"}, internal=False)
    assert any(f == f"spec.{field}" and words in text for f, text in found), found


def test_a_good_specification_has_none_and_defaults_are_filled() -> None:
    spec = with_defaults(c.RunSpec(**BASE))  # type: ignore[arg-type]
    assert problems(spec, CPU, ["t"], {"train.py"}, internal=False) == []
    assert (spec.experiment, spec.resources.cpus, spec.max_attempts, spec.grace_seconds) == ("default", 1.0, 3, 10.0)


def test_an_unknown_target_lists_the_known_ones() -> None:
    found = problems(with_defaults(c.RunSpec(**BASE)), None, ["b", "a"], {"train.py"}, internal=False)  # type: ignore[arg-type]
    assert ("spec.compute_target", "there is no compute target 't'; there are: a, b") in found


def test_filters_are_read_whatever_the_names_are() -> None:
    found = query.conditions('state = Completed AND tags.x = "1; DROP TABLE runs" AND metrics.loss < 0.5')
    assert [(x.kind, x.name, x.operator, x.value) for x in found] == [
        ("", "state", "=", c.RUN_STATE_COMPLETED), ("tags", "x", "=", "1; DROP TABLE runs"), ("metrics", "loss", "<", 0.5)
    ]  # fmt: skip
    for text, name in (
        ('metrics."train/loss" < 1', "train/loss"), ("metrics.train/loss<1", "train/loss"), ('metrics."a b"=1', "a b"),
        ('metrics."AND x = 1" > -inf', "AND x = 1"), (r'metrics."say \"hi\" \\" >= 2', 'say "hi" \\'), ("metrics.val-acc@1 != 0", "val-acc@1"),
        ('metrics."Verlust 😀\n" = nan', "Verlust 😀\n"), ("metrics.a.b.c = 1", "a.b.c"), ("metrics.`avg model score` > 0.5", "avg model score"), ("metrics.a[0] = 1", "a[0]"),
    ):  # fmt: skip
        (one,) = query.conditions(text)
        assert (one.kind, one.name) == ("metrics", name), text
    assert [x.name for x in query.conditions('tags."a b" = "c d" AND properties."x=y" != ""')] == ["a b", "x=y"]
    assert query.order('metrics."train/loss" desc') == ("train/loss", "DESC") and query.order("metrics.train/loss") == ("train/loss", "ASC")
    assert (
        query.order("") == ("", "DESC")
        and query.order("submitted_at ASC") == ("", "ASC")
        and query.order('metrics." desc"') == (" desc", "ASC")
    )


@pytest.mark.parametrize(
    "bad",
    [
        "state", "state = Nowhere", "metrics.loss < x", "nothing = 1", "state = Failed OR x = 1", 'submitted_at > "x"', 'metrics."" = 1',
        "metrics.loss < nan", 'tags."a = 1', "archived = 1", "proto = x", "state = Failed AND", " AND ".join(["id = x"] * 51),
        'submitted_at > "99999-01-01"', "metrics = 1",
    ],
)  # fmt: skip
def test_filters_that_cannot_be_read_say_so(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="filter"):
        query.conditions(bad)


@pytest.mark.parametrize("bad", ["state", "metrics.", "submitted_at down", "metrics.a b c", 'metrics.""', "tags.x", "; DROP TABLE runs"])
def test_orders_that_cannot_be_read_say_so(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="order_by"):
        query.order(bad)


def test_page_tokens_of_others_are_refused() -> None:
    assert query.decode_token(query.encode_token([0, 1.5, "x"])) == (0, 1.5, "x")
    for bad in ("x", "e30=", "", *(query.encode_token(x) for x in ([0, {}, "x"], [0, "1", 2], [None, 1.5, "x"], [3, 1.5, "x"], [0, 1.5]))):
        with pytest.raises(InvalidArgument):
            query.decode_token(bad)
