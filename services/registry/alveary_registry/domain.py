"""Models and datasets: immutable numbered versions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message

from alveary_contracts.events.v1 import events_pb2 as ev

Events = Sequence[Message]


class Rejected(Exception):
    """The command makes no sense as things are; the text says why."""


@dataclass(frozen=True)
class Version:
    """One version of a model."""

    registered: ev.ModelRegistered
    tags: dict[str, str] = field(default_factory=dict)
    properties: dict[str, str] = field(default_factory=dict)
    description: str = ""
    archived: bool = False
    pending: str = ""
    exported: ev.ModelExported | None = None
    export_error: str = ""


@dataclass(frozen=True)
class Model:
    """All versions of a name, from 1."""

    versions: tuple[Version, ...] = ()
    aliases: dict[str, int] = field(default_factory=dict)

    def version(self, number: int) -> Version:
        """One of them.

        Raises:
            Rejected: there is none of that number.
        """
        if not 1 <= number <= len(self.versions):
            raise Rejected(f"there is no version {number}; there are 1 to {len(self.versions)}")
        return self.versions[number - 1]


def register(model: Model, event: ev.ModelRegistered) -> Events:
    """The next version; a repeated idempotency key decides nothing."""
    if event.idempotency_key and by_key(model, event.idempotency_key):
        return []
    event.version = len(model.versions) + 1
    return [event]


def by_key(model: Model, key: str) -> int:
    """Number of the version that was registered under an idempotency key; 0: none."""
    for number, version in enumerate(model.versions, 1):
        if version.registered.idempotency_key == key:
            return number
    return 0


def tag(model: Model, event: ev.ModelTagged) -> Events:
    """Set and remove tags, add properties, describe.

    Raises:
        Rejected: no such version, or a property would change.
    """
    version = model.version(event.version)
    for key, value in event.properties.items():
        if version.properties.get(key, value) != value:
            raise Rejected(f"property {key!r} is {version.properties[key]!r}: properties can be added, never changed")
    return [event]


def set_alias(model: Model, alias: str, number: int) -> Events:
    """Point an alias at a version, or remove it (0).

    Raises:
        Rejected: no such version.
    """
    if number:
        model.version(number)
    return [] if model.aliases.get(alias, 0) == number else [ev.ModelAliasSet(alias=alias, version=number)]


def request_export(model: Model, event: ev.ModelExportRequested) -> Events:
    """Ask for an export; one at a time per version.

    Raises:
        Rejected: no such version, or one is under way.
    """
    version = model.version(event.version)
    if version.pending:
        raise Rejected(f"an export of version {event.version} is under way: run {version.pending}")
    return [event]


def end_export(model: Model, event: ev.ModelExported | ev.ModelExportFailed) -> Events:
    """An export is over; news only while it is pending."""
    if not 1 <= event.version <= len(model.versions) or model.version(event.version).pending != event.export_id:
        return []
    return [event]


def archive(model: Model, number: int) -> Events:
    """Hide a version from lists; it stays readable.

    Raises:
        Rejected: no such version.
    """
    return [] if model.version(number).archived else [ev.ModelArchived(version=number)]


def evolve(model: Model, event: Message) -> Model:
    """Fold one event."""
    match event:
        case ev.ModelRegistered():
            new = Version(event, dict(event.tags), dict(event.properties), event.description)
            return replace(model, versions=(*model.versions, new))
        case ev.ModelAliasSet():
            aliases = {k: v for k, v in model.aliases.items() if k != event.alias}
            return replace(model, aliases=aliases | ({event.alias: event.version} if event.version else {}))
        case ev.ModelTagged() | ev.ModelExportRequested() | ev.ModelExported() | ev.ModelExportFailed() | ev.ModelArchived():
            if not 1 <= event.version <= len(model.versions):
                return model  # it was set aside, and with it what happened to it
            old = model.versions[event.version - 1]
            versions = list(model.versions)
            versions[event.version - 1] = _change(old, event)
            return replace(model, versions=tuple(versions))
    return model


def _change(version: Version, event: Message) -> Version:
    match event:
        case ev.ModelTagged():
            tags = {k: v for k, v in version.tags.items() if k not in event.removed} | dict(event.set)
            text = event.description if event.HasField("description") else version.description
            return replace(version, tags=tags, properties=version.properties | dict(event.properties), description=text)
        case ev.ModelExportRequested():
            return replace(version, pending=event.export_id, export_error="")
        case ev.ModelExported():
            return replace(version, pending="", exported=event, export_error="")
        case ev.ModelExportFailed():
            return replace(version, pending="", export_error=event.reason)
    return replace(version, archived=True)


@dataclass(frozen=True)
class Dataset:
    """All versions of a dataset."""

    versions: tuple[ev.DatasetRegistered, ...] = ()


def register_dataset(dataset: Dataset, event: ev.DatasetRegistered) -> Events:
    """The next version, unless one has that very content already."""
    if any(v.manifest_digest == event.manifest_digest for v in dataset.versions):
        return []
    event.version = len(dataset.versions) + 1
    return [event]


def evolve_dataset(dataset: Dataset, event: Message) -> Dataset:
    """Fold one event."""
    if isinstance(event, ev.DatasetRegistered):
        return replace(dataset, versions=(*dataset.versions, event))
    return dataset
