"""Models and datasets: versions are numbered from 1 without gaps and never change."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from alveary_contracts.common.v1 import common_pb2 as c
from alveary_contracts.events.v1 import events_pb2 as ev
from alveary_registry import domain

NUMBER = st.integers(0, 5)
KEYS = st.sampled_from(["", "k1", "k2", "k3"])


class ModelMachine(RuleBasedStateMachine):
    """Everything that can be asked of a model, in any order, possible or not."""

    def __init__(self) -> None:
        super().__init__()
        self.model = domain.Model()
        self.contents: list[bytes] = []
        self.keys: set[str] = set()
        self.exports = 0

    def do(self, events: domain.Events) -> domain.Events:
        for event in events:
            self.model = domain.evolve(self.model, event)
        return events

    @rule(key=KEYS)
    def register(self, key: str) -> None:
        entry = c.FileEntry(path=f"m{len(self.contents)}", sha256="0" * 64)
        event = ev.ModelRegistered(manifest=c.Manifest(files=[entry]), idempotency_key=key, properties={"p": "0"})
        done = self.do(domain.register(self.model, event))
        assert bool(done) == (not key or key not in self.keys)
        if done:
            self.contents.append(event.manifest.SerializeToString(deterministic=True))
            assert event.version == len(self.contents)
        if key:
            self.keys.add(key)
            assert domain.by_key(self.model, key) > 0

    @rule(number=NUMBER, value=st.sampled_from(["0", "1"]), name=st.sampled_from(["p", "q"]))
    def tag(self, number: int, value: str, name: str) -> None:
        event = ev.ModelTagged(version=number, set={"t": value}, properties={name: value})
        if not 1 <= number <= len(self.contents):
            with pytest.raises(domain.Rejected, match="there is no version"):
                domain.tag(self.model, event)
        elif self.model.version(number).properties.get(name, value) != value:
            with pytest.raises(domain.Rejected, match="never changed"):
                domain.tag(self.model, event)
        else:
            self.do(domain.tag(self.model, event))
            assert self.model.version(number).tags["t"] == value

    @rule(number=NUMBER, alias=st.sampled_from(["prod", "test"]))
    def alias(self, number: int, alias: str) -> None:
        if number > len(self.contents):
            with pytest.raises(domain.Rejected):
                domain.set_alias(self.model, alias, number)
            return
        self.do(domain.set_alias(self.model, alias, number))
        assert self.model.aliases.get(alias, 0) == number

    @rule(number=st.integers(1, 5))
    def export(self, number: int) -> None:
        self.exports += 1
        event = ev.ModelExportRequested(version=number, export_id=f"e{self.exports}")
        if number > len(self.contents) or self.model.version(number).pending:
            with pytest.raises(domain.Rejected):
                domain.request_export(self.model, event)
        else:
            self.do(domain.request_export(self.model, event))

    @rule(number=NUMBER, which=st.integers(1, 6), ok=st.booleans())
    def end_export(self, number: int, which: int, ok: bool) -> None:
        event = (ev.ModelExported if ok else ev.ModelExportFailed)(version=number, export_id=f"e{which}")
        pending = 1 <= number <= len(self.contents) and self.model.version(number).pending == f"e{which}"
        assert bool(self.do(domain.end_export(self.model, event))) == pending
        if pending:
            assert not self.model.version(number).pending

    @rule(number=st.integers(1, 5))
    def archive(self, number: int) -> None:
        if number <= len(self.contents):
            self.do(domain.archive(self.model, number))
            assert self.model.version(number).archived
            assert domain.archive(self.model, number) == []

    @invariant()
    def versions_never_change(self) -> None:
        now = [v.registered.manifest.SerializeToString(deterministic=True) for v in self.model.versions]
        assert now == self.contents
        assert all(v.properties["p"] == "0" for v in self.model.versions)

    @invariant()
    def aliases_point_at_versions(self) -> None:
        assert all(1 <= n <= len(self.contents) for n in self.model.aliases.values())


TestModel = ModelMachine.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_dataset_of_the_same_content_is_the_version_that_has_it() -> None:
    dataset = domain.Dataset()
    for digest in ("a", "b", "a", "b"):
        for event in domain.register_dataset(dataset, ev.DatasetRegistered(manifest_digest=digest)):
            dataset = domain.evolve_dataset(dataset, event)
    assert [(v.version, v.manifest_digest) for v in dataset.versions] == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("data", [b"\xff", b"[1]", b"null", b"[" * 100_000, b"1" * 5000])
def test_a_report_that_cannot_be_read_ends_its_export(data: bytes) -> None:
    from alveary_registry.export import ExportFailed, read_report

    with pytest.raises(ExportFailed, match="the export run left a report that"):
        read_report(data)
    assert read_report(b'{"error": "x"}') == {"error": "x"}
