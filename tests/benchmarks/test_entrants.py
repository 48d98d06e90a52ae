"""Contenders in a run: in which order they are measured, and that they leave each other alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import entrants, report, serve
from benchmarks.contenders import Contender
from benchmarks.entrants import Plan, ServerEntrant
from benchmarks.figures import Figure, summary
from benchmarks.load import Answer, Run
from benchmarks.process import Program, StartFailed

# --- a run -----------------------------------------------------------------------------------------------------------


class FakeEntrant:
    """Answers at once, and notes when it was measured."""

    text = "a b"

    def __init__(self, name: str, measured: list[tuple[str, int]], numbers: Sequence[int] = (1, 8)) -> None:
        self.name, self.measured, self.numbers = name, measured, numbers
        self.closed = False

    def clients(self) -> Sequence[int]:
        return self.numbers

    def measure(self, clients: int) -> Figure:
        self.measured.append((self.name, clients))
        if self.name == "transformers":
            raise StartFailed("no such program")
        answer = Answer(asked_s=1.0, chunk_times_s=[2.0, 3.0], ended_s=3.0)
        return summary(Run([answer], began_s=0.0, ended_s=10.0, cut=False, stolen=0.0))

    def close(self) -> None:
        self.closed = True


def compare(monkeypatch: pytest.MonkeyPatch, *those: FakeEntrant, repeats: int = 2) -> list[Figure]:
    by_name = {each.name: each for each in those}
    monkeypatch.setattr(serve, "entrant", lambda name, model_dir, plan: by_name[name])
    figures = serve.compare(Path(), Plan(contenders=list(by_name), repeats=repeats))
    assert all(each.closed for each in those)
    return figures


def test_contenders_are_neighbours_at_each_number_of_clients_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []
    compare(monkeypatch, FakeEntrant("ours", measured), FakeEntrant("generate", measured, numbers=[1]))
    assert measured == [
        *(("ours", 1), ("generate", 1), ("ours", 8)),
        *(("generate", 1), ("ours", 1), ("ours", 8)),
    ]


def test_contender_that_does_not_start_is_a_figure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int]] = []
    names = ("ours", "generate", "transformers")
    figures = compare(monkeypatch, *(FakeEntrant(name, measured, numbers=[1]) for name in names))
    assert [figure.get("failed") for figure in figures if figure.get("contender") == "transformers"] == [
        "no such program"
    ]
    assert [figure["ratio"]["output_tokens_per_s"]["median"] for figure in figures if "ratio" in figure] == [1.0]
    assert measured.count(("transformers", 1)) == 1
    report.serve_card(figures)
    assert "failed" in capsys.readouterr().out


# --- a server --------------------------------------------------------------------------------------------------------

SERVER = """
import json, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seconds_a_token, goes_on = float(sys.argv[2]), sys.argv[3] == "goes on"
asked = []  # the first answer and the warm-up come at once


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        num_tokens = json.loads(self.rfile.read(int(self.headers["content-length"])))["max_new_tokens"]
        asked.append(num_tokens)
        self.do_GET()
        try:
            for _ in range(num_tokens):
                time.sleep(seconds_a_token if len(asked) > 2 else 0)
                self.send({"text": "a "})
            self.send({"text": "", "finish_reason": "length", "completion_tokens": num_tokens, "prompt_tokens": 4})
        except OSError:
            while goes_on:
                pass

    def send(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    (script := tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr(entrants, "prompts_for", lambda *args, **options: [f"prompt {i}" for i in range(100)])
    made = []

    def make(seconds_a_token: float = 0, after_a_cut: str = "stops", **plan: Any) -> ServerEntrant:
        command = (sys.executable, str(script), "{port}", str(seconds_a_token), after_a_cut)
        contender = Contender("a server", command, ready_path="/", path="/v1/models/m:predict", most_clients=8)
        usual: dict[str, Any] = {"max_new_tokens": 4, "min_seconds": 0, "limit_s": 5}
        made.append(server := ServerEntrant(contender, Path(), Plan(**(usual | plan))))
        return server

    yield make
    for server in made:
        server.close()


def until_frozen(program: Program | None) -> None:
    """Wait for the kernel to say so: a signal takes a moment."""
    assert program is not None
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{program.pid}/stat").read_text().rsplit(") ", 1)[1][0] != "T":
        assert time.monotonic() < deadline_s


def test_server_is_measured_by_the_process_it_started_and_frozen_between(make_server: Any) -> None:
    server = make_server()
    figures = [server.measure(clients) for clients in (1, 3)]
    first = server._server
    until_frozen(first)
    figures.append(server.measure(2))
    assert [(f["requests"], f["errors"], f["unfinished"]) for f in figures] == [(1, 0, 0), (3, 0, 0), (2, 0, 0)]
    assert server._server is first
    assert server.text == "a a a a "


def test_server_is_not_asked_by_more_than_make_sense(make_server: Any) -> None:
    assert list(make_server(clients=(1, 8, 32)).clients()) == [1, 8]


@pytest.mark.parametrize(("after_a_cut", "kept"), [("stops", True), ("goes on", False)])
def test_server_whose_load_was_cut_is_kept_only_if_it_comes_to_rest(
    make_server: Any, after_a_cut: str, kept: bool
) -> None:
    server = make_server(0.05, after_a_cut, limit_s=0.5, max_new_tokens=100)
    figure = server.measure(1)
    assert figure["unfinished"] == 1
    assert (server._server is not None) == kept


def test_server_that_ends_under_load_has_failed(make_server: Any) -> None:
    server = make_server(0.2)
    server._start()
    server._server._process.kill()
    server._server._process.wait()
    with pytest.raises(StartFailed, match="ended under load"):
        server.measure(1)
