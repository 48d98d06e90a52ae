"""Keys: which are accepted, when the file counts, and that nothing but health and metrics is open without one."""

from __future__ import annotations

import hmac
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from model_server.api.http.auth import ApiKeys
from model_server.errors import StartupError
from tests.support.server_process import ServerProcess

KEY = "s3cret-Key.of+ours/1="
OTHER = "another-key-of-ours"
PREDICT = "/v1/models/mistral-7b:predict"
FREE = ["/", "/v2/health/live", "/v2/health/ready", "/v1/models/mistral-7b", "/v2/models/mistral-7b/ready", "/metrics"]
CLOSED = [PREDICT, "/v1/models", "/openapi.json", "/playground", "/docs", "/openai/v1/models", "/nothing", "*"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEY}\r\n{OTHER}\n")
    return file


def replace(file: Path, text: str) -> None:
    """Swap a link, as Kubernetes does when a Secret changes."""
    new = file.with_name(f"keys-{time.monotonic_ns()}")
    new.write_text(text)
    link = file.with_name("link")
    link.symlink_to(new)
    os.replace(link, file)


def test_each_line_is_a_key_and_comments_are_none(file: Path) -> None:
    keys = ApiKeys(file)

    assert [keys.name_of(key) for key in (KEY.encode(), OTHER.encode())] == ["default", "default"]
    assert not any(keys.name_of(key) for key in (b"", b"# ours", b"ours", KEY[:-1].encode(), KEY.encode() + b"x"))


def test_a_key_has_the_name_before_it_and_a_name_may_have_several_keys(file: Path) -> None:
    file.write_text("web-1: old\nweb-1:\tnew\nbare\nnot:a-name\n")
    keys = ApiKeys(file)

    names = {key: keys.name_of(key) for key in (b"old", b"new", b"bare", b"not:a-name", b"web-1: old", b"a-name")}

    assert names == {
        b"old": "web-1", b"new": "web-1", b"bare": "default", b"not:a-name": "default",
        b"web-1: old": None, b"a-name": None,
    }  # fmt: skip


def test_a_rotated_file_counts_at_once(file: Path) -> None:
    keys = ApiKeys(file)

    replace(file, "fresh\n")

    assert (keys.name_of(b"fresh"), keys.name_of(KEY.encode())) == ("default", None)


@pytest.mark.parametrize("harm", [Path.unlink, lambda f: f.write_text("\n"), lambda f: f.write_text("a b\n")])
def test_a_file_that_goes_bad_leaves_the_last_good_keys_and_is_logged_once(
    file: Path, harm: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(file)

    harm(file)

    assert [keys.name_of(key) for key in (KEY.encode(), b"wrong", b"a")] == ["default", None, None]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert KEY not in caplog.text
    replace(file, "fresh\n")
    assert keys.name_of(b"fresh")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "holds no key"),
        ("# only words\n", "holds no key"),
        ("ok\nmy key\n", "line 2 .* must be a key or `name: key`"),
        ("a: ok\nbad/name: my-key\n", "line 2 .* must be a key or `name: key`"),
        (f"{'n' * 65}: my-key\n", "line 1 .* must be a key or `name: key`"),
        ("a: my-key\nb: my-key\n", "line 2 .* gives a key of another line a second name"),
    ],
)
def test_a_start_without_a_good_file_is_refused_in_a_sentence(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "keys").write_text(text)

    with pytest.raises(StartupError, match=f"--api_key_file: .*{words}") as refused:
        ApiKeys(tmp_path / "keys")

    assert not [key for key in ("my key", "my-key") if key in str(refused.value)]


def test_every_key_is_compared_whole_whatever_was_sent(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    keys = ApiKeys(file)

    for key in (b"", KEY.encode(), KEY[:5].encode(), b"x" * 10_000):
        keys.name_of(key)

    assert compared == [(32, 32)] * 8


# Through a real server


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n{OTHER}\n")
    return file


@pytest.fixture(scope="module")
def locked(start_server: Callable[..., ServerProcess], key_file: Path) -> ServerProcess:
    """A server that asks for keys, and allows one origin."""
    return start_server("--api_key_file", str(key_file), "--cors_origins", "https://a.example")


@pytest.fixture
def client(locked: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url, timeout=30) as client:
        yield client


def status(server: ServerProcess, method: str, target: str, *headers: str) -> int:
    """Send a request as it is written, no client between; return the status of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = [f"{method} {target} HTTP/1.1", "Host: a", "Connection: close", *headers]
        connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize("scheme", ["Bearer", "Api-Key", "bearer", "API-KEY", "Api-Key  "])
def test_both_schemes_are_taken_in_any_case(client: httpx.Client, scheme: str) -> None:
    for key in (KEY, OTHER):
        assert client.get("/v1/models", headers={"Authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", f"Basic {KEY}", KEY, f"Bearer{KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY},{OTHER}",
        f"Bearer {KEY.upper()}", f"Bearer\t{KEY}", f'Bearer "{KEY}"', "Bearer # ours", "Bearer é",
    ],
)  # fmt: skip
def test_anything_else_is_no_key(client: httpx.Client, header: str) -> None:
    answer = client.get("/v1/models", headers={b"Authorization": header.encode("latin-1")})

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="model", Api-Key realm="model"'
    assert KEY not in answer.text


def test_probes_and_scrapers_need_no_key(client: httpx.Client) -> None:
    assert [client.get(path).status_code for path in FREE] == [200] * len(FREE)
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_all_else_is_closed_by_every_method(locked: ServerProcess, method: str) -> None:
    paths = CLOSED if method in ("GET", "HEAD") else CLOSED + FREE

    assert {path: status(locked, method, path) for path in paths} == dict.fromkeys(paths, 401)


def test_no_spelling_of_a_path_opens_a_closed_route(locked: ServerProcess) -> None:
    closed = [
        "/v2/health/live/../../../v1/models", "/v2/health/live/%2e%2e/%2e%2e/%2e%2e/v1/models", "//v1/models",
        "/./v1/models", "/metrics/../v1/models", "/metrics/", "/metrics;/v1/models", "/metrics%00", "/metrics%20",
        "/METRICS", "/%2fmetrics", "/metrics%2f", "/metrics%3f", "/metrics%23", "//", "/%2e", "/.", "/v1/models?",
        "/v1/models/", "/v1%2fmodels", "/V1/models", "/v1/models/mistral-7b/", "/v1/models/MISTRAL-7B",
        "/v1/models/mistral-7b:predict", "/v1/models/mistral-7b%3apredict", "/v1/models/mistral-7b/../..",
        "/v1/models/other", "/v2/health/ready/", "/v2//health/live", "/openapi.json?/metrics", "/playground/",
        "http://a/v1/models", "http://metrics/v1/models", f"http://a{PREDICT}", "*", "/v2/health/live\\..\\models",
    ]  # fmt: skip

    answers = {target: status(locked, "GET", target) for target in closed}

    assert answers == dict.fromkeys(closed, 401)


def test_two_headers_are_no_key_even_if_both_are_right(locked: ServerProcess) -> None:
    one = f"Authorization: Bearer {KEY}"

    assert status(locked, "GET", "/v1/models", one) == 200
    assert status(locked, "GET", "/v1/models", one, one) == 401
    assert status(locked, "GET", "/v1/models", one, "authorization: Bearer wrong") == 401
    assert status(locked, "GET", "/v1/models", f"X-Authorization: Bearer {KEY}", f"Cookie: Bearer {KEY}") == 401


def test_a_refusal_does_not_wait_for_the_body(locked: ServerProcess) -> None:
    assert status(locked, "POST", PREDICT, "Content-Length: 1000", "Expect: 100-continue") == 401


def test_openai_routes_are_refused_in_openais_shape(client: httpx.Client) -> None:
    error = client.post("/openai/v1/completions", json={}).json()["error"]

    assert (error["code"], error["type"], error["param"]) == ("unauthorized", "invalid_request_error", None)


def test_the_page_is_shown_without_a_key_as_a_401(client: httpx.Client) -> None:
    refused = client.get("/playground")
    allowed = client.get("/playground", headers={"Authorization": f"Bearer {KEY}"})

    assert (refused.status_code, allowed.status_code) == (401, 200)
    assert refused.content == allowed.content
    assert "www-authenticate" in refused.headers


def test_a_browser_of_an_allowed_origin_may_ask_first_and_read_refusals(client: httpx.Client) -> None:
    origin = {"Origin": "https://a.example"}
    asks = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}

    preflight = client.options(PREDICT, headers=asks)
    refused = client.post(PREDICT, json={}, headers=origin)
    stranger = client.options(PREDICT, headers=asks | {"Origin": "https://b.example"})

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    assert "x-request-id" in refused.headers["access-control-expose-headers"].lower()
    assert (stranger.status_code, stranger.headers.get("access-control-allow-origin")) == (400, None)


def test_without_origins_no_page_of_another_may_call(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": "https://a.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert status(server, "OPTIONS", PREDICT, "Origin: https://a.example", "Access-Control-Request-Method: POST") == 405


def test_a_rotated_key_counts_in_a_running_server(client: httpx.Client, key_file: Path) -> None:
    replace(key_file, f"{KEY}\nfresh\n")

    answers = [client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in ("fresh", OTHER, KEY)]

    replace(key_file, f"{KEY}\n{OTHER}\n")
    assert [answer.status_code for answer in answers] == [200, 401, 200]


def test_no_key_and_no_prompt_comes_to_light(client: httpx.Client, locked: ServerProcess) -> None:
    good, wrong, prompt = {"Authorization": f"Bearer {KEY}"}, "wrong-key-xyz", "a prompt of secrets"
    answers = [
        client.post(PREDICT, json={"prompt": prompt, "max_new_tokens": 2}, headers=good),
        client.post(PREDICT, json={"prompt": prompt, "top_p": prompt, prompt: 1}, headers=good),
        client.post(PREDICT, json={"prompt": [prompt]}, headers=good),
        client.post(PREDICT, content=f'{{"{prompt}"'.encode(), headers=good),
        client.post(PREDICT, json={"prompt": prompt}, headers={"Authorization": f"Bearer {wrong}"}),
        client.get(f"/v1/models?key={wrong}", headers=good),
    ]
    metrics = client.get("/metrics").text

    refusals = "".join(answer.text for answer in answers[1:])
    assert [answer.status_code for answer in answers] == [200, 400, 400, 400, 401, 200]
    assert not [word for word in (KEY, OTHER, wrong, prompt) if word in locked.log + metrics]
    assert not [word for word in (KEY, OTHER, wrong) if word in refusals]


def test_a_missing_key_file_stops_the_start_before_the_model_is_read(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--api_key_file", "/nowhere/keys", ready=False)

    assert server.process.wait(60) == 1
    assert server.log.strip().splitlines()[-1] == (
        "error: --api_key_file: /nowhere/keys cannot be read (No such file or directory)."
    )
