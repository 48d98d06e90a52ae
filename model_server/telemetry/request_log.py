"""The request log: a request's metrics and one log line at its end, never its text."""

from __future__ import annotations

import logging
import time

from model_server.request import Request
from model_server.telemetry import metrics, startup

logger = logging.getLogger(__name__)


def token(request: Request, count: int = 1) -> None:
    """Record that a request has just received `count` more tokens."""
    now_s = time.monotonic()
    if request.first_token_s is None:
        request.first_token_s = now_s
        startup.phase_ended("first token")
        metrics.time_to_first_token_seconds.observe(now_s - request.arrived_s)
        metrics.prompt_tokens_total.inc(request.num_prompt_tokens)
        metrics.prompt_tokens_cached_total.inc(request.num_cached)
    else:
        metrics.inter_token_seconds.observe(now_s - request.last_token_s)
    request.last_token_s = now_s
    request.num_generated += count
    metrics.generated_tokens_total.inc(count)


def ended(request: Request, outcome: str) -> None:
    """Write the line of a finished request; `outcome` is its finish reason, "cancelled" or an error's code."""
    now_s = time.monotonic()
    first_s = request.first_token_s
    fields = {
        "request_id": request.request_id,
        "lane": request.sampling.lane.value,
        "outcome": outcome,
        "prompt_tokens": request.num_prompt_tokens,
        "cached_tokens": request.num_cached,
        "completion_tokens": request.num_generated,
        "first_token_seconds": None if first_s is None else round(first_s - request.arrived_s, 4),
        "total_seconds": round(now_s - request.arrived_s, 4),
    }
    # As `extra` the fields become members of a JSON line.
    logger.info(
        "request %s",
        " ".join(f"{k}={v}" for k, v in fields.items() if v is not None),
        extra=fields,
    )
