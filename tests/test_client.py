"""`mistral predict` against real servers that behave well and badly, as a function and as a process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from model_server.client import target
from model_server.client.app import app
from model_server.client.failures import GaveUp, Misused, Unreachable
from model_server.client.patience import Patience
from model_server.client.sse import EventStream
from tests.scripted_server import (
    DONE,
    Act,
    ScriptedServer,
    after,
    answer_bytes,
    answer_json,
    error_event,
    event,
    free_port,
    hang_up,
    last_event,
    predictions,
    stream,
    until_gone,
)

KEY = "sk-do-not-print-me"
BUSY = answer_json({"error": "The queue is full.", "code": "queue_full"}, 429, retry_after="0")
LOADING = answer_json({"error": "The model is loading.", "code": "not_ready"}, 503, retry_after="0")
WHOLE_STREAM = (event("Hello"), event(", wörld"), last_event(4), DONE)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MISTRAL_URL", "MISTRAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def predict(*acts: Act, args: tuple[str, ...] = ("hi",), **settings: str) -> tuple[Result, ScriptedServer]:
    """Run `mistral predict` against a server that plays these acts."""
    with ScriptedServer(list(acts)) as server:
        result = CliRunner().invoke(app, ["predict", *args], env={"MISTRAL_URL": server.url, **settings})
    return result, server


# What is asked


def test_a_bare_prompt_prints_the_bare_text_when_piped() -> None:
    result, server = predict(predictions("There is none."))
    assert (result.exit_code, result.stdout) == (0, "There is none.\n")
    assert server.asked[0].path == "/v1/models/mistral-7b:predict"
    assert server.asked[0].body == {"prompt": "hi", "stream": False}


@pytest.mark.parametrize(
    ("args", "body"),
    [
        (("-d", '{"prompt": "a", "top_k": 5}'), {"prompt": "a", "top_k": 5}),
        (("-d", '{"prompt": "a"}', "-p", "stop=E", "-p", "seed=7"), {"prompt": "a", "stop": "E", "seed": 7}),
        (("--chat", "hi"), {"messages": [{"role": "user", "content": "hi"}]}),
        (("-p", "temperature=0", "-"), {"prompt": "from stdin", "temperature": 0}),
        ((), {"prompt": "from stdin"}),
    ],
)  # fmt: skip
def test_every_way_to_ask_becomes_one_body(args: tuple[str, ...], body: dict[str, object]) -> None:
    with ScriptedServer([predictions("ok")]) as server:
        CliRunner().invoke(app, ["predict", "--url", server.url, *args], input="from stdin\n")
    assert server.asked[0].body == body | {"stream": False}


def test_a_file_and_stdin_can_hold_the_body(tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text('{"prompt": "é"}', "utf-8")
    with ScriptedServer([predictions("ok")]) as server:
        CliRunner().invoke(app, ["predict", "--url", server.url, "-f", str(tmp_path / "body.json")])
        CliRunner().invoke(app, ["predict", "--url", server.url, "-f", "-"], input='{"prompt": "è"}')
    assert [asked.body["prompt"] for asked in server.asked] == ["é", "è"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("hi", "-d", "{}"), "one of PROMPT, --data and --file"),
        (("-d", "{'prompt': 1}"), "--data is not JSON"),
        (("-d", "[]"), "must be a JSON object"),
        (("-f", "/nonexistent"), "cannot be read"),
        (("hi", "-p", "seed"), "not NAME=VALUE"),
        (("-d", "{}", "--chat"), "--chat goes with PROMPT"),
        ((), "stdin is empty"),
        (("hi", "--url", "http://"), "not an http or https URL"),
        (("hi", "--url", "http://h:99999"), "not a URL"),
        (("hi", "--url", "http://a", "--service", "a/b"), "one of --url and --service"),
        (("hi", "--ingress", "http://a"), "--ingress goes with --service"),
        (("hi", "--service", "no-namespace"), "not NAMESPACE/NAME"),
        (("hi", "--api-key-file", "/nonexistent"), "cannot be read"),
        (("hi", "--no-such-flag"), "No such option"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_sentence(args: tuple[str, ...], sentence: str) -> None:
    result = CliRunner().invoke(app, ["predict", *args])
    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())


def test_several_models_need_a_name() -> None:
    with ScriptedServer([predictions("ok")], models=["a", "b/c"]) as server:
        unnamed = CliRunner().invoke(app, ["predict", "hi", "--url", server.url])
        named = CliRunner().invoke(app, ["predict", "hi", "--url", server.url, "--model", "b/c"])
    assert (unnamed.exit_code, named.exit_code) == (2, 0)
    assert "--model" in unnamed.stderr
    assert server.asked[0].path == "/v1/models/b%2Fc:predict"


# What is printed


def test_several_predictions_are_printed_in_order() -> None:
    result, _ = predict(predictions("one", "two\n"), args=("-d", '{"instances": ["a", "b"]}'))
    assert result.stdout == "one\ntwo\n"


def test_json_prints_the_answer_as_the_server_gave_it() -> None:
    result, _ = predict(predictions("naïve"), args=("hi", "--json"))
    assert json.loads(result.stdout)["predictions"][0]["generated_text"] == "naïve"


def test_a_stream_prints_the_same_text() -> None:
    result, server = predict(stream(*WHOLE_STREAM), args=("hi", "--stream"))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello, wörld\n", "")
    assert server.asked[0].body["stream"] is True


def test_a_stream_as_json_is_one_event_a_line() -> None:
    result, _ = predict(stream(*WHOLE_STREAM), args=("hi", "--stream", "--json"))
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == ["Hello", ", wörld", ""]


def test_a_line_separator_in_the_text_does_not_cut_the_event() -> None:
    """U+2028 is a line to `str.splitlines` and none to server-sent events."""
    result, _ = predict(stream(event("a\u2028b\u0085c"), last_event(1), DONE), args=("hi", "--stream"))
    assert (result.exit_code, result.stdout) == (0, "a\u2028b\u0085c\n")


def test_half_a_character_from_the_server_is_replaced_and_not_a_traceback() -> None:
    result, _ = predict(answer_bytes(b'{"predictions": [{"generated_text": "a\\ud83d"}]}'))
    assert (result.exit_code, result.stdout) == (0, "a?\n")


# A key


@pytest.mark.parametrize("by_file", [True, False])
def test_the_key_is_sent_and_never_printed(by_file: bool, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\nanother\n")
    args = ("hi", "--api-key-file", str(tmp_path / "key")) if by_file else ("hi",)
    refusal = answer_json({"error": "Not one of our keys.", "code": "unauthorized"}, 401, x_request_id="r-1")
    result, server = predict(refusal, args=args, MISTRAL_API_KEY="" if by_file else KEY)
    assert server.asked[0].headers["authorization"] == f"Api-Key {KEY}"
    assert result.exit_code == 1
    assert result.stderr == "Error: 401: Not one of our keys. (request id r-1)\n"


def test_without_a_key_none_is_sent() -> None:
    _, server = predict(predictions("ok"))
    assert "authorization" not in server.asked[0].headers


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it() -> None:
    result, _ = predict(predictions("ok"), MISTRAL_API_KEY=f"{KEY}\nX-Evil: 1")
    assert result.exit_code == 2
    assert KEY not in result.output


# Waiting


@pytest.mark.parametrize(
    "not_yet",
    [BUSY, LOADING, hang_up, answer_bytes(b"activator request timeout", 504), answer_bytes(b"upstream", 502)],
    ids=["429", "503", "dropped", "activator gave up", "bad gateway"],
)
def test_what_happens_before_the_answer_begins_is_retried(not_yet: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_server.client.patience.FIRST_PAUSE_S", 0.01)
    result, server = predict(not_yet, not_yet, predictions("at last"))
    assert (result.exit_code, result.stdout) == (0, "at last\n")
    assert len(server.asked) == 3
    assert len({asked.headers["x-request-id"] for asked in server.asked}) == 1


def test_a_wait_is_told_once_a_reason_on_stderr() -> None:
    result, _ = predict(LOADING, LOADING, BUSY, predictions("at last"))
    waits = [line.split(" (")[0] for line in result.stderr.splitlines()]
    assert waits == ["Waiting: 503: The model is loading.", "Waiting: 429: The queue is full."]


def test_a_server_that_does_not_listen_yet_is_waited_for() -> None:
    server = ScriptedServer([predictions("up")], port=free_port())
    pauses: list[float] = []

    def start(pause_s: float) -> None:
        pauses.append(pause_s)
        server.__enter__()

    patience = Patience(60, sleep=start)
    with httpx.Client() as http:
        body = b'{"prompt": "hi"}'
        url = f"http://127.0.0.1:{server.port}/v1/models/m:predict"
        response = patience.send(http, lambda _: http.build_request("POST", url, content=body))
        response.close()
    server.__exit__()
    assert response.status_code == 200
    assert len(pauses) == 1


def test_pauses_grow_and_the_budget_ends_them() -> None:
    now_s, pauses = 0.0, []

    def sleep(pause_s: float) -> None:
        nonlocal now_s
        now_s += pause_s
        pauses.append(pause_s)

    patience = Patience(30, sleep=sleep, clock=lambda: now_s)
    nobody = f"http://127.0.0.1:{free_port()}"
    with httpx.Client() as http, pytest.raises(GaveUp, match=r"Gave up after 30 s.*Nothing answers at 127"):
        patience.send(http, lambda left_s: http.build_request("GET", nobody, timeout=left_s))
    assert pauses[0] < pauses[-1] <= 8
    assert sum(pauses) <= 30


def test_retry_after_decides_the_pause() -> None:
    pauses: list[float] = []
    with ScriptedServer([]) as server, httpx.Client() as http:
        server.pages["/"] = lambda handler: (answer_json({}, 503, retry_after="7") if not pauses else answer_json({}))(
            handler
        )
        Patience(60, sleep=pauses.append).send(http, lambda _: http.build_request("GET", server.url)).close()
    assert pauses == [7]


def test_giving_up_exits_with_4_and_says_what_was_met() -> None:
    result, server = predict(
        answer_json({"error": "Still loading."}, 503, retry_after="60"), args=("hi", "--wait", "5")
    )
    assert result.exit_code == 4
    assert "Gave up after 5 s (--wait). Last met: 503: Still loading." in result.stderr
    assert len(server.asked) == 1


def test_a_silent_server_exits_with_4_when_the_budget_is_spent() -> None:
    never = threading.Event()
    with ScriptedServer([after(never, hang_up)]) as server:
        result = CliRunner().invoke(app, ["predict", "hi", "--url", server.url, "--wait", "1"])
        never.set()
    assert result.exit_code == 4
    assert "in time" in result.stderr


def test_a_late_first_byte_is_no_reason_to_ask_twice() -> None:
    asked = threading.Event()

    def act(handler: object) -> None:
        asked.set()
        after(asked, stream(*WHOLE_STREAM))(handler)  # type: ignore[arg-type]

    result, server = predict(act, args=("hi", "--stream"))
    assert result.stdout == "Hello, wörld\n"
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("url", "sentence"),
    [("http://no-such-host.invalid", "No such host"), ("https://127.0.0.1:{plain}", "No safe connection")],
)
def test_what_no_wait_can_cure_exits_with_5_at_once(url: str, sentence: str) -> None:
    with ScriptedServer([predictions("never asked")]) as server:
        result = CliRunner().invoke(app, ["predict", "hi", "--url", url.format(plain=server.port)])
    assert result.exit_code == 5
    assert sentence in result.stderr


# Refusals


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (answer_json({"error": "top_p is not.", "code": "bad_request"}, 400), "400: top_p is not."),
        (answer_json({"error": {"message": "No such model."}}, 404), "404: No such model."),
        (answer_json({"detail": "Not Found"}, 404), "404: Not Found"),
        (answer_bytes(b"request timeout", 504), "504: request timeout"),
        (answer_bytes(b"", 500), "500: Internal Server Error"),
        (answer_bytes(b"", 307, location="https://elsewhere/"), "redirects to https://elsewhere/"),
        (answer_json({"outputs": []}), "no predictions"),
    ],
)  # fmt: skip
def test_a_refusal_exits_with_1_and_the_servers_sentence(refusal: Act, sentence: str) -> None:
    result, server = predict(refusal)
    assert (result.exit_code, result.stdout) == (1, "")
    assert sentence in result.stderr
    assert "Traceback" not in result.output
    assert len(server.asked) == 1


def test_an_error_names_the_request_even_when_the_server_did_not() -> None:
    result, server = predict(answer_json({"error": "No."}, 400))
    assert result.stderr == f"Error: 400: No. (request id {server.asked[0].headers['x-request-id']})\n"


# Answers cut short


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (stream(event("Hel"), whole=False), "connection broke"),
        (stream(event("Hel")), "ended before it was whole"),
        (stream(event("Hel"), last_event(1)), "ended before it was whole"),
        (stream(event("Hel"), b"request timeout"), "`timeout` ended the answer"),
        (stream(event("Hel"), b'data: {"te', b"request timeout"), "`timeout` ended the answer"),
        (stream(event("Hel"), error_event("The engine died.")), "The engine died."),
        (stream(event("Hel"), b"data: {oops\n\n", DONE), "not JSON"),
    ],
    ids=["dropped", "no DONE", "only the end", "Knative", "Knative in an event", "error event", "garbage"],
)  # fmt: skip
def test_a_stream_that_is_not_whole_exits_with_3_and_is_not_retried(cut: Act, sentence: str) -> None:
    result, server = predict(cut, args=("hi", "--stream"))
    assert (result.exit_code, result.stdout) == (3, "Hel\n")
    assert sentence in result.stderr
    assert len(server.asked) == 1


def test_what_follows_the_end_marker_does_not_matter() -> None:
    result, _ = predict(stream(*WHOLE_STREAM, b"request timeout"), args=("hi", "--stream"))
    assert result.exit_code == 0


def test_a_cut_json_answer_exits_with_3() -> None:
    result, server = predict(answer_bytes(b'{"predictions": [{"generarequest timeout'))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "`timeout` ended the answer" in result.stderr
    assert len(server.asked) == 1


def test_a_json_answer_to_a_stream_is_refused() -> None:
    result, _ = predict(predictions("no stream"), args=("hi", "--stream"))
    assert result.exit_code == 1


# A real process


def mistral(server: ScriptedServer, *args: str, **popen: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "model_server.client", "predict", "--url", server.url, *args]
    # A shell's background job ignores Ctrl-C, and its children inherit that: a terminal's do not.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, **popen)  # type: ignore[call-overload]
    finally:
        signal.signal(signal.SIGINT, ours)


def test_a_process_prints_to_its_pipe_and_exits_with_0() -> None:
    with ScriptedServer([predictions("hello")]) as server:
        process = mistral(server, "hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.communicate(timeout=30) == (b"hello\n", b"")
    assert process.returncode == 0


def test_ctrl_c_closes_the_connection_and_exits_with_130() -> None:
    gone = threading.Event()
    endless = stream(event("first"), then=until_gone(gone, iter(lambda: event("x"), b"")), whole=False)
    with ScriptedServer([endless]) as server:
        process = mistral(server, "hi", "--stream", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
        assert gone.wait(30)
    assert process.returncode == 130
    assert b"Traceback" not in stderr


def test_a_reader_that_leaves_early_is_no_traceback() -> None:
    gone = threading.Event()
    endless = stream(event("first\n"), then=until_gone(gone, iter(lambda: event("x\n"), b"")), whole=False)
    with ScriptedServer([endless]) as server:
        process = mistral(server, "hi", "--stream", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert gone.wait(30)
        assert b"Traceback" not in process.stderr.read()
        process.stderr.close()
        process.wait(30)


def test_a_terminal_gets_a_stream_without_the_models_escape_codes_and_a_summary() -> None:
    master, slave = pty.openpty()
    rude = stream(event("red\x1b[31m"), event("\x9b2J end"), last_event(4, "length"), DONE)
    with ScriptedServer([rude]) as server:
        process = mistral(server, "hi", stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        shown = read_all(master)
        process.wait(30)
    assert server.asked[0].body["stream"] is True
    assert "red[31m2J end" in shown
    assert "4 tokens" in shown
    assert "length limit" in shown


def read_all(terminal: int) -> str:
    """Read a terminal until its other side is closed, which Linux reports as an error."""
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:
        pass
    os.close(terminal)
    return shown.decode()


def test_help_loads_neither_torch_nor_kserve_nor_kubernetes() -> None:
    heavy = {"torch", "transformers", "kserve", "kubernetes"}
    code = f"import sys, model_server.client; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# An InferenceService by name


def inference_service(**status: object) -> Callable[[str, str], dict[str, object]]:
    return lambda namespace, name: {"metadata": {"namespace": namespace, "name": name}, "status": status}


def test_a_service_is_asked_at_the_url_of_its_status() -> None:
    found = target.of_service("ml/mistral", None, inference_service(url="https://mistral.ml.example.com"))
    assert found == target.Target("https://mistral.ml.example.com")


def test_an_ingress_is_asked_with_the_host_of_the_status() -> None:
    get = inference_service(url="https://mistral.ml.example.com/serving/ml")
    plain = target.of_service("ml/mistral", "localhost:8081", get)
    safe = target.of_service("ml/mistral", "https://10.0.0.1", get)
    assert plain.url("/v1/models") == "http://localhost:8081/serving/ml/v1/models"
    assert (plain.headers, plain.extensions) == ({"Host": "mistral.ml.example.com"}, {})
    assert safe.extensions == {"sni_hostname": "mistral.ml.example.com"}


@pytest.mark.parametrize("name", ["mistral", "/mistral", "ml/", "ml/a/b"])
def test_a_service_is_named_with_its_namespace(name: str) -> None:
    with pytest.raises(Misused, match="NAMESPACE/NAME"):
        target.of_service(name, None, inference_service(url="http://a"))


def test_a_service_without_a_url_says_why() -> None:
    waiting = {"type": "Ready", "status": "False", "message": "0/3 nodes have a GPU"}
    with pytest.raises(Unreachable, match="no URL yet: 0/3 nodes have a GPU"):
        target.of_service("ml/mistral", None, inference_service(conditions=[waiting]))


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: "%s"}}]
users: [{name: u, user: {token: t}}]
"""
SERVICE_PATH = "/apis/serving.kserve.io/v1beta1/namespaces/ml/inferenceservices/mistral"


def test_a_service_is_found_in_a_cluster_and_reached_through_an_ingress(tmp_path: Path) -> None:
    with ScriptedServer([predictions("from the cluster")]) as server:
        server.pages[SERVICE_PATH] = answer_json({"status": {"url": "http://mistral.ml.example.com"}})
        (tmp_path / "config").write_text(KUBECONFIG % server.url)
        args = [sys.executable, "-m", "model_server.client", "predict", "hi"]
        args += ["--service", "ml/mistral", "--ingress", server.url]
        output = subprocess.check_output(args, env=os.environ | {"KUBECONFIG": str(tmp_path / "config")})
    assert output == b"from the cluster\n"
    assert server.asked[0].headers["host"] == "mistral.ml.example.com"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (answer_json({"kind": "Status"}, 404), "There is no InferenceService mistral in namespace ml"),
        (answer_json({"kind": "Status"}, 403), "does not let you read"),
        (hang_up, "does not answer"),
    ],
    ids=["404", "403", "dropped"],
)
def test_a_cluster_that_does_not_help_exits_with_5(answer: Act, sentence: str, tmp_path: Path) -> None:
    with ScriptedServer([]) as server:
        server.pages[SERVICE_PATH] = answer
        (tmp_path / "config").write_text(KUBECONFIG % server.url)
        args = [sys.executable, "-m", "model_server.client", "predict", "hi", "--service", "ml/mistral"]
        run = subprocess.run(
            args, env=os.environ | {"KUBECONFIG": str(tmp_path / "config")}, capture_output=True, text=True
        )
    assert run.returncode == 5
    assert sentence in run.stderr


def test_without_the_kubernetes_package_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    result = CliRunner().invoke(app, ["predict", "hi", "--service", "ml/mistral"])
    assert result.exit_code == 5
    assert "pip install kubernetes" in result.stderr


# Server-sent events


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=4),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    data=st.data(),
)
def test_events_are_the_same_however_the_bytes_are_cut(texts: list[str], newline: str, data: st.DataObject) -> None:
    lines = "".join(f": ping\n\nevent: e\ndata: {json.dumps(text, ensure_ascii=False)}\n\n" for text in texts)
    body = (lines + "rest").replace("\n", newline).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    chunks = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    events = EventStream(chunks)
    assert [json.loads(event.data) for event in events] == texts
    assert events.rest == "rest"
