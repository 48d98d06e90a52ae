"""Named keys in a real server: tokens and requests by name, the request log, the limit of each name."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server_process import ServerProcess

PREDICT = "/v1/models/mistral-7b:predict"
KEYS = {"web": "k-web-1", "nightly": "k-nightly-1", "default": "k-bare-1"}


@pytest.fixture(scope="module")
def named(start_server: Callable[..., ServerProcess], tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    """A server with two named keys and a bare one, each limited to two requests."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"web: {KEYS['web']}\nnightly: {KEYS['nightly']}\n{KEYS['default']}\n")
    return start_server("--api_key_file", str(file), "--max_requests_per_key", "2", "--log_format", "json")


def client(server: ServerProcess, name: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {KEYS[name]}"})


def counts(server: ServerProcess) -> dict[tuple[str, ...], int]:
    """Return the series by key: (key, kind) for tokens, (key,) for requests."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        tuple(label for name in ("key", "kind") if (label := sample.labels.get(name))): int(sample.value)
        for sample in samples
        if sample.name in ("mistral_key_tokens_total", "mistral_key_requests_total")
    }


def wait_for(server: ServerProcess, wanted: dict[tuple[str, ...], int]) -> None:
    deadline_s = time.monotonic() + 20
    while any(counts(server).get(series) != value for series, value in wanted.items()):
        assert time.monotonic() < deadline_s, counts(server)
        time.sleep(0.05)


def test_the_tokens_of_a_key_are_the_sum_of_usage(named: ServerProcess) -> None:
    body = {"model": "mistral-7b", "prompt": ["one", "two three"], "max_tokens": 5}
    before = counts(named)
    with client(named, "web") as web:
        usages = [
            web.post("/openai/v1/completions", json=body | change).json()["usage"]
            for change in ({}, {"n": 3, "temperature": 1}, {"max_tokens": 0, "echo": True})
        ]
        [prediction] = web.post(PREDICT, json={"prompt": "four", "max_new_tokens": 3, "num_beams": 2}).json()[
            "predictions"
        ]
    usages.append(prediction)

    wait_for(
        named,
        {
            ("web",): before.get(("web",), 0) + 4,
            ("web", "prompt"): before.get(("web", "prompt"), 0) + sum(usage["prompt_tokens"] for usage in usages),
            ("web", "generated"): before.get(("web", "generated"), 0)
            + sum(usage["completion_tokens"] for usage in usages),
        },
    )


def test_a_request_is_logged_with_the_name_of_its_key_and_no_key_is_shown(named: ServerProcess) -> None:
    for name in ("nightly", "default"):
        with client(named, name) as caller:
            caller.post(
                PREDICT, json={"prompt": "hello", "max_new_tokens": 2}, headers={"x-request-id": f"by-{name}"}
            ).raise_for_status()

    lines = [json.loads(line) for line in named.log.splitlines() if line.startswith("{")]
    assert {
        line["request_id"]: line["key"] for line in lines if "total_seconds" in line and "by-" in line["request_id"]
    } == {
        "by-nightly": "nightly",
        "by-default": "default",
    }
    shown = named.log + httpx.get(f"{named.url}/metrics").text
    assert not [key for key in KEYS.values() if key in shown]


def test_one_request_too_many_of_a_key_is_answered_429_and_other_keys_go_on(named: ServerProcess) -> None:
    long = {"prompt": "hello", "max_new_tokens": 3000, "min_new_tokens": 3000, "stream": True}

    def two_streams_and_one_more() -> tuple[httpx.Response, int, int]:
        with client(named, "web") as web, client(named, "nightly") as nightly:
            with web.stream("POST", PREDICT, json=long), web.stream("POST", PREDICT, json=long):
                refused = web.post(PREDICT, json={"prompt": "hello", "max_new_tokens": 1})
                listed = web.get("/v1/models").status_code
                other = nightly.post(PREDICT, json={"prompt": "hello", "max_new_tokens": 1}).status_code
            return refused, listed, other

    with ThreadPoolExecutor(1) as pool:
        refused, listed, other = pool.submit(two_streams_and_one_more).result(90)

    assert (refused.status_code, refused.json()["code"]) == (429, "key_busy")
    assert re.fullmatch(r"\d+", refused.headers["retry-after"])
    assert (listed, other) == (200, 200)
    with client(named, "web") as web:  # the streams were given up: their share of the limit is free again
        deadline_s = time.monotonic() + 20
        while web.post(PREDICT, json={"prompt": "hello", "max_new_tokens": 1}).status_code != 200:
            assert time.monotonic() < deadline_s


def test_a_limit_for_each_key_needs_keys(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max_requests_per_key", "2", ready=False)

    assert server.process.wait(60) == 1
    assert server.log.strip().splitlines()[-1] == (
        "error: --max_requests_per_key belongs to --api_key_file, which is not set."
    )
