"""The generated reference pages: everything public is on them."""

from __future__ import annotations

import re
from pathlib import Path

from reference import cli, protos, sdk, settings

import alveary
from alveary_contracts.names import event_name

ROOT = Path(__file__).resolve().parents[3]


def test_every_public_class_is_in_the_sdk_reference() -> None:
    headings = set(re.findall(r"^## (\w+)$", sdk.render(), re.MULTILINE))
    assert headings >= {name for name in alveary.__all__ if isinstance(getattr(alveary, name), type)}


def test_long_signatures_have_a_parameter_a_line() -> None:
    assert "PyTorch(\n    source_directory: " in sdk.render()


def test_every_command_is_in_the_reference_with_its_options() -> None:
    page = cli.render()
    assert "## alveary run submit" in page
    assert "--source" in page
    assert page.count("\n## ") == len(list(cli.commands()))


def test_every_settings_class_of_the_tree_is_in_the_reference() -> None:
    page = settings.render()
    for file in [*ROOT.glob("libs/*/*/**/settings.py"), *ROOT.glob("services/*/*/settings.py")]:
        for name in re.findall(r"^class (\w+)\(", file.read_text(), re.MULTILINE):
            assert f"## {name}\n" in page, f"{file} defines {name}"
    assert "| `ALVEARY_LEASE_SECONDS` | `float` | `30.0` |" in page


def test_every_setting_has_a_meaning() -> None:
    assert [f.variable for c in settings.settings_classes() for f in c.fields if not f.text] == []


def test_every_event_and_every_rpc_is_in_the_reference() -> None:
    events, grpc = protos.render_events(), protos.render_grpc()
    for file in protos.files():
        for message in file.message_type:
            kind = event_name(message.name) if file.package == "alveary.events.v1" else None
            if kind:
                assert f"### {kind[0]}.{kind[1]} " in events
            else:
                assert f"### {message.name} " in (events if file.package == "alveary.events.v1" else grpc)
        for service in file.service:
            for method in service.method:
                assert f"| `{method.name}` |" in grpc


def test_comments_of_protos_are_in_the_reference() -> None:
    assert "The tombstone of a run." in protos.render_events()
