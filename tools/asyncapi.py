"""The AsyncAPI 3 document of all events, from the descriptors of alveary.events.v1."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from alveary_contracts.events.v1 import events_pb2
from alveary_contracts.names import AGGREGATES, event_name

_INTEGERS = {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_SINT32}
_LONGS = {FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT64}


def _field(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        return {"type": "object", "additionalProperties": _scalar(value, schemas)}
    one = _scalar(field, schemas)
    return {"type": "array", "items": one} if field.is_repeated else one


def _scalar(field: FieldDescriptor, schemas: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return {"type": "string", "format": "date-time"}
        _schema(field.message_type, schemas)
        return {"$ref": f"#/components/schemas/{field.message_type.name}"}
    if field.enum_type is not None:
        return {"type": "string", "enum": [v.name for v in field.enum_type.values]}
    if field.type in _INTEGERS:
        return {"type": "integer", "format": "int32"}
    if field.type in _LONGS:
        return {"type": "string", "format": "int64"}  # proto3 JSON writes 64-bit integers as strings
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return {"type": "number"}
    if field.type == FieldDescriptor.TYPE_BOOL:
        return {"type": "boolean"}
    return {"type": "string"}


def _schema(message: Descriptor, schemas: dict[str, Any]) -> None:
    if message.name in schemas:
        return
    schemas[message.name] = {}  # breaks cycles
    properties = {field.json_name: _field(field, schemas) for field in message.fields}
    schemas[message.name] = {"type": "object", "properties": properties}


def document() -> str:
    """The document as JSON text, ending in a newline."""
    schemas: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    for name, message in events_pb2.DESCRIPTOR.message_types_by_name.items():
        kind = event_name(name)
        if kind is None:
            continue
        aggregate, event = kind
        _schema(message, schemas)
        messages[name] = {
            "name": f"alveary.{aggregate}.{event}.v1",
            "contentType": "application/json",
            "payload": {"$ref": f"#/components/schemas/{name}"},
        }
        channels[name] = {
            "address": f"alveary.{{workspace}}.{aggregate}.{{id}}.{event}",
            "parameters": {"workspace": {}, "id": {"description": f"{aggregate} id, percent-encoded"}},
            "messages": {name: {"$ref": f"#/components/messages/{name}"}},
        }
        operations[f"{AGGREGATES[aggregate]}Sends{name}"] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{name}"},
        }
    head = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Alveary events",
            "version": "1.0.0",
            "description": "Every fact of Alveary, on JetStream stream ALVEARY, CloudEvents 1.0 binary mode.",
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }
    return json.dumps(head, indent=1) + "\n"
