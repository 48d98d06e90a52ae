"""The measuring tools: load, figures, report. Nothing here asserts a time."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from benchmarks import report, serve, streams
from benchmarks.figures import over_repeats, ratios, spread, summary
from benchmarks.load import Answer, Ask, Run, closed_loop, least_disturbed, open_loop, poisson_arrivals
from benchmarks.process import free_port
from benchmarks.streams import ask_once, asking
from benchmarks.wire import Target, read_event

NUM_TOKENS = 3
V1_END: dict[str, Any] = {"text": "", "finish_reason": "length", "prompt_tokens": 2, "completion_tokens": NUM_TOKENS}
V1_STREAM: list[dict[str, Any]] = [{"text": "a"}, {"text": " b"}, {"text": " c"}, V1_END]

# --- load ------------------------------------------------------------------------------------------------------------


class FakeServer:
    """Answers every request with the same events, and notes how it was asked."""

    def __init__(self, events: list[dict[str, Any]], *, status: int = 200, hangs: bool = False) -> None:
        self.events, self.status, self.hangs = events, status, hangs
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if self.status != 200:
                return web.json_response({"error": "the queue is full"}, status=self.status)
            response = web.StreamResponse()
            await response.prepare(request)
            for event in self.events:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if self.hangs:
                await self.leave.wait()
            return response
        finally:
            self.running -= 1

    @asynccontextmanager
    async def served(self, path: str = "/v1/models/m:predict") -> AsyncIterator[Target]:
        self.leave = asyncio.Event()
        app = web.Application()
        app.router.add_post(path, self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port := free_port())
        await site.start()
        try:
            yield Target(f"http://127.0.0.1:{port}{path}", NUM_TOKENS, model="m")
        finally:
            self.leave.set()
            await runner.cleanup()


def under_load(server: FakeServer, load: Callable[[Ask], Coroutine[Any, Any, Run]], **served: str) -> Run:
    async def run() -> Run:
        async with server.served(**served) as target, asking(target) as ask:
            return await load(ask)

    return asyncio.run(run())


def ask(server: FakeServer, clients: int = 1, limit_s: float = 30, **served: str) -> Run:
    return under_load(
        server,
        lambda ask: closed_loop(ask, repeat("one two"), clients=clients, min_seconds=0, limit_s=limit_s),
        **served,
    )


def test_closed_loop_keeps_as_many_streams_open_as_it_has_clients() -> None:
    run = ask(server := FakeServer(V1_STREAM), clients=5)
    assert len(run.answers) == len(server.bodies) == 5
    assert server.most_running <= 5
    assert [answer.error for answer in run.answers] == [None] * 5


def test_loads_of_one_server_ask_for_nothing_twice() -> None:
    asked: list[str] = []

    async def ask(prompt: str, answer: Answer) -> None:
        asked.append(prompt)

    async def two_loads(prompts: Iterator[str]) -> None:
        for clients in (2, 3):
            await closed_loop(ask, prompts, clients=clients, min_seconds=0, limit_s=1)

    asyncio.run(two_loads(iter("abcde")))
    assert asked == list("abcde")


def test_clients_of_a_closed_loop_ask_equally_often_and_longer_than_the_least_time() -> None:
    asked: collections.Counter[Any] = collections.Counter()

    async def ask(prompt: str, answer: Answer) -> None:
        asked[asyncio.current_task()] += 1
        await asyncio.sleep(0.3 if prompt == "slow" else 0.05)

    async def load() -> None:
        prompts = itertools.chain(["slow"], repeat("quick"))
        await closed_loop(ask, prompts, clients=2, min_seconds=0.2, limit_s=10)

    asyncio.run(load())
    first, second = asked.values()
    assert first == second >= 2


def test_client_that_failed_asks_no_more_and_the_others_do() -> None:
    prompts = iter("abcdefgh")

    async def ask(prompt: str, answer: Answer) -> None:
        await asyncio.sleep(0.02)
        answer.error = "refused" if prompt == "a" else None

    async def load() -> Run:
        return await closed_loop(ask, prompts, clients=2, min_seconds=0.03, limit_s=10)

    assert [answer.error for answer in asyncio.run(load()).answers] == ["refused", None, None]


def test_answer_has_the_text_and_the_counts_the_server_gave() -> None:
    answer = ask(FakeServer(V1_STREAM)).answers[0]
    assert answer.text == "a b c"
    assert (answer.prompt_tokens, answer.output_tokens, len(answer.chunk_times_s)) == (2, NUM_TOKENS, 3)


def test_event_that_arrives_in_pieces_is_read_whole() -> None:
    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for piece in (b'data: {"te', b'xt": "a"}\n', b'\ndata: {"text": "b"}\n\ndata: [DONE]', b"\n\n"):
                yield piece

    async def read(answer: Answer) -> None:
        await streams._read(Content(), answer)  # type: ignore[arg-type]

    asyncio.run(read(answer := Answer(asked_s=0)))
    assert (answer.error, answer.text, len(answer.chunk_times_s)) == (None, "ab", 2)


@pytest.mark.parametrize(
    ("stolen", "tries", "kept"), [([0.01, 0.0, 0.0], 1, 0), ([0.1, 0.02, 0.0], 2, 1), ([0.3, 0.1, 0.2, 0.0], 3, 1)]
)
def test_load_is_repeated_while_the_host_takes_too_much_of_it(stolen: list[float], tries: int, kept: int) -> None:
    runs = [dataclasses.replace(a_run([2.0]), stolen=share) for share in stolen]
    to_come = iter(runs)

    async def load() -> Run:
        return next(to_come)

    assert asyncio.run(least_disturbed(load)) is runs[kept]
    assert len(runs) - len(list(to_come)) == tries


def test_load_that_was_cut_is_not_repeated() -> None:
    cut = dataclasses.replace(a_run([], unfinished=True), stolen=1.0)
    to_come = iter([cut])

    async def load() -> Run:
        return next(to_come)

    assert asyncio.run(least_disturbed(load)) is cut


def test_openai_answer_has_the_text_and_the_counts_the_server_gave() -> None:
    texts = [{"choices": [{"index": 0, "text": text}]} for text in ("a", " b")]
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": NUM_TOKENS}}
    server = FakeServer([*texts, end, usage])
    answer = ask(server, path="/openai/v1/completions").answers[0]
    assert (answer.error, answer.text, answer.output_tokens) == (None, "a b", NUM_TOKENS)
    assert server.bodies[0]["max_tokens"] == NUM_TOKENS
    assert server.bodies[0]["model"] == "m"


def test_without_a_count_from_the_server_each_piece_of_text_is_a_token() -> None:
    end = {"text": "", "finish_reason": "length"}
    assert ask(FakeServer([*V1_STREAM[:3], end])).answers[0].output_tokens == 3


def test_answer_of_another_length_is_an_error_and_counts_no_tokens() -> None:
    run = ask(FakeServer([{"text": "a"}, {**V1_END, "completion_tokens": 1}]))
    assert run.answers[0].error == "asked for 3 tokens, got 1"
    assert summary(run)["output_tokens"] == 0


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (FakeServer(V1_STREAM[:3]), "the stream ended without saying so"),
        (FakeServer([{"text": "a"}, {"error": "out of memory", "code": "out_of_memory"}]), "out of memory"),
        (FakeServer([], status=429), 'HTTP 429: {"error": "the queue is full"}'),
    ],
    ids=["cut stream", "error event", "refusal"],
)
def test_failed_answer_is_kept_with_its_reason(server: FakeServer, error: str) -> None:
    assert ask(server).answers[0].error == error


def test_server_that_is_not_there_is_an_error_of_the_answer() -> None:
    target = Target(f"http://127.0.0.1:{free_port()}/v1/models/m:predict", NUM_TOKENS)
    answer = asyncio.run(ask_once(target, "x", limit_s=30))
    assert "ClientConnector" in str(answer.error)


def test_answers_open_at_the_limit_are_cut_and_kept_as_unfinished() -> None:
    run = ask(FakeServer(V1_STREAM[:2], hangs=True), clients=2, limit_s=0.5)
    figure = summary(run)
    assert run.cut
    assert (figure["requests"], figure["unfinished"], figure["errors"]) == (2, 2, 0)
    assert figure["output_tokens"] == 4


def test_open_loop_asks_at_the_arrivals_it_drew_however_slow_the_server() -> None:
    def load(ask: Ask) -> Coroutine[Any, Any, Run]:
        return open_loop(ask, repeat("x"), rate=200, num_requests=4, seed=7, limit_s=0.5)

    run = under_load(FakeServer(V1_STREAM[:1], hangs=True), load)
    asked_s = [answer.asked_s - run.began_s for answer in run.answers]
    assert asked_s == pytest.approx(list(islice(poisson_arrivals(200, seed=7), 4)))


def test_arrivals_repeat_with_their_seed_and_come_at_their_rate() -> None:
    arrivals = list(islice(poisson_arrivals(10, seed=1), 5000))
    assert arrivals == list(islice(poisson_arrivals(10, seed=1), 5000))
    assert arrivals[-1] == pytest.approx(500, rel=0.05)


def test_any_url_is_loaded_with_a_sweep_or_at_a_rate() -> None:
    async def load(*flags: str) -> list[dict[str, Any]]:
        async with FakeServer(V1_STREAM).served() as target:
            options = serve._parser().parse_args(["--min-seconds", "0", "--repeats", "2", *flags])
            return await serve.load_url(target, repeat("x"), options)

    sweep = asyncio.run(load("--clients", "1,3"))
    assert [(figure["clients"], figure["requests"], figure["errors"]) for figure in sweep] == [(1, 2, 0), (3, 6, 0)]
    open_loop_figures = asyncio.run(load("--rate", "500", "--requests", "5"))
    assert [(figure["rate"], figure["requests"]) for figure in open_loop_figures] == [(500, 5)]


def test_chat_deltas_are_text() -> None:
    event = read_event(b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": null}]}')
    assert event is not None
    assert (event.text, event.finished) == ("hi", False)


def test_url_that_is_neither_v1_nor_openai_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a V1 URL"):
        Target("http://host/generate", 1)


# --- figures and report ----------------------------------------------------------------------------------------------


def a_run(*chunk_times_s: list[float], ended_s: float = 10.0, unfinished: bool = False) -> Run:
    answers = [
        Answer(asked_s=1.0, chunk_times_s=times, ended_s=None if unfinished else times[-1]) for times in chunk_times_s
    ]
    return Run(answers, began_s=0.0, ended_s=ended_s, cut=unfinished, stolen=0.0)


def test_rate_is_all_tokens_over_the_whole_run() -> None:
    assert summary(a_run([2.0, 3.0], [2.0, 3.0, 4.0]))["output_tokens_per_s"] == pytest.approx(0.5)


def test_percentiles_are_of_first_tokens_gaps_and_totals() -> None:
    figure = summary(a_run([2.0, 3.0, 5.0], [4.0, 5.0, 6.0]))
    assert figure["first_token_s_p50"] == pytest.approx(2.0)  # 1 and 3 seconds after asking
    assert figure["gap_s_p50"] == pytest.approx(1.0)  # 1, 2, 1, 1
    assert figure["total_s_p99"] == pytest.approx(4.99)  # 4 and 5


def test_request_without_a_token_stands_with_the_time_it_waited() -> None:
    figure = summary(a_run([], unfinished=True))
    assert (figure["unfinished"], figure["unanswered"]) == (1, 1)
    assert figure["first_token_s_p50"] == pytest.approx(9.0)


def test_ratio_pairs_each_repeat_with_its_neighbour() -> None:
    assert ratios([100, 50, 80], [50, 25, 20]) == {"median": 2.0, "min": 2.0, "max": 4.0}


def test_repeats_add_their_counts_and_spread_their_measures() -> None:
    merged = over_repeats([{"errors": 1, "gap_s_p50": 2.0}, {"errors": 2, "gap_s_p50": 4.0}])
    assert merged == {"repeats": 2, "errors": 3, "gap_s_p50": {"median": 3.0, "min": 2.0, "max": 4.0}}


def a_figure(contender: str, clients: int, **changes: Any) -> dict[str, Any]:
    measures = {key: spread([1.0, 2.0, 4.0]) for key in ("output_tokens_per_s", "first_token_s_p50", "gap_s_p50")}
    counts = {"unfinished": 0, "unanswered": 0, "errors": 0}
    return {"benchmark": "serve", "contender": contender, "clients": clients, **measures, **counts, **changes}


def test_results_file_is_json_with_one_figure_a_line(tmp_path: Path) -> None:
    figures = [a_figure("ours", 1), a_figure("ours", 8)]
    report.write_results({"cpu": "x"}, figures, path := tmp_path / "new" / "results.json")
    assert json.loads(path.read_text())["figures"] == figures
    assert sum("contender" in line for line in path.read_text().splitlines()) == 2


def test_results_are_named_by_date_and_machine() -> None:
    described = {"date": "2025-01-31", "cpu": "AMD EPYC(tm) 9", "cores": 2}
    assert report.results_path(described, Path("d")) == Path("d/2025-01-31-amd-epyc-tm-9-2-cores.json")


def test_machine_is_described_with_cores_versions_and_commit() -> None:
    described = report.machine()
    assert described["cores"] == len(os.sched_getaffinity(0))
    assert torch.__version__.startswith(described["torch"])  # PyPI's wheel adds the CUDA version: 2.13.0+cu130
    assert described.keys() >= {"cpu", "memory_gib", "transformers", "kserve", "commit", "date"}


def test_plot_is_a_png_and_an_svg_that_the_same_figures_repeat(tmp_path: Path) -> None:
    figures = [a_figure("ours", 1), a_figure("ours", 8), a_figure("generate", 1)]
    png, svg = report.plot(figures, tmp_path / "plot")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert report.plot(figures, tmp_path / "again")[1].read_bytes() == svg.read_bytes()


def test_card_marks_times_to_first_token_that_were_cut_as_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    report.serve_card([a_figure("truss-1", 8, unanswered=3), a_figure("ours", 8)])
    rows = [line for line in capsys.readouterr().out.splitlines() if "1-4" in line]
    assert [">2000 (1000-4000)" in row for row in rows] == [True, False]


def test_agreement_is_the_share_of_words_before_the_first_difference() -> None:
    texts = {"generate": "a b c d", "ours": "a b x d"}
    assert serve._agreement(texts, "ours") == pytest.approx(0.5)
