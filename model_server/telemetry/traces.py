"""OpenTelemetry traces of requests, sent by OTLP over HTTP. Off unless the standard `OTEL_` variables ask for them.

A call has a span from its arrival to the end of its answer. Each of its requests has a span below it, with one span for
each of its phases: queue, prefill, decode. They are written when the request ends, from times that the engine has taken
anyway, and hold no text. A thread of the SDK sends them; if its queue is full, new spans are dropped.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from model_server.request import FinishReason, Request

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
REQUIRED = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
FLUSH_SECONDS = 5
"""How long the last spans have to reach the collector when the server ends."""


def start(environ: Mapping[str, str], model_name: str) -> Tracer | None:
    """Return a tracer if the environment asks for traces, else None; the log says why they cannot be had."""
    if not _is_asked_for(environ):
        return None
    protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("traces are off: OTLP over %s is not supported, only http/protobuf.", protocol)
        return None
    if not all(_is_installed(module) for module in REQUIRED):
        log.warning("traces are off: they need pip install 'mistral-7b-kserve[traces]'.")
        return None
    try:
        tracer = Tracer(model_name, names_service=_names_service(environ))
    except ValueError as error:
        log.warning("traces are off: %s", error)
        return None
    log.info("traces are on")
    return tracer


def _is_asked_for(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporters = environ.get("OTEL_TRACES_EXPORTER")
    if exporters:
        return "otlp" in (name.strip() for name in exporters.split(","))
    return any(environ.get(name) for name in ENDPOINTS)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _names_service(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("OTEL_SERVICE_NAME")) or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")


class Tracer:
    """Begins the traces of calls and sends their spans."""

    def __init__(self, model_name: str, *, names_service: bool = False) -> None:
        """Start the thread that sends spans.

        Args:
            names_service: the environment has a `service.name`; else it is the model's name.
        """
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({} if names_service else {"service.name": model_name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._propagator = TraceContextTextMapPropagator()
        self.spans = self._provider.get_tracer("model_server")
        self.model_name = model_name

    def begin(self, headers: Mapping[str, str]) -> Trace:
        """Begin the span of a call; its parent is in the header `traceparent`, if there is one."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract(headers, context=Context())
        began_ns = time.time_ns()
        span = self.spans.start_span("request", context=parent, kind=SpanKind.SERVER, start_time=began_ns)
        return Trace(self, span, clock_ns=began_ns - time.monotonic_ns())

    def stop(self) -> None:
        """Send the last spans, for a few seconds at most."""
        # A thread: with a dead collector the SDK takes longer than it is given.
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(FLUSH_SECONDS)


class Trace:
    """The spans of one HTTP call."""

    def __init__(self, tracer: Tracer, span: Span, clock_ns: int) -> None:
        """Continue the trace of a span; `clock_ns` plus `time.monotonic_ns()` is the time since 1970."""
        from opentelemetry.trace import format_trace_id

        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        self._tracer = tracer
        self._span = span
        self._clock_ns = clock_ns

    def finish(self, method: str, route: str | None, status: int | None, outcome: str | None) -> None:
        """End the span of the call.

        Args:
            route: the path of the route, None if there is no such route.
            status: the status of the answer, None if it has not begun.
            outcome: "cancelled", the code of an error, or None.
        """
        attributes = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "error.type": outcome,
        }
        self._span.update_name(f"{method} {route}" if route else method)
        self._end(self._span, attributes, self._clock_ns + time.monotonic_ns(), failed=(status or 500) >= 500)

    def add_request(self, request: Request, outcome: str, ended_s: float) -> None:
        """Write the spans of a request that has ended.

        Args:
            outcome: its finish reason, "cancelled", or the code of its error.
            ended_s: `time.monotonic()` of its end.
        """
        if not self._span.get_span_context().trace_flags.sampled:
            return
        ended_ns = self._at(ended_s)
        phases = [("queue", request.arrived_s), ("prefill", request.admitted_s), ("decode", request.first_token_s)]
        begins = [(name, self._at(began_s)) for name, began_s in phases if began_s is not None]
        whole = self._start(f"text_completion {self._tracer.model_name}", self._span, begins[0][1])
        for (name, began_ns), end_ns in zip(begins, [ns for _, ns in begins[1:]] + [ended_ns], strict=True):
            self._start(name, whole, began_ns).end(end_ns)
        finished = outcome in set(FinishReason)
        failed = not finished and outcome != "cancelled"
        self._end(whole, _attributes(request, outcome, self._tracer.model_name), ended_ns, failed=failed)

    def _at(self, seconds: float) -> int:
        return self._clock_ns + int(seconds * 1e9)

    def _start(self, name: str, parent: Span, began_ns: int) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        return self._tracer.spans.start_span(name, set_span_in_context(parent, Context()), start_time=began_ns)

    def _end(self, span: Span, attributes: Mapping[str, Any], ended_ns: int, *, failed: bool) -> None:
        from opentelemetry.trace import StatusCode

        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(ended_ns)


def _attributes(request: Request, outcome: str, model_name: str) -> dict[str, Any]:
    """Return what OpenTelemetry's conventions for generative AI name; nothing of the prompt or the answer."""
    sampling, generate = request.sampling, request.sampling.generate
    finished = outcome in set(FinishReason)
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mistral-7b-kserve",
        "gen_ai.request.model": model_name,
        "gen_ai.request.max_tokens": sampling.max_new_tokens,
        "gen_ai.request.choice.count": sampling.num_choices if sampling.num_choices > 1 else None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.temperature": generate.get("temperature"),
        "gen_ai.request.top_p": generate.get("top_p"),
        "gen_ai.request.top_k": generate.get("top_k"),
        "gen_ai.response.finish_reasons": (outcome,) if finished else None,
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.num_cached_tokens,
        "gen_ai.usage.output_tokens": request.num_output_tokens,
        "mistral.request_id": request.request_id or None,
        "mistral.key": request.caller.key,
        "error.type": None if finished else outcome,
    }
