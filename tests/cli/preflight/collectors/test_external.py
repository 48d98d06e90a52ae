"""The model hub and the resolver are asked from the machine that runs the command."""

from __future__ import annotations

from mistral_cli.preflight.collectors import external


def test_a_hub_that_does_not_answer_is_unknown() -> None:
    assert "does not answer" in external.hub_status("hf://a/b:c", "", "http://127.0.0.1:9").unknown


def test_a_host_without_an_address_is_a_value_and_not_an_error() -> None:
    assert external.resolve("mistral.invalid").value is None
    assert external.resolve("localhost").value in ("127.0.0.1", "::1")
