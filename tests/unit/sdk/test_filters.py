from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from alveary.text import quoted
from alveary_runs import query


@given(st.text(min_size=1), st.text())
def test_any_name_and_any_value_can_be_asked_for(name: str, value: str) -> None:
    (found,) = query.conditions(f"tags.{quoted(name)} = {quoted(value)}")
    assert (found.kind, found.name, found.operator, found.value) == ("tags", name, "=", value)
