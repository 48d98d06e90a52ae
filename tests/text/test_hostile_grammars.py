"""Hostile grammars: each is refused with a sentence, or its cost is bounded."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from model_server.errors import BadRequest
from model_server.text.grammar import GrammarSpec
from tests.text.test_grammar import COMPILER, EOS, TEXT, allowed, lark, regex

schema = GrammarSpec.json_schema


def nested(keyword: str, depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {keyword: value}
    return value


def chain(keyword: str, length: int) -> dict[str, Any]:
    """Return a schema that is small as written and of 2**length parts as expanded."""
    links = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(length)}
    return {"$defs": links | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


HOSTILE = [
    regex("(a|aa)*" * 200 + "b"),
    regex("((a{1,100}){1,100}){1,100}"),
    regex("(a{1,1000}){1,1000}"),
    regex("(.*a){50}"),
    regex("(a|b)*a(a|b){500}"),
    regex(r"(\p{L}|\w|.)*" * 50),
    regex("|".join(str(i) for i in range(10_000))),
    lark('start: start start | "a" | ""'),
    lark(
        "start: a\n"
        + "\n".join(f"a{'a' * i}: a{'a' * (i + 1)} a{'a' * (i + 1)}" for i in range(60))
        + f'\na{"a" * 60}: "x"'
    ),
    lark('start: "a"*' + "\n" + "A: /" + "(x?){1000}" * 5 + "/"),
    schema({"enum": [f"value {i}" for i in range(4000)]}),
    schema({"type": "array", "minItems": 10**9, "items": {}}),
    schema({"type": "string", "minLength": 10**9}),
    schema({"type": "string", "pattern": "^(a+)+$"}),
    schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    schema({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    schema({"anyOf": [{"required": [f"p{i}"], "type": "object"} for i in range(500)]}),
    schema({"allOf": [{"anyOf": [{"type": "string"}, {"type": "integer"}]} for _ in range(20)]}),
    schema(
        {
            "$defs": {
                f"d{i}": {
                    "anyOf": [{"$ref": f"#/$defs/d{(i + 1) % 50}"}, {"type": "array", "items": {"$ref": "#/$defs/d0"}}]
                }
                for i in range(50)
            },
            "$ref": "#/$defs/d0",
        }
    ),
    regex("(a?" * 200 + ")" * 200),
    regex("(" * 100 + "a" + ")*" * 100),
    regex("a{1,100000}"),
    regex("a{100000}"),
    regex(".{50000}"),
    regex(r"\p{L}{1,5000}"),
    regex(r"(\w+\s+){1,500}"),
    regex("(?i)" + "straße" * 500),
    regex("[\\u{D800}-\\u{DFFF}]"),
    regex("(\u200b\u200d\u202e)*x"),
    regex("e" + "\u0301" * 20_000),
    regex(r"[\w&&[^\d]&&[a-z]]{1,300}"),
    regex("|".join("a" * i + "b" for i in range(300))),
    regex(".*a.*b.*c.*d.*e.*f.*g.*h.*i.*j.*k"),
    regex("(((a+)+)+)+$"),
    regex("([a-z][0-9]){1,200}([0-9][a-z]){1,200}"),
    regex(r"(a)\1"),
    regex("(?<=a)b"),
    regex("(?xsmiU)" + " a b c " * 2000),
    lark('start: start "a" | "b"'),
    lark("start: a\na: b\nb: a"),
    lark('start: a\na: a a a | "x"'),
    lark('start: a*\na: b*\nb: c*\nc: ""'),
    lark("start: A\nA: /(a|b){1,3000}/"),
    lark('start: A\nA: A "x"'),
    lark("%import .etc.passwd\nstart: passwd"),
    lark('start: %json {"$ref":"#"}'),
    lark("start: r0\n" + "\n".join(f'r{i}: "{i}" r{i + 1} | "x"' for i in range(1500)) + '\nr1500: "e"'),
    lark('start: (("a"{1,300}){1,300}){1,300}'),
    lark("start: <|endoftext|> | <[0-40000]>"),
    lark('start: "a"\n' + "// x\n" * 10_000),
    lark("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    schema({"enum": ["x" * i for i in range(340)]}),
    schema({"const": "é" * 30_000}),
    schema({"type": "object", "required": [f"p{i}" for i in range(5000)]}),
    schema(chain("anyOf", 20)),
    schema(chain("allOf", 16)),
    schema({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(3)]} for i in range(12)]}),
    schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    schema(nested("items", 49)),
    schema(nested("not", 30)),
    schema({"type": "array", "minItems": 100_000, "maxItems": 100_000, "items": {"enum": [1]}}),
    schema({"type": "string", "minLength": 5, "maxLength": 2}),
    schema({"type": "number", "minimum": -1e308, "maximum": 1e308}),
    schema({"type": "number", "multipleOf": 1e-300}),
    schema({"type": "string", "pattern": "^(a|b)*a(a|b){1000}$"}),
    schema({"patternProperties": {f"^(x|y)*{c}(x|y){{12}}$": {} for c in "abcdefgh"}}),
    schema({"properties": {"a" * i: {} for i in range(1, 250)}, "additionalProperties": {"type": "string"}}),
    schema({"properties": {chr(0x1F600 + i) * 20: {} for i in range(80)}, "required": ["\u202e"]}),
    schema({"oneOf": [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(200)]}),
    schema({"type": 7, "properties": [], "required": "a"}),
    schema({"$id": "file:///etc/passwd", "$ref": "file:///etc/passwd"}),
    GrammarSpec.choice(["a" * i for i in range(1, 351)]),
]


@pytest.mark.parametrize("spec", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_grammar_is_refused_or_walked_within_its_limits(spec):
    begin = time.process_time()
    try:
        matcher = COMPILER.compile(spec)
        for _ in range(20):
            matcher.accept(random.Random(0).choice([token for token in allowed(matcher) if token != EOS] or [EOS]))
    except BadRequest:
        pass

    assert time.process_time() - begin < 10  # not a speed: without limits some of these take minutes


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: schema(nested("items", 101)), "50 levels"),
        (lambda: schema({"patternProperties": {f"^a{{{i}}}b": {} for i in range(200)}}), "32"),
        (lambda: schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), "least common multiple"),
        (lambda: schema({"type": "number", "multipleOf": 0.099991}), "least common multiple"),
    ],
)
def test_a_schema_that_would_compile_for_seconds_is_refused_before(make: Callable[[], object], part: str) -> None:
    with pytest.raises(BadRequest, match=part):
        make()


def test_a_thousand_choices_are_followed_to_their_end() -> None:
    choices = [f"choice {i} of many" for i in range(1000)]
    matcher, text = COMPILER.compile(GrammarSpec.choice(choices)), b""
    while (tokens := allowed(matcher)) != [EOS]:
        matcher.accept(tokens[-1])
        text += TEXT.token_bytes(tokens[-1])

    assert text.decode() in choices
