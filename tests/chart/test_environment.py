"""The settings of the server that the chart passes in the container's environment."""

from __future__ import annotations

from kserve.model_server import parser

from charts.render_server import chart_default
from model_server.settings import Settings, flag_fields
from tests.support.helm import (
    container,
    environment,
)


def test_a_drain_lasts_as_long_as_a_request_may_unless_another_is_given() -> None:
    assert environment({"server.requestTimeoutSeconds": 100})["MISTRAL_DRAIN_SECONDS"] == "100"
    assert environment({"server.drainSeconds": 0})["MISTRAL_DRAIN_SECONDS"] == "0"


def test_a_setting_at_the_servers_own_default_is_not_passed_so_that_an_older_image_starts() -> None:
    passed = {name for name in environment() if name.startswith("MISTRAL_")}
    assert passed == {"MISTRAL_DRAIN_SECONDS", "MISTRAL_REQUEST_TIMEOUT_SECONDS", "MISTRAL_LOG_FORMAT"}
    assert "MISTRAL_LOG_FORMAT" not in environment({"server.logFormat": "text"})


def test_a_setting_that_differs_from_the_servers_own_default_is_passed() -> None:
    values = {"server.maxBatchSize": 8, "server.corsOrigins": ["https://a.example", "https://b.example"]}
    assert environment(values)["MISTRAL_MAX_BATCH_SIZE"] == "8"
    assert environment(values)["MISTRAL_CORS_ORIGINS"] == "https://a.example,https://b.example"


def test_a_server_started_by_the_chart_has_the_settings_of_the_values() -> None:
    variables = {name: value for name, value in environment().items() if value is not None}
    settings = Settings.parse(container()["args"], variables, parser)
    values = {name: chart_default(name) for name in flag_fields()}
    found = {name: getattr(settings, name) for name in flag_fields()}
    assert found | {"cors_origins": []} == values | {"drain_seconds": values["request_timeout_seconds"]}


def test_large_numbers_keep_their_digits() -> None:
    assert environment({"server.maxRequestBytes": 104857600})["MISTRAL_MAX_REQUEST_BYTES"] == "104857600"
