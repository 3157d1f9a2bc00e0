"""The gRPC server that all services share: authentication, logs, deadlines, error mapping, metrics, drain."""

from __future__ import annotations

import asyncio
import functools
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import nats.errors
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from alveary_contracts import rules
from alveary_core import auth, telemetry
from alveary_core.disk import DiskGuard
from alveary_core.errors import AlvearyError, InvalidArgument, NotFound, Unauthenticated, Unavailable

# Unary calls that name no deadline get this one, seconds.
DEFAULT_DEADLINE = 60.0
MAX_MESSAGE = 64 << 20
# Requests above this are checked in a thread, bytes.
_LARGE = 256 << 10
# After how long a question for links to upload to is given up if the disk is nearly full then, seconds.
_PATIENCE_OF_UPLOADS = 10.0
# Anybody may ask whether the server lives and what it speaks.
_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.")


class Interceptor(grpc.aio.ServerInterceptor):
    """Everything that surrounds a call, in one place."""

    def __init__(self, token_secret: str) -> None:
        self._secret = token_secret
        self.disk: DiskGuard | None = None
        # Each says how far a read model is behind, as words; empty: it is not.
        self.behind: list[Callable[[], str]] = []

    def _lag(self) -> str:
        return ", ".join(filter(None, (behind() for behind in self.behind)))

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_OPEN):
            return handler
        metadata = {k: v for k, v in handler_call_details.invocation_metadata or () if isinstance(v, str)}

        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
            inner: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

            async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                call = _Call(self._secret, method, metadata, context, self._lag())
                try:
                    call.enter()
                    request = await _checked(request)
                    async for reply in inner(request, context):
                        yield reply
                except BaseException as error:
                    await call.failed(error)
                    raise
                call.done("OK")

            return make(stream, _tolerant(handler.request_deserializer), handler.response_serializer)

        make_unary = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        inner_unary: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
        disk = self.disk

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            call = _Call(self._secret, method, metadata, context, self._lag())
            try:
                call.enter()
                request = await _checked(request)
                remaining = context.time_remaining()
                limit = None if handler.request_streaming else min(remaining or DEFAULT_DEADLINE, DEFAULT_DEADLINE * 10)
                if disk is None:
                    reply = await _within(limit, inner_unary, request, context)
                else:
                    reply = await _beside_disk(disk, method, limit, inner_unary, request, context)
            except BaseException as error:
                await call.failed(error)
                raise
            call.done("OK")
            return reply

        return make_unary(unary, _tolerant(handler.request_deserializer), handler.response_serializer)


async def _within(limit: float | None, work: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    async with asyncio.timeout(limit):
        result = work(request, context)
        return await result if inspect.isawaitable(result) else result


async def _beside_disk(
    disk: DiskGuard, method: str, limit: float | None, work: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]
) -> Any:
    """The reply; while the platform's own disk is nearly full, an answer that says so instead of links to upload to, and
    before the caller stops waiting where the message bus or the object store can write nothing.

    Raises:
        ResourceExhausted: it did not get done, and the disk is nearly full.
    """
    uploads = _hands_out_links(method)
    what = "this upload is refused" if uploads else f"{method.rpartition('/')[2]} did not get done"
    calling = asyncio.ensure_future(_within(limit, work, request, context))
    try:
        if limit is not None:
            patience = min(limit * 0.75, _PATIENCE_OF_UPLOADS) if uploads else limit * 0.75
            await asyncio.wait([calling], timeout=patience)
            # A call that is worth waiting for, or repeating, stays so while there is space for it.
            if not calling.done() and (uploads or (await disk.look()).critical):
                await disk.require(what)
        reply = await calling
    except (TimeoutError, Unavailable, nats.errors.Error):
        if uploads or (await disk.look()).critical:
            await disk.require(what)
        raise
    finally:
        calling.cancel()
    if uploads and reply.slots:
        await disk.require(what)
    return reply


@functools.cache
def _hands_out_links(method: str) -> bool:
    """Whether the answer of "/package.Service/Method" has links to upload to (UploadSlot)."""
    found = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
    return "slots" in found.output_type.fields_by_name


@dataclass(frozen=True)
class _Malformed:
    """Stands for a request whose bytes are no message of its type."""

    why: str


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """gRPC calls a request that cannot be read an error of the server; this leaves it to `_checked`."""
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError, RecursionError) as error:
            return _Malformed(str(error) or type(error).__name__)

    return read


async def _checked(request: Any) -> Any:
    """The request, or the stream of requests, with each message held to the rules of the contracts before anybody sees it.

    Raises:
        InvalidArgument: a value breaks its rule; names fields, values and what is allowed. Of a stream: when it comes to that.
    """
    if isinstance(request, (Message, _Malformed)):
        await _check(request)
        return request
    return _checked_stream(request)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        await _check(request)
        yield request


async def _check(request: Message | _Malformed) -> None:
    if isinstance(request, _Malformed):
        raise InvalidArgument(("request", f"its bytes are no message of the type that this call takes: {request.why}"))
    if problem := rules.too_large(request):
        raise InvalidArgument((request.DESCRIPTOR.name, problem))
    large = request.ByteSize() > _LARGE
    found = await asyncio.to_thread(rules.problems, request) if large else rules.problems(request)
    if found:
        raise InvalidArgument(*found)


class _Call:
    """One call: who, how long, how it ended."""

    def __init__(
        self, secret: str, method: str, metadata: dict[str, str], context: grpc.aio.ServicerContext[Any, Any], lag: str = ""
    ) -> None:
        self._secret, self._metadata, self._context, self._lag = secret, metadata, context, lag
        if lag:  # what is answered may be older than it should
            context.set_trailing_metadata((("alveary-behind", lag),))
        _, self._service, self._method = method.split("/")
        self._start = time.monotonic()

    def enter(self) -> None:
        telemetry.start_trace(self._metadata.get("traceparent", ""))
        scheme, _, token = self._metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("this call carries no token: send metadata 'authorization: Bearer <token>'")
        principal = auth.verify(self._secret, token)
        auth.caller.set(principal)
        structlog.contextvars.bind_contextvars(workspace=principal.workspace, subject=principal.subject)

    def done(self, code: str) -> None:
        seconds = time.monotonic() - self._start
        telemetry.RPCS.labels(self._service, self._method, code).inc()
        telemetry.RPC_SECONDS.labels(self._service, self._method).observe(seconds)
        log = telemetry.logger()
        write = log.debug if code in ("OK", "CANCELLED") else log.info
        write("rpc", rpc=f"{self._service}/{self._method}", code=code, seconds=round(seconds, 4))

    async def failed(self, error: BaseException) -> None:
        """Map what a handler raised to a status; does not return for exceptions that the client must see."""
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            self.done("CANCELLED")
            return
        if isinstance(error, grpc.aio.AbortError):
            self.done("ABORTED")
            return
        if self._lag and isinstance(error, (NotFound, InvalidArgument)):
            # It may be about what has not been read yet.
            error = Unavailable(f"{error} (the platform is still reading its history, {self._lag}: try again later)")
        if isinstance(error, AlvearyError):
            status = error.status()
        elif isinstance(error, nats.errors.Error):  # also when it answers too late
            telemetry.logger().warning("rpc.unavailable", rpc=f"{self._service}/{self._method}", exc_info=error)
            status = Unavailable(f"{self._method}: the message bus does not answer ({type(error).__name__}): try again").status()
        elif isinstance(error, TimeoutError):
            status = status_pb2.Status(code=code_pb2.DEADLINE_EXCEEDED, message=f"{self._method} did not finish before its deadline")
        else:
            telemetry.logger().error("rpc.bug", rpc=f"{self._service}/{self._method}", exc_info=error)
            status = status_pb2.Status(
                code=code_pb2.INTERNAL,
                message=f"{self._method} failed inside the platform; its log has trace {telemetry.traceparent.get()[3:35]}",
            )
        self.done(code_pb2.Code.Name(status.code))
        await self._context.abort_with_status(rpc_status.to_status(status))


class Server:
    """A gRPC server with health and reflection."""

    def __init__(self, token_secret: str) -> None:
        # A trainer or the archiver has no secret of the platform: then no token is good.
        token_secret = token_secret or secrets.token_hex(32)
        self.interceptor = Interceptor(token_secret)
        self.behind = self.interceptor.behind
        self.server = grpc.aio.server(
            interceptors=[self.interceptor],
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", 30000),
            ],
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._names: list[str] = []
        self.port = 0

    def add(self, descriptors: Iterable[ServiceDescriptor]) -> None:
        """Say which services were added to `server`."""
        self._names += [d.full_name for d in descriptors]

    async def start(self, listen: str) -> int:
        """Begin to serve on host:port; returns the port.

        Raises:
            RuntimeError: the port is taken.
        """
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.server)
        self.port = self.server.add_insecure_port(listen)
        await self.server.start()
        for name in ["", *self._names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    async def stop(self, grace: float = 5.0) -> None:
        """Drain: say so, refuse new calls, let those under way end within `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)
