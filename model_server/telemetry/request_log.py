"""The request log: a request's metrics, and one log line at its end without its text."""

from __future__ import annotations

import logging
import time

from model_server.request import Request
from model_server.telemetry import metrics, startup

logger = logging.getLogger(__name__)


def first_token(seconds: float, *, num_prompt_tokens: int, num_cached_tokens: int) -> None:
    """Record the first token of a request, `seconds` after its arrival."""
    startup.phase_ended("first token")
    metrics.time_to_first_token_seconds.observe(seconds)
    metrics.prompt_tokens_total.inc(num_prompt_tokens)
    metrics.prompt_tokens_cached_total.inc(num_cached_tokens)
    metrics.generated_tokens_total.inc()


def next_token(seconds: float) -> None:
    """Record another token of a request, `seconds` after the one before."""
    metrics.inter_token_seconds.observe(seconds)
    metrics.generated_tokens_total.inc()


def finished(request: Request, outcome: str, *, batched: bool) -> None:
    """Write the log line of a finished request.

    Args:
        outcome: its finish reason, "cancelled", or the code of its error.
        batched: false if the fallback generated it.
    """
    now_s = time.monotonic()
    first_s = request.first_token_s
    key = request.caller.key
    if key is not None and first_s is not None:
        metrics.key_tokens_total.labels(key, "prompt").inc(request.num_prompt_tokens * request.counts_prompt)
        metrics.key_tokens_total.labels(key, "generated").inc(request.num_output_tokens * request.counts_output)
    trace = request.caller.trace
    if trace is not None:
        trace.add_request(request, outcome, now_s)
    fields = {
        "request_id": request.request_id,
        "key": key,
        "trace_id": None if trace is None else trace.trace_id,
        "batched": batched,
        "outcome": outcome,
        "prompt_tokens": request.num_prompt_tokens,
        "cached_tokens": request.num_cached_tokens,
        "completion_tokens": request.num_output_tokens,
        "first_token_seconds": None if first_s is None else round(first_s - request.arrived_s, 4),
        "total_seconds": round(now_s - request.arrived_s, 4),
    }
    # The text is for people; as `extra` the fields become members of a JSON line.
    logger.info(
        "request %s",
        " ".join(f"{k}={v}" for k, v in fields.items() if v is not None),
        extra=fields,
    )
