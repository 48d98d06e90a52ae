"""Sequences with a grammar in the batch: they follow their grammar, and other sequences do not change."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralForCausalLM

from model_server.compute.cpu.packed_linear import pack
from model_server.compute.fused_linear import fuse
from model_server.errors import BadRequest, GrammarTooComplex
from model_server.request import Finished, FinishReason, Request, SamplingParams
from model_server.text.grammar import GrammarCompiler, GrammarKind, GrammarSpec
from tests.support.engine_requests import GREEDY, Gate, MakeEngine, events, request
from tests.support.fakes import OnlyTokens, TokenIds
from tests.support.oracle import BATCHED, SAMPLED, prompt
from tests.support.small_tokenizers import byte_fallback
from tests.support.tiny_model import VOCAB_SIZE, tiny_mistral
from tests.text.test_grammar import SCHEMAS

TEXT = byte_fallback()
TEXT_VOCAB_SIZE = len(TEXT.tokenizer)
COMPILER = GrammarCompiler(TEXT.tokenizer_json, vocab_size=TEXT_VOCAB_SIZE, eos_token_ids=[2])
HOT: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0}
ALL_TOKENS = range(VOCAB_SIZE)
CHOICES = ["yes", "no", "a long one, with a comma"]
both_loops = pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])


@pytest.fixture(scope="module")
def text_model() -> MistralForCausalLM:
    """A random model with the vocabulary of a real tokenizer."""
    model = tiny_mistral(vocab_size=TEXT_VOCAB_SIZE)
    fuse(model)
    pack(model)
    return model


def constrained(spec: GrammarSpec, fields: dict[str, Any] = HOT, num_tokens: int = 200, **changes: Any) -> Request:
    stop = changes.pop("stop", ())
    sampling = SamplingParams(fields, num_tokens, **changes)
    return Request([5, 6, 7], sampling, [TEXT.stream(stop)], COMPILER.compile(spec))


async def texts(engine: Any, requests: list[Request]) -> list[tuple[str, FinishReason]]:
    """Return the text and the finish reason of each answer."""
    engine.submit(requests)
    answers = await events(*requests)
    assert all(isinstance(answer, list) for answer in answers), answers
    return [("".join(event.text for event in answer[:-1]), answer[-1].finish_reason) for answer in answers]


def same_answers(num_tokens: int = 16) -> list[Request]:
    """Return greedy and seeded requests with every kind of logits processor."""
    kinds = [*BATCHED, SAMPLED | {"top_k": 0}]
    return [
        request(num_tokens, prompt=prompt(5 + i % 7), sampling={"generate": fields, "seed": i})
        for i, fields in enumerate(kinds)
    ]


@both_loops
async def test_a_grammar_that_allows_everything_changes_no_token(make_engine: MakeEngine, overlap: bool) -> None:
    engine = make_engine(overlap=overlap)
    free, all_allowed = same_answers(), same_answers()
    for one in all_allowed:
        one.matcher = OnlyTokens(ALL_TOKENS)
    engine.submit([*free, *all_allowed])

    answers = await events(*free, *all_allowed)

    assert answers[: len(free)] == answers[len(free) :]
    assert all(one.matcher.accepted == one.detokenizers[0].ids for one in all_allowed)


@both_loops
async def test_sequences_beside_constrained_ones_answer_as_by_themselves(
    make_engine: MakeEngine, overlap: bool
) -> None:
    engine = make_engine(overlap=overlap)
    by_themselves = []
    for one in same_answers():
        engine.submit([one])
        by_themselves += await events(one)
    requests = []
    for one in same_answers():
        few = request(9, sampling={"generate": HOT}, matcher=OnlyTokens({10, 11, 12}))
        requests += [one, few]
    engine.submit(requests)

    assert (await events(*requests))[::2] == by_themselves


SPECS = [
    GrammarSpec.choice(CHOICES),
    GrammarSpec(GrammarKind.REGEX, "[0-9]{3}(-[a-z]{2,4})?"),
    GrammarSpec(GrammarKind.LARK, 'start: "(" start ")" | "x"'),
    GrammarSpec.json_schema({"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 999}},
                             "required": ["a"], "additionalProperties": False}),
]  # fmt: skip


def fits(spec: GrammarSpec, text: str) -> bool:
    match spec.kind:
        case GrammarKind.CHOICE:
            return text in json.loads(spec.source)
        case GrammarKind.REGEX:
            return re.fullmatch(spec.source, text) is not None
        case GrammarKind.LARK:
            return re.fullmatch(r"\(*x\)*", text) is not None and text.count("(") == text.count(")")
    return jsonschema.validate(json.loads(text), json.loads(spec.source)) is None


@both_loops
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind.value)
async def test_every_answer_that_is_not_cut_fits_its_grammar(
    make_engine: MakeEngine, text_model: MistralForCausalLM, spec: GrammarSpec, overlap: bool
) -> None:
    engine = make_engine(text_model, overlap=overlap)

    answers = await texts(engine, [constrained(spec, seed=i) for i in range(12)])

    complete = [text for text, reason in answers if reason is FinishReason.STOP]
    assert complete
    assert all(fits(spec, text) for text in complete)


async def test_32_sequences_with_32_schemas_answer_each_its_own(
    make_engine: MakeEngine, text_model: MistralForCausalLM
) -> None:
    engine = make_engine(text_model, max_batch_size=32)
    specs = [
        GrammarSpec.json_schema({"type": "object", "properties": {f"p{i}": {"enum": [i, f"v{i}"]}},
                                 "required": [f"p{i}"], "additionalProperties": False})
        for i in range(32)
    ]  # fmt: skip

    answers = await texts(engine, [constrained(spec, seed=i) for i, spec in enumerate(specs)])

    complete = [(spec, text) for spec, (text, reason) in zip(specs, answers, strict=True) if reason == "stop"]
    assert len(complete) > 16
    assert all(fits(spec, text) for spec, text in complete)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(SCHEMAS, min_size=6, max_size=6))
def test_every_answer_to_made_up_schemas_validates(
    make_engine: MakeEngine, text_model: MistralForCausalLM, schemas: list[dict[str, Any]]
) -> None:
    requests = [constrained(GrammarSpec.json_schema(schema), seed=i) for i, schema in enumerate(schemas)]

    answers = asyncio.run(texts(make_engine(text_model), requests))

    for schema, (text, reason) in zip(schemas, answers, strict=True):
        if reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("fields", BATCHED, ids=str)
async def test_the_grammar_wins_over_every_logits_processor(
    make_engine: MakeEngine, text_model: MistralForCausalLM, fields: dict[str, Any]
) -> None:
    """`min_new_tokens`, suppressed and forced tokens, top_k and others apply as far as the grammar allows."""
    engine = make_engine(text_model)
    fields = {name: value for name, value in fields.items() if name != "eos_token_id"}

    answers = await texts(engine, [constrained(GrammarSpec.choice(CHOICES), fields, 60, seed=i) for i in range(3)])

    assert {text for text, _ in answers} <= set(CHOICES)
    assert {reason for _, reason in answers} == {FinishReason.STOP}


async def test_an_answer_with_a_stop_string_ends_before_it(
    make_engine: MakeEngine, text_model: MistralForCausalLM
) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "abc,def")

    assert await texts(make_engine(text_model), [constrained(spec, stop=(",",))]) == [("abc", FinishReason.STOP)]


async def test_log_probabilities_are_those_of_the_model_without_the_grammar(
    make_engine: MakeEngine, text_model: MistralForCausalLM
) -> None:
    one = constrained(GrammarSpec.choice(["yes"]), logprobs=1)
    engine = make_engine(text_model)
    engine.submit([one])

    [answer] = await events(one)
    assert isinstance(answer, list)
    first = next(event for event in answer if not isinstance(event, Finished) and event.tokens).tokens[0]

    logits = text_model(torch.tensor([[5, 6, 7]])).logits[0, -1].float()
    expected = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[first.id]), abs=1e-3)
    assert first.top[0][0] == int(expected.argmax())


async def test_a_prefix_from_the_cache_changes_no_constrained_answer(
    make_engine: MakeEngine, text_model: MistralForCausalLM
) -> None:
    engine = make_engine(text_model)
    first, second = (constrained(SPECS[1], GREEDY, num_tokens=100) for _ in range(2))
    first.prompt_ids = second.prompt_ids = [5 + i % 90 for i in range(60)]

    answers = [(await texts(engine, [one]))[0] for one in (first, second)]

    assert second.num_cached_tokens > 0
    assert answers[0] == answers[1]


@both_loops
@pytest.mark.parametrize("fault", ["fill", "accept"])
async def test_a_grammar_that_fails_ends_its_own_sequence_alone(
    make_engine: MakeEngine, overlap: bool, fault: str
) -> None:
    engine = make_engine(overlap=overlap)
    error = GrammarTooComplex("grammar: too complex", field="grammar")
    failing = OnlyTokens(ALL_TOKENS, fill_error=error if fault == "fill" else None, accept_error_after=3)
    requests = [request(12), request(12, matcher=failing), request(12, matcher=OnlyTokens(ALL_TOKENS))]
    engine.submit(requests)

    before, failed, after = await events(*requests)

    assert isinstance(failed, GrammarTooComplex)
    assert before == after
    assert isinstance(before, list)
    assert (engine.dead, engine.running, engine.kv_usage) == (None, 0, 0)


async def test_a_step_that_fails_is_repeated_without_a_token_accepted_twice(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    gate = Gate(engine, monkeypatch)

    def fail_in_pairs(decode: Any, prefill: Any) -> None:
        if len(decode) + len(prefill) > 1:
            raise RuntimeError("too many")

    gate.fault = fail_in_pairs
    requests = [request(6, prompt=prompt(4 + i), matcher=OnlyTokens(ALL_TOKENS)) for i in range(3)]
    engine.submit(requests)
    await events(*requests)

    for one in requests:
        text = one.detokenizers[0]
        assert isinstance(text, TokenIds)
        assert isinstance(one.matcher, OnlyTokens)
        assert one.matcher.accepted == text.ids


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("num_beams", {"num_beams": 2}),
        ("guidance_scale", {"guidance_scale": 1.5}),
        ("use_cache", {"use_cache": False}),
    ],
)
async def test_what_cannot_be_batched_is_refused_with_a_grammar(
    make_engine: MakeEngine, name: str, fields: dict[str, Any]
) -> None:
    engine = make_engine()
    one = request(4, sampling={"generate": GREEDY | fields}, matcher=OnlyTokens(ALL_TOKENS))

    with pytest.raises(BadRequest, match=f"{name} does not work with grammar: leave one out."):
        engine.submit([one])

    assert engine.waiting == 0
