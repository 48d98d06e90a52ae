"""Grammars: what they allow is what fits them, and a hostile one is a sentence and not a wait."""

from __future__ import annotations

import ctypes
import json
import random
import re

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_server.errors import BadRequest, GrammarTooComplex
from model_server.text.grammar import GrammarCompiler, GrammarKind, GrammarSpec, Matcher
from model_server.text.tokenizer import Text
from tests.support.small_tokenizers import byte_fallback

EOS = 2
TEXT = byte_fallback()
VOCAB_SIZE = len(TEXT.tokenizer)
COMPILER = GrammarCompiler(TEXT.tokenizer.backend_tokenizer.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=[EOS])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed(matcher: Matcher, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Return the tokens that may come next."""
    num_bytes = (vocab_size + 31) // 32 * 4
    memory = (ctypes.c_uint8 * num_bytes)()
    for failure in Matcher.fill_all([matcher], ctypes.addressof(memory), num_bytes).values():
        raise failure
    return [i for i in range(vocab_size) if memory[i // 8] >> i % 8 & 1]


def random_answer(spec: GrammarSpec, seed: int, max_tokens: int = 400, text: Text = TEXT) -> str | None:
    """Return the text of a random walk through the grammar, or None when it is not at its end after `max_tokens`."""
    matcher, chance, ids = COMPILER.compile(spec), random.Random(seed), []
    for _ in range(max_tokens):
        tokens = allowed(matcher)
        token = EOS if EOS in tokens and chance.random() < 0.5 else chance.choice(tokens)
        if token == EOS:
            return text.decode(ids)
        matcher.accept(token)
        ids.append(token)
    return None


def accept_first_tokens(matcher: Matcher, count: int) -> None:
    for _ in range(count):
        matcher.accept(allowed(matcher)[0])


def refusal(spec: GrammarSpec) -> str:
    with pytest.raises(BadRequest) as caught:
        COMPILER.compile(spec)
    return str(caught.value)


def regex(source: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, source)


def lark(source: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.LARK, source)


@pytest.mark.parametrize("seed", range(20))
def test_an_answer_to_a_schema_validates(seed):
    answer = random_answer(GrammarSpec.json_schema(PERSON), seed)

    assert answer is None or jsonschema.validate(json.loads(answer), PERSON) is None


SCHEMAS = st.recursive(
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None]}])
    | st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 5))
    | st.builds(
        lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-9, 9), st.integers(0, 9)
    ),
    lambda inner: (
        st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner, st.integers(0, 3))
        | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
        | st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:1],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "é"]), inner, max_size=3),
        )
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.integers())
def test_an_answer_to_any_made_up_schema_validates(schema, seed):
    answer = random_answer(GrammarSpec.json_schema(schema), seed)

    assert answer is None or jsonschema.validate(json.loads(answer), schema) is None


@pytest.mark.parametrize("expression", [r"[0-9]{3}-[a-z]+", "(yes|no)!?", r"\d+(\.\d+)?", "日本(語)?", "a{0,9}b"])
def test_an_answer_to_an_expression_matches_all_of_it(expression):
    answers = [random_answer(regex(expression), seed) for seed in range(10)]

    assert all(re.fullmatch(expression, answer) for answer in answers if answer is not None)


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ['a "quoted"\n', "tab\t", "\\d", "/x/"], ["a", "ab", "abc"], ["é", "語"]]
)
def test_an_answer_is_one_of_the_choices(choices):
    answers = {random_answer(GrammarSpec.choice(choices), seed) for seed in range(30)}

    assert answers <= set(choices)


def test_an_answer_to_a_grammar_is_in_its_language():
    answers = [random_answer(lark('start: "a" start "b" | "c"'), seed) for seed in range(20)]

    assert all(re.fullmatch("a*cb*", a) and a.count("a") == a.count("b") for a in answers if a is not None)


def test_a_grammar_that_wakes_allows_everything_before_its_token():
    matcher = COMPILER.compile(regex("x"), wake_token_id=7)
    matcher.accept(100)
    assert not matcher.active

    matcher.accept(7)

    assert matcher.active
    assert {TEXT.decode([token]) for token in allowed(matcher)} <= {"x"}


def test_the_first_mask_is_known_from_the_compilation_until_a_token_is_accepted():
    matcher = COMPILER.compile(regex("xy"), wake_token_id=7)
    matcher.accept(100)
    matcher.accept(7)
    num_bytes = (VOCAB_SIZE + 31) // 32 * 4
    memory = (ctypes.c_uint8 * num_bytes)()
    Matcher.fill_all([matcher], ctypes.addressof(memory), num_bytes)

    assert matcher.first_mask == bytes(memory)
    matcher.accept(allowed(matcher)[0])
    assert matcher.first_mask is None


def test_equal_grammars_are_compiled_once_and_matched_apart():
    first, second = (COMPILER.compile(GrammarSpec.choice(["ab", "b"])) for _ in range(2))
    first.accept(next(token for token in allowed(first) if TEXT.decode([token]) == "a"))

    assert allowed(first) != allowed(second)


def test_an_answer_that_is_complete_may_only_end():
    matcher = COMPILER.compile(regex("x"))
    matcher.accept(next(token for token in allowed(matcher) if TEXT.decode([token]) == "x"))

    assert allowed(matcher) == [EOS]


def test_a_grammar_that_becomes_too_complex_fails_alone_among_those_filled_together():
    too_complex = COMPILER.compile(regex("(a?){300}a{300}"))
    others = [COMPILER.compile(regex("a{600}")) for _ in range(2)]
    with pytest.raises(GrammarTooComplex):
        accept_first_tokens(too_complex, 600)
    num_bytes = (VOCAB_SIZE + 31) // 32 * 4
    masks = (ctypes.c_uint8 * (3 * num_bytes))()

    failures = Matcher.fill_all([others[0], too_complex, others[1]], ctypes.addressof(masks), 3 * num_bytes)

    assert {i: type(failure) for i, failure in failures.items()} == {1: GrammarTooComplex}
    assert bytes(masks)[:num_bytes] == bytes(masks)[2 * num_bytes :] != bytes(num_bytes)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (GrammarSpec.json_schema({"not": {}}), 'json_schema: Unimplemented keys: ["not"]'),
        (GrammarSpec.json_schema({"$ref": "http://example.com/schema"}), "json_schema: "),
        (GrammarSpec.json_schema({"$ref": "#"}), "json_schema: no text fits"),
        (GrammarSpec.json_schema({"enum": []}), "json_schema: Unsatisfiable schema"),
        (GrammarSpec.json_schema({"type": "string", "pattern": "(a"}), "json_schema: "),
        (regex("(a"), "regex: "),
        (regex("(?=a)b"), "look-around"),
        (lark("start: foo"), 'unknown name: "foo"'),
        (lark(""), "grammar: "),
        (regex("x" * 70_000), "regex has 70000 characters; the maximum is 65536."),
    ],
)
def test_a_wrong_grammar_is_refused_with_its_place(spec, part):
    assert part in refusal(spec)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: GrammarSpec.choice([]), "1 to 1000"),
        (lambda: GrammarSpec.choice(["x"] * 1001), "1 to 1000"),
        (lambda: GrammarSpec.choice(["x", ""]), "empty text"),
        (lambda: GrammarSpec.json_schema([1]), "an object"),
        (lambda: GrammarSpec.json_schema(json.loads('{"items":' * 200 + "{}" + "}" * 200)), "50 levels"),
    ],
)
def test_a_malformed_spec_is_refused(make, part):
    with pytest.raises(BadRequest, match=part):
        make()
