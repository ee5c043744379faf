"""Traces of runs by OpenTelemetry, sent in batches from a thread of their own. Needs the extra `otel`.

The trace of a run and its spans have ids that are made of the run's id. So whoever ends a run, in whatever process,
tells of the root, and the parts that other processes have told of are found in it.
"""

from __future__ import annotations

import asyncio
import re
from hashlib import sha256
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, Status, StatusCode, TraceFlags
from opentelemetry.trace import SpanKind as OtelKind

from afterglow import __version__
from afterglow.contracts import Span, SpanKind
from afterglow.errors import ConfigError

DEFAULT_PATH = "/v1/traces"
SEND_EVERY_MS = 2000
SEND_TIMEOUT_S = 3.0
CLOSE_S = 2.0  # after it, what cannot be sent is dropped
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]([0-9a-f])")
KINDS: dict[SpanKind, OtelKind] = {
    "created": OtelKind.PRODUCER,
    "run": OtelKind.CONSUMER,
    "attempt": OtelKind.INTERNAL,
    "model": OtelKind.CLIENT,
    "tool": OtelKind.INTERNAL,
}


class OtlpTraces:
    """A `contracts.Traces` that sends them by OTLP over HTTP."""

    def __init__(self, url: str) -> None:
        """url: of the collector; without a path, the usual one is added. Raises ConfigError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"trace_url {url!r} is no http or https address, such as http://localhost:4318.")
        endpoint = url if parts.path.strip("/") else url.rstrip("/") + DEFAULT_PATH
        self._exporter = OTLPSpanExporter(endpoint=endpoint, timeout=SEND_TIMEOUT_S)
        self._batches = BatchSpanProcessor(self._exporter, schedule_delay_millis=SEND_EVERY_MS)
        self._resource = Resource.create({"service.name": "afterglow", "service.version": __version__})
        self._scope = InstrumentationScope("afterglow", __version__)
        self._random = RandomIdGenerator()

    def add(self, span: Span) -> None:
        links: tuple[Link, ...] = ()
        parent: SpanContext | None
        if span.kind == "run":
            context, parent = _root(span), None
        elif span.kind == "attempt":
            context, parent = _attempt(span), _root(span)
        elif span.kind == "created":
            parent = _caller(span.caller)
            if parent is None:
                return
            context, links = self._within(parent), (Link(_root(span)),)
        else:
            parent = _attempt(span)
            context = self._within(parent)
        self._batches.on_end(
            ReadableSpan(
                span.name,
                context,
                parent,
                self._resource,
                span.attributes,
                links=links,
                kind=KINDS[span.kind],
                status=Status(StatusCode.ERROR, span.failure) if span.failure else Status(),
                start_time=int(span.began * 1e9),
                end_time=int(span.ended * 1e9),
                instrumentation_scope=self._scope,
            )
        )

    def _within(self, parent: SpanContext) -> SpanContext:
        return _context(parent.trace_id, self._random.generate_span_id())

    async def close(self) -> None:
        # Once the exporter is shut, it tries nothing again, and the rest is dropped at once.
        giving_up = asyncio.get_running_loop().call_later(CLOSE_S, self._exporter.shutdown)
        await asyncio.to_thread(self._batches.shutdown)
        giving_up.cancel()


def _root(span: Span) -> SpanContext:
    return _context(_trace_id(span), _span_id(span.run_id))


def _attempt(span: Span) -> SpanContext:
    return _context(_trace_id(span), _span_id(f"{span.run_id}/{span.attempt}"))


def _trace_id(span: Span) -> int:
    return int.from_bytes(sha256(span.run_id.encode()).digest()[:16], "big")


def _span_id(place: str) -> int:
    return int.from_bytes(sha256(place.encode()).digest()[16:24], "big")


def _context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=SAMPLED)


def _caller(traceparent: str) -> SpanContext | None:
    """The span that a request came from, if its header is one and says that its trace is kept."""
    found = TRACEPARENT.fullmatch(traceparent)
    if found is None or not int(found[3], 16) & TraceFlags.SAMPLED:
        return None
    context = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=SAMPLED)
    return context if context.is_valid else None
