"""gRPC services and events, from the protos and their comments."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from google.protobuf import descriptor_pb2 as pb

from alveary_contracts.names import AGGREGATES, event_name
from reference.markdown import page, plain, table

ROOT = Path(__file__).resolve().parents[2]
_EVENTS = "alveary.events.v1"
_FILE, _SERVICE, _MESSAGE, _ENUM, _METHOD, _FIELD, _VALUE, _SYNTAX = 0, 6, 4, 5, 2, 2, 2, 12
_SCALARS = {number: name.removeprefix("TYPE_").lower() for name, number in pb.FieldDescriptorProto.Type.items()}
Comments = Mapping[tuple[int, ...], str]


@cache
def files() -> tuple[pb.FileDescriptorProto, ...]:
    """Descriptors of all protos, with their comments."""
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(
        [str(buf), "build", "--as-file-descriptor-set", "-o", "-#format=binpb"], cwd=ROOT / "protos", capture_output=True
    )
    if built.returncode:
        raise SystemExit(f"buf cannot build protos/: {built.stderr.decode()}")
    return tuple(f for f in pb.FileDescriptorSet.FromString(built.stdout).file if f.package.startswith("alveary."))


def _comments(file: pb.FileDescriptorProto) -> Comments:
    return {
        tuple(at.path): " ".join(part.strip() for part in (at.leading_comments, at.trailing_comments) if part.strip())
        for at in file.source_code_info.location
    }


def _head(file: pb.FileDescriptorProto) -> str:
    """The comment at the head of a file, line by line: it stands before `package`."""
    for at in file.source_code_info.location:
        if tuple(at.path) == (2,):
            return at.leading_comments or "\n".join(at.leading_detached_comments)
    return ""


def _place(type_name: str) -> str:
    """Link to a message or enum of ours."""
    name = type_name.rpartition(".")[2]
    if not type_name.startswith(".alveary."):
        return f"`{name}`"
    events = type_name.startswith(f".{_EVENTS}.")
    anchor = name.lower()
    if events and (kind := event_name(name)):
        anchor = f"{kind[0]}-{kind[1]}"
    return f"[{name}]({'events.md' if events else 'grpc.md'}#{anchor})"


def _type(field: pb.FieldDescriptorProto, message: pb.DescriptorProto) -> str:
    repeated = field.label == pb.FieldDescriptorProto.LABEL_REPEATED
    if field.type_name:
        for nested in message.nested_type:
            if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
                key, value = nested.field
                return f"map from {_type(key, nested)} to {_type(value, nested)}"
        name = _place(field.type_name)
    else:
        name = f"`{_SCALARS[field.type]}`"
    return f"{'repeated ' if repeated else ''}{'optional ' if field.proto3_optional else ''}{name}"


def _fields(message: pb.DescriptorProto, path: tuple[int, ...], comments: Comments) -> str:
    rows = [(f"`{f.name}`", _type(f, message), plain(comments.get((*path, _FIELD, i), ""))) for i, f in enumerate(message.field)]
    return table(("Field", "Type", "Meaning"), rows) or "No fields."


def _messages(file: pb.FileDescriptorProto) -> Iterator[str]:
    comments = _comments(file)
    for i, message in enumerate(file.message_type):
        path = (_MESSAGE, i)
        kind = event_name(message.name) if file.package == _EVENTS else None
        title = f"### {kind[0]}.{kind[1]} {{ #{kind[0]}-{kind[1]} }}" if kind else f"### {message.name} {{ #{message.name.lower()} }}"
        text = plain(comments.get(path, ""))
        yield "\n\n".join(part for part in (title, text, _fields(message, path, comments)) if part)
    for i, enum in enumerate(file.enum_type):
        values = [(f"`{v.name}`", plain(comments.get((_ENUM, i, _VALUE, j), ""))) for j, v in enumerate(enum.value)]
        text = plain(comments.get((_ENUM, i), ""))
        yield "\n\n".join(
            part for part in (f"### {enum.name} {{ #{enum.name.lower()} }}", text, table(("Value", "Meaning"), values)) if part
        )


def _services(file: pb.FileDescriptorProto) -> Iterator[str]:
    comments = _comments(file)
    for i, service in enumerate(file.service):
        rows = [
            (
                f"`{m.name}`",
                f"{'stream of ' if m.client_streaming else ''}{_place(m.input_type)}",
                f"{'stream of ' if m.server_streaming else ''}{_place(m.output_type)}",
                plain(comments.get((_SERVICE, i, _METHOD, j), "")),
            )
            for j, m in enumerate(service.method)
        ]
        text = plain(comments.get((_SERVICE, i), ""))
        parts = (f"### {service.name} {{ #{service.name.lower()} }}", text, table(("Method", "Request", "Response", "Meaning"), rows))
        yield "\n\n".join(part for part in parts if part)


def _preformatted(text: str) -> str:
    lines = [line.removeprefix(" ").rstrip() for line in text.strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```"


def render_grpc() -> str:
    """The page of services and their messages."""
    sections = []
    for file in files():
        if file.package == _EVENTS:
            continue
        sections += [f"## {file.package}", f"`protos/{file.name}`", _preformatted(_head(file)), *_services(file), *_messages(file)]
    introduction = (
        "Every service answers on the same endpoint, with a token in the metadata `authorization: Bearer <token>`; server reflection is on."
    )
    return page("gRPC", introduction, *sections)


def render_events() -> str:
    """The page of events."""
    file = next(f for f in files() if f.package == _EVENTS)
    sections: dict[str, list[str]] = {aggregate: [] for aggregate in AGGREGATES}
    types: list[str] = []
    for section in _messages(file):
        matched = re.match(r"### (\w+)\.\w+ \{", section)
        (sections[matched[1]] if matched else types).append(section)
    parts = [_preformatted(_head(file))]
    for aggregate, found in sections.items():
        parts += [f"## {aggregate} {{ #aggregate-{aggregate} }}", f"Written by the {AGGREGATES[aggregate]} service.", *found]
    introduction = (
        "All events of the log, in order of their aggregates. How to subscribe: [Events for automation](../events.md). "
        "Machine-readable: [asyncapi.json](../asyncapi.json)."
    )
    return page("Events", introduction, *parts, "## Types", *types)
