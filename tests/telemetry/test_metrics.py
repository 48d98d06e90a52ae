"""Metrics: the series that dashboards and scalers rely on, by name."""

from pathlib import Path

from prometheus_client import REGISTRY, generate_latest

from model_server.telemetry import metrics

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"


def test_series_have_the_documented_names_and_labels():
    metrics.answered("predict", "ok", 0.1)
    metrics.degraded.labels("cuda_graphs").set(0)
    text = generate_latest(REGISTRY).decode()
    for series in (
        'mistral_requests_total{outcome="ok",route="predict"}',
        "mistral_requests_running ",
        "mistral_requests_waiting ",
        "mistral_time_to_first_token_seconds_bucket",
        "mistral_inter_token_seconds_bucket",
        'mistral_request_seconds_count{route="predict"}',
        "mistral_prompt_tokens_total ",
        "mistral_prompt_tokens_cached_total ",
        "mistral_generated_tokens_total ",
        "mistral_drafted_tokens_total ",
        "mistral_drafted_tokens_accepted_total ",
        "mistral_kv_cache_usage_ratio ",
        "mistral_load_seconds ",
        'mistral_degraded{feature="cuda_graphs"}',
        "mistral_gpu_alloc_retries ",
        "mistral_gpu_ooms ",
    ):
        assert f"\n{series}" in text


def test_docs_name_every_series():
    monitoring = DOCS.read_text()
    for series in REGISTRY.collect():
        if series.name.startswith("mistral_"):
            assert f"`{series.name}{'_total' if series.type == 'counter' else ''}" in monitoring


def test_gauges_show_the_engine_as_it_is_when_they_are_read():
    running = [3]
    metrics.watch_engine(lambda: running[0], lambda: 2, lambda: 0.5)
    running[0] = 4
    assert REGISTRY.get_sample_value("mistral_requests_running") == 4
    assert REGISTRY.get_sample_value("mistral_requests_waiting") == 2
    assert REGISTRY.get_sample_value("mistral_kv_cache_usage_ratio") == 0.5


def test_gpu_memory_gauges_show_the_allocators_statistics():
    metrics.watch_gpu_memory(lambda: {"num_alloc_retries": 3, "num_ooms": 1})
    assert REGISTRY.get_sample_value("mistral_gpu_alloc_retries") == 3
    assert REGISTRY.get_sample_value("mistral_gpu_ooms") == 1


def test_longest_request_still_has_a_bucket_of_its_own():
    assert metrics.REQUEST_BUCKETS_S[-1] == 600
