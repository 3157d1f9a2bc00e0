from hypothesis import given
from hypothesis import strategies as st

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.digests import environment_digest, image_digest, manifest_digest, manifest_from_json, manifest_json
from alveary_contracts.events.v1 import events_pb2
from alveary_contracts.ids import id_from_key, is_id, new_id
from alveary_contracts.names import AGGREGATES, event_name, message_name, name_problem, path_problem, token, untoken


def test_every_event_of_the_protos_has_a_name_and_a_writer() -> None:
    events = [n for n in events_pb2.DESCRIPTOR.message_types_by_name if event_name(n)]
    assert len(events) >= 45
    for message in events:
        aggregate, event = event_name(message)  # type: ignore[misc]
        assert aggregate in AGGREGATES
        assert message_name(aggregate, event) == message


@given(st.text())
def test_tokens_are_one_token_and_lose_nothing(text: str) -> None:
    made = token(text)
    assert not set(made) & set(". *>\t\r\n")
    assert untoken(made) == text


@given(st.text(max_size=40))
def test_accepted_paths_cannot_leave_a_folder(path: str) -> None:
    if not path_problem(path):
        assert not path.startswith("/")
        assert ".." not in path.split("/")


def test_bad_names_are_explained() -> None:
    for bad in ("", "a b", "../x", ".x", "x" * 65, "ü", "a/b"):
        assert name_problem(bad), bad
    for good in ("a", "Model.v2", "x_1-2"):
        assert not name_problem(good)


def test_ids_sort_by_time() -> None:
    made = [new_id(t) for t in (1.0, 2.0, 1e9, 2e9)]
    assert made == sorted(made)
    assert all(is_id(i) for i in made)


def test_ids_from_keys_keep_the_time_of_a_ulid_and_differ_between_workspaces() -> None:
    key = new_id(1.7e9)
    one, other = id_from_key("a", key), id_from_key("b", key)
    assert one == id_from_key("a", key)
    assert one != other
    assert one[:10] == other[:10] == key[:10]
    assert is_id(id_from_key("a", "any text at all"))


def test_manifest_digest_ignores_order_and_survives_json() -> None:
    files = [c.FileEntry(path=p, size=1, sha256="0" * 64) for p in ("b", "a")]
    one, other = c.Manifest(files=files), c.Manifest(files=files[::-1])
    assert manifest_digest(one) == manifest_digest(other)
    assert manifest_digest(manifest_from_json(manifest_json(one))) == manifest_digest(one)


def test_environment_digest_ignores_name_and_order_but_not_content() -> None:
    one = c.Environment(name="x", pip_packages=["a", "b"])
    assert environment_digest(one) == environment_digest(c.Environment(name="y", version=3, pip_packages=["b", "a"]))
    assert environment_digest(one) != environment_digest(c.Environment(pip_packages=["a", "b", "c"]))
    assert environment_digest(one) != environment_digest(c.Environment(pip_packages=["a", "b"], rebuild_key="1"))


def test_a_ready_image_by_tag_is_pinned_at_each_occasion() -> None:
    tag, pinned = c.Environment(image="python:3"), c.Environment(image="python@sha256:" + "0" * 64)
    assert image_digest(tag, "a") == image_digest(tag, "a") != image_digest(tag, "b") != environment_digest(tag)
    assert image_digest(pinned, "a") == image_digest(pinned, "b") == environment_digest(pinned)
    assert image_digest(c.Environment(pip_packages=["a"]), "a") == environment_digest(c.Environment(pip_packages=["a"]))


def test_what_events_are_made_of_is_not_taken_for_an_event() -> None:
    messages = events_pb2.DESCRIPTOR.message_types_by_name.values()
    parts = {f.message_type.name for m in messages for f in m.fields if f.message_type and f.message_type.file is events_pb2.DESCRIPTOR}
    # A compacted run repeats how it was submitted.
    assert {name for name in parts if event_name(name)} == {"RunSubmitted"}
