"""Every Prometheus series of the server, declared once: names, labels and buckets.

The middleware counts answers, the request log counts tokens and times. The series are in the default registry, which
`/metrics` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import Counter, Gauge, Histogram

FIRST_TOKEN_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80, 160)
"""From a short prompt on a GPU to a long queue."""
INTER_TOKEN_BUCKETS_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.35, 0.6, 1, 2.5, 10)
"""A reader notices gaps from about 0.1 s; a step of a 7B model takes 0.02 to 0.06 s on an A10G."""
REQUEST_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 600)
"""Up to the 600 s that KServe and Knative allow a request."""

requests_total = Counter(
    "mistral_requests_total",
    "Answers given, by route and by outcome: ok, cancelled (the client left), or the code word of the error.",
    ["route", "outcome"],
)
request_seconds = Histogram(
    "mistral_request_seconds",
    "From the arrival of a request to the last byte of its answer.",
    ["route"],
    buckets=REQUEST_BUCKETS_S,
)
time_to_first_token_seconds = Histogram(
    "mistral_time_to_first_token_seconds",
    "From the arrival of a request to its first token, waiting included.",
    buckets=FIRST_TOKEN_BUCKETS_S,
)
inter_token_seconds = Histogram(
    "mistral_inter_token_seconds",
    "Between two tokens of one answer.",
    buckets=INTER_TOKEN_BUCKETS_S,
)
prompt_tokens_total = Counter("mistral_prompt_tokens_total", "Prompt tokens of the requests taken in.")
prompt_tokens_cached_total = Counter(
    "mistral_prompt_tokens_cached_total",
    "Prompt tokens found in the prefix cache.",
)
generated_tokens_total = Counter("mistral_generated_tokens_total", "Tokens generated.")
drafted_tokens_total = Counter("mistral_drafted_tokens_total", "Tokens guessed by prompt lookup and computed.")
drafted_tokens_accepted_total = Counter(
    "mistral_drafted_tokens_accepted_total",
    "Guessed tokens that the model chose.",
)
key_requests_total = Counter(
    "mistral_key_requests_total",
    "Requests to generate, by the name of their API key; refused ones included.",
    ["key"],
)
key_tokens_total = Counter(
    "mistral_key_tokens_total",
    "Tokens of finished requests, by the name of their API key and by kind: prompt or generated.",
    ["key", "kind"],
)
requests_running = Gauge("mistral_requests_running", "Sequences being generated.")
requests_waiting = Gauge("mistral_requests_waiting", "Sequences waiting for admission.")
kv_cache_usage_ratio = Gauge("mistral_kv_cache_usage_ratio", "Part of the KV cache that is reserved, 0 to 1.")
load_seconds = Gauge("mistral_load_seconds", "How long loading the model took, warm-up included.")
degraded = Gauge(
    "mistral_degraded",
    "1 if a GPU runs without this feature, and so more slowly: flash_attention or cuda_graphs.",
    ["feature"],
)
gpu_alloc_retries = Gauge(
    "mistral_gpu_alloc_retries",
    "How often the GPU's memory was exhausted until cached blocks were freed, since the start.",
)
gpu_ooms = Gauge("mistral_gpu_ooms", "How often an allocation on the GPU failed, since the start.")


def watch_engine(running: Callable[[], float], waiting: Callable[[], float], kv_usage: Callable[[], float]) -> None:
    """Have the gauges read the engine when they are scraped."""
    requests_running.set_function(running)
    requests_waiting.set_function(waiting)
    kv_cache_usage_ratio.set_function(kv_usage)


def watch_gpu_memory(stats: Callable[[], Mapping[str, float]]) -> None:
    """Have the gauges read the allocator's statistics when they are scraped."""
    gpu_alloc_retries.set_function(lambda: stats().get("num_alloc_retries", 0))
    gpu_ooms.set_function(lambda: stats().get("num_ooms", 0))


def answered(route: str, outcome: str, seconds: float) -> None:
    """Count one finished answer."""
    requests_total.labels(route, outcome).inc()
    request_seconds.labels(route).observe(seconds)
