"""Structured logs, trace context, metrics."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
from contextvars import ContextVar
from typing import Any

import structlog
from prometheus_client import Counter, Gauge, Histogram

# W3C trace context of the work at hand (https://www.w3.org/TR/trace-context/).
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SECRET = re.compile(r"(eyJ[\w-]{8,}\.[\w-]+\.[\w-]+|X-Amz-Signature=[0-9a-f]+)")

RPCS = Counter("alveary_grpc_requests_total", "gRPC calls", ["service", "method", "code"])
RPC_SECONDS = Histogram("alveary_grpc_seconds", "Duration of gRPC calls, s", ["service", "method"])
APPENDS = Counter("alveary_events_appended_total", "Events appended", ["type"])
CONFLICTS = Counter("alveary_append_conflicts_total", "Appends that met a newer event", ["aggregate"])
VIEW = Gauge("alveary_view_sequence", "Sequence of the event log that a read model includes", ["view"])
COPIED = Gauge("alveary_archived_sequence", "Sequence up to which a stream is copied to the object store", ["stream"])
WAITING = Gauge("alveary_runs_waiting", "Runs in the queue of a target", ["workspace", "target"])
PLACED = Gauge("alveary_runs_placed", "Runs that hold a place on a node", ["workspace"])
NODES = Gauge("alveary_nodes", "Nodes that beat", ["workspace", "target"])
BUILDS = Gauge("alveary_builds_running", "Images being built by this replica")
ATTEMPTS = Gauge("alveary_attempts_running", "Attempts on this node")
LOG_LOST = Counter("alveary_log_lines_lost_total", "Lines of this process's own log that could not be written")
LOST = Counter("alveary_messages_lost_total", "Log lines and metric points that the message bus did not take", ["kind"])
HANDLED = Counter("alveary_events_handled_total", "Events handled", ["handler", "outcome"])
DEAD_LETTERS = Counter("alveary_dead_letters_total", "Events that could not be handled and were set aside", ["consumer"])
DEAD_LETTERS_NOW = Gauge("alveary_dead_letters_open", "Dead letters that are neither retried nor dropped yet")
STALL = Gauge("alveary_loop_stall_seconds", "Longest delay of the event loop, s, in the last minute and since the start", ["window"])
STALLS = Counter("alveary_loop_stalls_total", "Delays of the event loop above 0.1 s")


def start_trace(parent: str = "") -> str:
    """Enter the caller's trace as a child, or begin one; returns the traceparent."""
    trace = parent[3:35] if _TRACEPARENT.fullmatch(parent) else secrets.token_hex(16)
    value = f"00-{trace}-{secrets.token_hex(8)}-01"
    traceparent.set(value)
    return value


def _add_trace(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    current = traceparent.get()
    if current:
        event["trace_id"] = current[3:35]
    return event


def _redact(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = _SECRET.sub("[secret]", value)
    return event


class _Stderr:
    """Writes lines to stderr, and never raises: its file may be on a disk that is full, and a line that is lost must not end
    what it speaks of. What could not be written is counted, and said as soon as something can be.
    """

    lost = 0

    def msg(self, message: str) -> None:
        line = message.encode(errors="backslashreplace") + b"\n"
        if _Stderr.lost:
            line = f'{{"event": "log.lost", "lines": {_Stderr.lost}, "level": "warning"}}\n'.encode() + line
        try:
            # A line that was written in part is ended, so that the next one can be read.
            if os.write(2, line) < len(line):
                os.write(2, b"\n")
            _Stderr.lost = 0
        except OSError:
            _Stderr.lost += 1
            LOG_LOST.inc()

    debug = info = warning = warn = error = critical = exception = fatal = log = msg


def configure(level: str, service: str) -> None:
    """JSON lines on stderr, each with service, level, time and the ids bound to its context."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _add_trace,
            structlog.processors.format_exc_info,
            _redact,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *_: _Stderr(),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The structured logger."""
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return log
