"""A stack's state directory and its format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alveary.errors import AlvearyError
from alveary.local.layout import STATE_FORMAT, Layout


def test_a_state_directory_keeps_its_secrets_and_ports(tmp_path: Path) -> None:
    first = Layout.open(tmp_path, 0)
    again = Layout.open(tmp_path, None)
    assert (again.ports, again.secrets) == (first.ports, first.secrets)
    assert json.loads((tmp_path / "stack.json").read_text())["format"] == STATE_FORMAT


@pytest.mark.parametrize(("found", "told"), [(None, "format 0.*earlier"), (STATE_FORMAT - 1, "earlier"), (STATE_FORMAT + 1, "later")])
def test_a_state_directory_of_another_format_is_refused_and_left_alone(tmp_path: Path, found: int | None, told: str) -> None:
    Layout.open(tmp_path, 0)
    file = tmp_path / "stack.json"
    known = json.loads(file.read_text())
    del known["format"]
    file.write_text(json.dumps(known | ({} if found is None else {"format": found})))
    before = file.read_text()
    with pytest.raises(AlvearyError, match=told) as error:
        Layout.open(tmp_path, None)
    assert "--state-dir" in str(error.value)
    assert file.read_text() == before
