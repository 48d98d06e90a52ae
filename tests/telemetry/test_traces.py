"""Traces: what a real server sends to an OTLP collector, and that they cost nothing while they are off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from model_server.telemetry import traces
from tests.support.server_process import ServerProcess

PREDICT = "/v1/models/mistral-7b:predict"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}


class Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP, as the OpenTelemetry collector does on port 4318."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def wait_for(self, trace_id: str, num_spans: int) -> dict[str, Any]:
        """Return the spans of a trace by name, once all are there."""
        deadline_s = time.monotonic() + 30
        while True:
            found = [span for span in [*self.spans] if span.trace_id.hex() == trace_id]
            if len(found) == num_spans:
                return {span.name: span for span in found}
            assert time.monotonic() < deadline_s, [span.name for span in found]
            time.sleep(0.05)


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
        for resource in body.resource_spans:
            self.server.services |= {
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}


def seconds(span: Any) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.shutdown()
    collector.server_close()


@pytest.fixture(scope="module")
def traced(start_server: Callable[..., ServerProcess], collector: Collector) -> ServerProcess:
    return start_server(
        "--log_format",
        "json",
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        },
    )


def test_queue_prefill_and_decode_make_up_the_request_below_the_callers_span(
    traced: ServerProcess, collector: Collector
) -> None:
    body = {"model": "mistral-7b", "prompt": "words of a secret", "max_tokens": 6, "temperature": 0.5}

    answer = httpx.post(f"{traced.url}/openai/v1/completions", json=body, headers=PARENT, timeout=60)

    spans = collector.wait_for(TRACE_ID, 5)
    call, request = spans["POST /openai/v1/completions"], spans["text_completion mistral-7b"]
    phases = [spans["queue"], spans["prefill"], spans["decode"]]
    assert answer.headers["x-trace-id"] == TRACE_ID
    assert call.parent_span_id.hex() == PARENT_ID
    assert request.parent_span_id == call.span_id
    assert {phase.parent_span_id for phase in phases} == {request.span_id}
    assert sum(map(seconds, phases)) == pytest.approx(seconds(request), abs=1e-6)
    assert call.start_time_unix_nano <= request.start_time_unix_nano
    assert request.end_time_unix_nano <= call.end_time_unix_nano
    [line] = [json.loads(line) for line in traced.log.splitlines() if '"total_seconds"' in line and TRACE_ID in line]
    assert seconds(request) == pytest.approx(line["total_seconds"], abs=1e-4)
    usage = answer.json()["usage"]
    told = attributes(request)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert told["gen_ai.request.temperature"] == 0.5
    assert "secret" not in str(collector.spans)
    assert collector.services == {"mistral-7b"}


def test_an_error_has_the_id_of_its_trace_and_its_code_in_the_span(traced: ServerProcess, collector: Collector) -> None:
    answer = httpx.post(f"{traced.url}{PREDICT}", json={"prompt": "words of a secret", "top_p": "secret"}, timeout=60)

    trace_id = answer.headers["x-trace-id"]
    [call] = collector.wait_for(trace_id, 1).values()
    assert attributes(call)["http.response.status_code"] == answer.status_code == 400
    assert attributes(call)["error.type"] == "bad_request"
    assert "secret" not in str(collector.spans)
    assert [line for line in traced.log.splitlines() if trace_id in line and "bad_request" in line]


def test_a_caller_who_does_not_sample_gets_no_spans(traced: ServerProcess, collector: Collector) -> None:
    unsampled = {"traceparent": f"00-{'c' * 32}-{PARENT_ID}-00"}
    sampled = {"traceparent": f"00-{'d' * 32}-{PARENT_ID}-01"}
    for headers in (unsampled, sampled):
        httpx.post(f"{traced.url}{PREDICT}", json={"prompt": "a", "max_new_tokens": 1}, headers=headers, timeout=60)

    collector.wait_for("d" * 32, 5)
    assert not [span for span in collector.spans if span.trace_id.hex() == "c" * 32]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTLP over grpc is not supported"),
    ],
)
def test_traces_are_off_unless_the_variables_ask_for_otlp_over_http(
    environ: dict[str, str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert traces.start(environ, "m") is None
    assert [words in record.message for record in caplog.records] == [True] * bool(words)


def test_a_server_without_traces_does_not_import_the_sdk() -> None:
    """FastAPI itself imports opentelemetry-api; the SDK and the exporter are ours."""
    code = (
        "import sys; import model_server.server, model_server.api.http.middleware;"
        "from model_server.telemetry import traces; assert traces.start({}, 'm') is None;"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )

    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110)

    assert (child.stdout.strip(), child.returncode) == ("[]", 0), child.stderr


def test_a_dead_collector_drops_spans_and_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on port 9. The queue has 16 spans; ten times as many are written without waiting for a send."""
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_BSP_MAX_QUEUE_SIZE": "16",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    tracer = traces.Tracer("m")

    for _ in range(160):
        tracer.begin({}).finish("POST", "/predict", 200, None)

    [processor] = tracer._provider._active_span_processor._span_processors
    assert len(processor._batch_processor._queue) <= 16  # type: ignore[attr-defined]
    tracer.stop()
