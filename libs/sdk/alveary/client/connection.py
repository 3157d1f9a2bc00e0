"""The channels to a platform: unary calls that are retried, streams that are reopened, errors in the platform's words."""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncIterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from alveary._fork import claim_grpc, is_forked
from alveary._lazy import LazyModule
from alveary.backoff import Backoff, retry
from alveary.client.stubs import Stubs
from alveary.config import Config
from alveary.errors import AlvearyError, AlvearyWarning, NoPlatform
from alveary_contracts.proxies import DIRECT

if TYPE_CHECKING:
    from alveary import transfer
else:
    transfer = LazyModule("alveary.transfer")

CALL_TIMEOUT_SECONDS = 60.0
CALL_TRIES = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 3.0
_MAX_MESSAGE_BYTES = 64 << 20
# Trailing metadata of an answer that may be older than it should be.
_BEHIND = "alveary-behind"
# gRPC reports a torn connection with one of these, and a fault of the platform as well.
_FAULTY = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
_TORN_TEXTS = ("Stream removed", "RST_STREAM", "Connection reset")
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    *DIRECT,
]


class Connection:
    """Channels to the services of one platform, with the caller's token. Make it inside a running loop.

    Not usable in a process that was forked after one was made: every method then raises AlvearyError.
    """

    def __init__(self, config: Config) -> None:
        claim_grpc()
        self.config = config
        self.metadata = (("authorization", f"Bearer {config.token}"),)
        self._channels = {endpoint: _channel(config, endpoint) for endpoint in {config.endpoint, *config.endpoints.values()}}
        self._is_told_behind = False

    @cached_property
    def stubs(self) -> Stubs:
        """Stubs of all services."""
        return Stubs(lambda service: self._channels[self.config.endpoints.get(service, self.config.endpoint)])

    @property
    def transfers(self) -> transfer.Transfers:
        """What moves bytes to and from the object store.

        Raises:
            AlvearyError: this process was forked from one that uses the platform: its threads do not exist here.
        """
        claim_grpc()
        return self._transfers

    @cached_property
    def _transfers(self) -> transfer.Transfers:
        return transfer.Transfers(self.config.ca)

    async def close(self) -> None:
        """Close the channels; nothing in a forked process, where they are the parent's."""
        if is_forked():
            return
        for channel in self._channels.values():
            await channel.close()

    async def call(self, method: Any, request: Any, *, timeout: float = CALL_TIMEOUT_SECONDS) -> Any:
        """The answer to one unary call, repeated while the platform is unavailable: all requests of this client are idempotent.

        Warns once, with AlvearyWarning, where a service says that its read model is behind the event log.

        Args:
            timeout: of each try, seconds.

        Raises:
            AlvearyError: the platform refused, or did not answer in time.
        """
        claim_grpc()

        async def attempt() -> Any:
            call = method(request, metadata=self.metadata, timeout=timeout)
            reply = await call
            self._warn_if_behind(await call.trailing_metadata())
            return reply

        backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        try:
            return await retry(attempt, _is_transient, tries=CALL_TRIES, backoff=backoff)
        except grpc.aio.AioRpcError as error:
            raise self.translate(error) from error

    async def pages(self, method: Any, request: Any) -> AsyncIterator[Any]:
        """The answers of a paged method, from the page that `request.page_token` names to the last."""
        while True:
            reply = await self.call(method, request)
            yield reply
            if not reply.next_page_token:
                return
            request.page_token = reply.next_page_token

    def open_stream(self, method: Any, request: Any = None, *, timeout: float | None = None) -> Any:
        """A call that streams; `request` is None where requests are written to it. Without a timeout it has no deadline."""
        claim_grpc()
        arguments = () if request is None else (request,)
        return method(*arguments, metadata=self.metadata, timeout=timeout)

    def reconnect(self) -> Reconnect:
        """When to open a stream again that broke."""
        return Reconnect(self)

    def translate(self, error: grpc.aio.AioRpcError) -> AlvearyError:
        """An error of gRPC in the platform's own words."""
        code = error.code()
        # What the platform itself says carries google.rpc.Status; the rest is of this side: no such name, nobody listening, no gRPC there.
        is_platforms = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
        if code == grpc.StatusCode.UNAVAILABLE and not is_platforms:
            # Which address failed how is not told where a name has several.
            stranger = (
                ", or what answers has a certificate of another name, or of an authority other than `ca`'s" if self.config.tls else ""
            )
            return NoPlatform(
                f"no platform answers at {self.config.endpoint} (from {self.config.source}): start it with `alveary up`{stranger}",
                code.name,
            )
        return AlvearyError(error.details() or code.name, code.name)

    def _warn_if_behind(self, metadata: Any) -> None:
        if self._is_told_behind:
            return
        for key, value in metadata or ():
            if key == _BEHIND:
                self._is_told_behind = True
                text = f"what is shown may be out of date: the platform is still reading its event log ({value})"
                warnings.warn(AlvearyWarning(text), stacklevel=2)


class Reconnect:
    """When a stream that broke is opened again, and when its error is the caller's.

    A platform that is down or being restarted (UNAVAILABLE) is waited for, `_PATIENCE_SECONDS` at most. A connection that is torn
    down under a call also shows as INTERNAL, UNKNOWN or CANCELLED, but so does a fault of the platform that every repetition meets
    again: those are tried `_FAULT_TRIES` times, or for `_TORN_PATIENCE_SECONDS` where the text says that a proxy tore the stream,
    which it does for as long as a service behind it restarts. Each reply resets all counts.
    """

    _PATIENCE_SECONDS = 3600.0
    _TORN_PATIENCE_SECONDS = 60.0
    _FAULT_TRIES = 5

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._backoff = Backoff(_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self.progress()

    def progress(self) -> None:
        """Note that a reply arrived."""
        self._backoff.reset()
        self._faults = 0
        self._since = time.monotonic()

    async def failed(self, error: grpc.aio.AioRpcError) -> None:
        """Wait until the stream is to be opened again.

        Raises:
            AlvearyError: opening it again is of no use.
        """
        self._faults += error.code() in _FAULTY
        waited = time.monotonic() - self._since
        is_away = error.code() == grpc.StatusCode.UNAVAILABLE and waited < self._PATIENCE_SECONDS
        is_torn = _is_torn(error) and waited < self._TORN_PATIENCE_SECONDS
        is_fault = error.code() in _FAULTY and self._faults < self._FAULT_TRIES
        if not (is_away or is_torn or is_fault):
            raise self._connection.translate(error) from error
        await self.pause()

    async def pause(self) -> None:
        """Wait before the next try, longer each time."""
        await self._backoff.pause()


def _channel(config: Config, endpoint: str) -> grpc.aio.Channel:
    if config.tls:
        trusted = grpc.ssl_channel_credentials(config.ca.encode() or None)
        return grpc.aio.secure_channel(endpoint, trusted, options=_OPTIONS)
    return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)


def _is_transient(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and (
        error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED) or _is_torn(error)
    )


def _is_torn(error: grpc.aio.AioRpcError) -> bool:
    """Whether a connection or stream was torn on its way, as gRPC's own library words it."""
    details = error.details() or ""
    return error.code() in _FAULTY and any(text in details for text in _TORN_TEXTS)
