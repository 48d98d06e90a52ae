"""The load generator against a scripted server: what it sends, reads, counts and cuts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import chain, repeat
from threading import Event
from typing import Any

import pytest

from benchmarks.client import Answer, Target, asking
from benchmarks.figures import over_repeats, ratios, summary
from benchmarks.load import Run, closed_loop, least_disturbed
from tests.support.scripted_server import (
    DONE,
    Act,
    ScriptedServer,
    after,
    answer_json,
    error_event,
    event,
    stream,
)
from tests.support.server_process import free_port

END = event("", finish_reason="length", prompt_tokens=2, completion_tokens=3)
WHOLE = stream(event("a"), event(" b"), event(" c"), END, DONE)
V1 = "/v1/models/m:predict"


def run(*acts: Act, path: str = V1, clients: int = 1, limit_s: float = 30) -> tuple[Run, ScriptedServer]:
    async def load(url: str) -> Run:
        async with asking(Target(url + path, max_new_tokens=3, model="m")) as ask:
            return await closed_loop(ask, repeat("one two"), clients=clients, min_seconds=0, limit_s=limit_s)

    with ScriptedServer(list(acts)) as server:
        return asyncio.run(load(server.url)), server


def test_each_client_of_a_closed_loop_sends_one_request_at_a_time() -> None:
    result, server = run(WHOLE, clients=5)
    assert [answer.error for answer in result.answers] == [None] * 5
    assert [request.body["prompt"] for request in server.asked] == ["one two"] * 5


def test_counts_are_the_servers_own_in_both_formats() -> None:
    texts = [b'data: {"choices": [{"text": "%s"}]}\n\n' % text for text in (b"a", b" b")]
    end = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}\n\n'
    openai, server = run(stream(*texts, end, usage, DONE), path="/v1/completions")
    v1, _ = run(WHOLE)
    for result, chunks in ((openai, 2), (v1, 3)):
        [answer] = result.answers
        assert (answer.error, answer.output_tokens) == (None, 3)
        assert len(answer.chunk_times_s) == chunks
    assert (server.asked[0].body["model"], server.asked[0].body["max_tokens"]) == ("m", 3)


def test_an_event_cut_by_the_network_is_read_whole() -> None:
    whole = event("a") + event("b")
    result, _ = run(stream(whole[:9], whole[9:30], whole[30:], END, DONE))
    assert (result.answers[0].error, len(result.answers[0].chunk_times_s)) == (None, 2)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (stream(event("a")), "the stream ended without a finish reason"),
        (stream(event("a"), error_event("out of memory")), "out of memory"),
        (answer_json({"error": "queue full"}, 429), 'HTTP 429: {"error": "queue full"}'),
        (stream(event("a"), event("", finish_reason="stop", completion_tokens=1)), "asked for 3 tokens, got 1"),
    ],
    ids=["cut stream", "error event", "refusal", "short answer"],
)
def test_a_failed_answer_is_kept_with_its_reason_and_counts_no_tokens(act: Act, error: str) -> None:
    result, _ = run(act)
    assert result.answers[0].error == error
    assert summary(result)["output_tokens"] == 0


def test_answers_open_at_the_limit_are_kept_as_unfinished() -> None:
    never = Event()
    result, _ = run(
        stream(event("a"), event("b"), then=after(never, lambda handler: never.clear())), clients=2, limit_s=1
    )
    figure = summary(result)
    never.set()
    assert result.cut
    assert (figure["requests"], figure["unfinished"], figure["errors"], figure["output_tokens"]) == (2, 2, 0, 4)


def test_clients_ask_equally_often_though_some_answers_are_slow() -> None:
    asked: Counter[Any] = Counter()

    async def ask(prompt: str, answer: Answer) -> None:
        asked[asyncio.current_task()] += 1
        await asyncio.sleep(0.1 if prompt == "slow" else 0.01)

    prompts = chain(["slow"], repeat("quick"))
    asyncio.run(closed_loop(ask, prompts, clients=2, min_seconds=0.05, limit_s=10))
    first, second = asked.values()
    assert first == second


def test_a_url_of_another_api_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a V1 URL"):
        Target("http://host/generate", 1)


def test_a_server_that_is_down_is_an_error_of_the_answer() -> None:
    async def load() -> Run:
        async with asking(Target(f"http://127.0.0.1:{free_port()}{V1}", 3)) as ask:
            return await closed_loop(ask, repeat("x"), clients=1, min_seconds=0, limit_s=30)

    assert "ClientConnector" in str(asyncio.run(load()).answers[0].error)


def a_run(*chunk_times_s: list[float], **changes: Any) -> Run:
    answers = [Answer(asked_s=1.0, chunk_times_s=times, ended_s=times[-1]) for times in chunk_times_s]
    return dataclasses.replace(Run(answers, began_s=0.0, ended_s=10.0, cut=False, cpu_steal=0.0), **changes)


@pytest.mark.parametrize(("steal", "tries", "kept"), [([0.01], 1, 0), ([0.1, 0.02], 2, 1), ([0.3, 0.1, 0.2], 3, 1)])
def test_a_load_is_repeated_while_the_host_takes_too_much_cpu_time(
    steal: Sequence[float], tries: int, kept: int
) -> None:
    runs = [a_run([2.0], cpu_steal=share) for share in steal]
    to_come = iter(runs)

    async def load() -> Run:
        return next(to_come)

    assert asyncio.run(least_disturbed(load)) is runs[kept]
    assert len(runs) == tries


def test_rate_and_percentiles_come_from_all_answers() -> None:
    figure = summary(a_run([2.0, 3.0, 5.0], [4.0, 5.0, 6.0]))
    assert figure["output_tokens_per_s"] == pytest.approx(0.6)
    assert figure["first_token_s_p50"] == pytest.approx(2.0)  # 1 and 3 seconds after the request
    assert figure["gap_s_p50"] == pytest.approx(1.0)  # 1, 2, 1, 1
    assert figure["total_s_p99"] == pytest.approx(4.99)  # 4 and 5


def test_an_answer_without_a_token_counts_with_the_time_it_waited() -> None:
    figure = summary(a_run(answers=[Answer(asked_s=1.0)], cut=True))
    assert (figure["unanswered"], figure["first_token_s_p50"]) == (1, pytest.approx(9.0))


def test_repeats_add_counts_spread_measures_and_pair_with_their_neighbours() -> None:
    merged = over_repeats([{"errors": 1, "gap_s_p50": 2.0}, {"errors": 2, "gap_s_p50": 4.0}])
    assert merged == {"repeats": 2, "errors": 3, "gap_s_p50": {"median": 3.0, "min": 2.0, "max": 4.0}}
    assert ratios([100, 50, 80], [50, 25, 20]) == {"median": 2.0, "min": 2.0, "max": 4.0}
