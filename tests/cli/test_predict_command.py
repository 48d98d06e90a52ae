"""`mistral predict` against real servers that behave well and badly, as a function and as a process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mistral_cli import answer
from mistral_cli.app import app
from tests.support.client_runs import predict
from tests.support.scripted_server import (
    DONE,
    ScriptedServer,
    answer_bytes,
    answer_json,
    event,
    last_event,
    predictions,
    stream,
    until_gone,
)

KEY = "sk-do-not-print-me"
WHOLE_STREAM = (event("Hello"), event(", wörld"), last_event(4), DONE)


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


# A real process


def mistral(server: ScriptedServer, *args: str, **popen: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mistral_cli", "predict", "--url", server.url, *args]
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
    code = f"import sys, mistral_cli; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# Server-sent events


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=4),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    data=st.data(),
)
def test_events_are_the_same_however_the_bytes_are_cut(texts: list[str], newline: str, data: st.DataObject) -> None:
    lines = "".join(f": ping\n\nevent: e\ndata: {json.dumps(text, ensure_ascii=False)}\n\n" for text in texts)
    body = (lines + "data: [DONE]\n\n").replace("\n", newline).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    chunks = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert list(answer.pieces(event_stream(chunks))) == texts


def event_stream(chunks: list[bytes]) -> httpx.Response:
    request = httpx.Request("POST", "http://127.0.0.1/")
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=iter(chunks), request=request)
