"""Gates judged by figures, and figures measured over HTTP: each kind of bad server fails by its own gate."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_cli.rollout import verbs
from mistral_cli.rollout.gates.evaluator import Addresses, GateEvaluator
from mistral_cli.rollout.gates.measure import Meter, endpoint
from mistral_cli.rollout.gates.rules import (
    Answer,
    GateResult,
    Gates,
    Measurements,
    Query,
    edit_distance,
    evaluate,
    evaluate_query,
    load,
    percentile,
)  # fmt: skip
from mistral_cli.rollout.planning.preconditions import Options
from mistral_cli.rollout.state.status import compute
from tests.support.cluster_api.gateway import CUTTING, FAILING, GOOD, NONSENSE, Behaviour, Gateway, serving
from tests.support.cluster_api.knative import NAME, NAMESPACE
from tests.support.cluster_api.runs import NEW, OLD, bench
from tests.support.server_process import free_port

FEW = Gates(prompts=("a", "b"), requests=4, concurrency=2, request_timeout_s=20, speed_measurements=1)


def answers(number: int = 4, *, text: str = "Paris", ttft_s: float = 0.5, rate: float = 20.0) -> Measurements:
    return Measurements(
        tuple(Answer("ab"[each % 2], text, ttft_s=ttft_s, tokens_per_second=rate) for each in range(number))
    )


def verdicts(gates: Gates, stable: Measurements, candidate: Measurements) -> dict[str, bool | None]:
    return {result.name: result.passed for result in evaluate(gates, stable, candidate)}


# Judging


def test_equal_figures_pass_every_gate() -> None:
    assert set(verdicts(FEW, answers(), answers()).values()) == {True}


def test_a_gate_without_data_is_not_passed() -> None:
    assert True not in verdicts(FEW, Measurements(), Measurements()).values()


def test_too_few_requests_are_no_data() -> None:
    found = verdicts(FEW, answers(), answers(3))
    assert found["error_rate"] is None
    assert found["ttft_p95_ratio"] is None


@pytest.mark.parametrize(
    ("gate", "candidate"),
    [
        ("error_rate", Measurements((*answers(3).answers, Answer("a", error="500")))),
        ("incomplete_streams", Measurements((*answers(3).answers, Answer("a", error="cut", incomplete=True)))),
        ("golden_distance", answers(text="blue blue")),
        ("golden_distance", answers(text="")),
        ("ttft_p95_ratio", answers(ttft_s=1.0)),
        ("tokens_per_second_ratio", answers(rate=10.0)),
    ],
)
def test_each_gate_sees_its_own_fault(gate: str, candidate: Measurements) -> None:
    found = verdicts(FEW, answers(), candidate)
    assert found[gate] is False
    assert [name for name, passed in found.items() if passed is False] == [gate]


def test_a_fault_that_the_stable_version_shows_as_well_is_no_verdict() -> None:
    """A gateway that restarts fails both."""
    failing = Measurements((*answers(3).answers, Answer("a", error="502")))
    assert verdicts(FEW, failing, failing)["error_rate"] is None


def test_a_gateway_that_refuses_connections_says_nothing_about_a_version() -> None:
    with closing(Meter(FEW, {}, "mistral-7b")) as meter:
        assert meter.ask(endpoint(f"http://127.0.0.1:{free_port()}"), "a") is None


def test_a_text_within_the_stated_distance_passes() -> None:
    assert verdicts(FEW, answers(text="It is a river."), answers(text="It is a rivet."))["golden_distance"] is True


def test_another_model_is_not_compared_by_its_text() -> None:
    found = verdicts(Gates(prompts=("a",), requests=4, max_edit_distance=None), answers(), answers(text="else"))
    assert "golden_distance" not in found


def test_a_difference_below_the_slack_is_noise() -> None:
    assert verdicts(FEW, answers(ttft_s=0.01), answers(ttft_s=0.05))["ttft_p95_ratio"] is True


@pytest.mark.parametrize(("left", "right", "edits"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3)])
def test_edit_distance_counts_insertions_deletions_and_replacements(left: str, right: str, edits: int) -> None:
    assert edit_distance(left, right) == edits


def test_a_percentile_ignores_what_was_not_measured() -> None:
    assert percentile([3.0, math.nan, 1.0, 2.0], 0.95) == 3.0
    assert percentile([math.nan], 0.5) is None


# Thresholds


def test_the_thresholds_that_ship_are_whole() -> None:
    gates = load()
    assert len(gates.prompts) >= 5
    assert gates.max_error_rate == 0


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "gates.yaml").write_text("max_ttft_ratio: 3\nqueries: [{name: q, query: up, max: 1}]\n")
    gates = load(tmp_path / "gates.yaml")
    assert (gates.max_ttft_ratio, gates.prompts) == (3, load().prompts)
    assert gates.queries == (Query("q", "up", max=1),)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_eror_rate: 0", "no gate is called max_eror_rate; known: .*max_error_rate"),
        ("[]", "must be a YAML mapping"),
        ("a: [", "cannot be read"),
        ("requests: 0", "at least one"),
        ("queries: [{nam: x}]", "unexpected keyword argument 'nam'"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "gates.yaml")


# Measuring


def measured(
    folder: Path, behaviour: Behaviour, stable: Behaviour = GOOD, gates: Gates = FEW
) -> tuple[list[GateResult], Gateway]:
    with bench(folder) as at, serving(at.world) as gateway:
        verbs.start(at.executor(), Options(NEW, steps=(0,)))
        gateway.behaviours |= {NEW: behaviour, OLD: stable}
        with closing(Meter(gates, {}, None)) as meter:
            evaluator = GateEvaluator(gates, meter, Addresses(gateway.url), NAMESPACE, NAME)
            return evaluator.evaluate(compute(at.executor().reader.read()), 0, None), gateway


def test_both_versions_are_asked_through_the_gateway_by_their_own_hosts(tmp_path: Path) -> None:
    any_speed = replace(FEW, ttft_slack_s=60, min_tokens_per_second_ratio=0)
    found, gateway = measured(tmp_path, GOOD, gates=any_speed)
    assert all(result.passed for result in found)
    assert gateway.asked == {NEW: 5, OLD: 5}  # one each to wake them


@pytest.mark.parametrize(
    ("behaviour", "gate"),
    [
        (FAILING, "error_rate"),
        (CUTTING, "error_rate"),
        (NONSENSE, "golden_distance"),
        (Behaviour(first_s=0.5), "ttft_p95_ratio"),
        (Behaviour(word_s=0.2), "tokens_per_second_ratio"),
    ],
)
def test_a_server_made_worse_fails_by_the_gate_that_sees_it(tmp_path: Path, behaviour: Behaviour, gate: str) -> None:
    found, _ = measured(tmp_path, behaviour, stable=Behaviour(word_s=0.01))
    assert gate in [result.name for result in found if result.passed is False]


SLOW = Behaviour(first_s=0.5, word_s=0.2)


@pytest.mark.parametrize(
    ("candidates", "passed"),
    [((SLOW, GOOD), [None, True]), ((SLOW, SLOW, SLOW), [None, None, False]), ((NONSENSE,), [False])],
    ids=["slow once", "slow each time", "wrong text"],
)
def test_only_a_version_that_is_slow_each_time_fails_by_its_speed(
    tmp_path: Path, candidates: tuple[Behaviour, ...], passed: list[bool | None]
) -> None:
    gates = replace(FEW, speed_measurements=3, ttft_slack_s=0.3, min_tokens_per_second_ratio=0.01)
    with bench(tmp_path) as at, serving(at.world) as gateway, closing(Meter(gates, {}, None)) as meter:
        verbs.start(at.executor(), Options(NEW, steps=(0,)))
        evaluator = GateEvaluator(gates, meter, Addresses(gateway.url), NAMESPACE, NAME)
        found = []
        for candidate in candidates:
            gateway.behaviours |= {NEW: candidate, OLD: GOOD}
            results = evaluator.evaluate(compute(at.executor().reader.read()), 0, None)
            found.append(next((result.passed for result in results if not result.passed), True))

    assert found == passed


def test_a_stable_version_that_does_not_answer_leaves_the_gates_without_data(tmp_path: Path) -> None:
    found, _ = measured(tmp_path, GOOD, stable=FAILING)
    assert {result.name for result in found if result.passed is None} >= {"golden_distance", "ttft_p95_ratio"}


def test_the_host_header_names_the_version_and_the_gateway_is_dialled() -> None:
    asked = endpoint("http://latest-x.ns.example.com", "https://10.0.0.1:8443/")
    assert asked.base_url == "https://10.0.0.1:8443"
    assert asked.headers == {"Host": "latest-x.ns.example.com"}
    assert asked.extensions == {"sni_hostname": "latest-x.ns.example.com"}


# Prometheus


@pytest.mark.parametrize(
    ("value", "requests", "passed"),
    [(0.001, 50.0, True), (0.2, 50.0, False), (None, 50.0, None), (0.0, 3.0, None), (math.nan, 50.0, None)],
)
def test_a_query_is_judged_only_with_enough_requests_behind_it(
    value: float | None, requests: float, passed: bool | None
) -> None:
    query = Query("errors", "x", max=0.01, requests_query="y")
    assert evaluate_query(query, value, requests, 40).passed is passed


def test_a_prometheus_that_does_not_answer_is_no_data() -> None:
    gates = Gates(prompts=("a",), prometheus_url="http://127.0.0.1:9")
    with closing(Meter(gates, {}, None)) as meter:
        assert meter.query("up") is None
