"""About 340 bodies that predict must refuse, each with a word that its error message must contain.

Bodies are bytes, as a client sends them, so that the tests of the parser and of the running server share one table.
They are invalid for any model with a vocabulary of fewer than ten million tokens and a window of 4,096 tokens.
"""

from __future__ import annotations

import json
from typing import NamedTuple


class Malformed(NamedTuple):
    name: str
    body: bytes
    word: str
    """The word that the error message must contain."""


NO_TOKEN = 10_000_000
HUGE = 10**30
NAN, INFINITY = float("nan"), float("inf")

_NOT_FLAGS = (1, 0, "true", "yes", [], {}, 1.5)
_NOT_INTEGERS = ("5", 1.5, True, [5], {"a": 5}, HUGE, -HUGE, NAN, INFINITY)
_NOT_NUMBERS = ("0.5", True, [0.5], {}, HUGE, -1e300, NAN, -INFINITY)

_WRONG: dict[str, tuple[object, ...]] = {
    "stream": _NOT_FLAGS,
    "do_sample": _NOT_FLAGS,
    "return_full_text": ("no", 1),
    "use_cache": ("false", 0),
    "token_healing": ("", 2),
    "remove_invalid_values": ("x",),
    "json_schema": ("{}", 5, [], {"not": {}}, {"type": "strin"}, {"$ref": "#"}, {"$ref": "http://a/b"}),
    "regex": (5, "", "(", "(?=a)b", "a" * 70_000),
    "choice": ("a", [], [""], [1], ["a"] * 1001),
    "grammar": (5, "", "start: foo", "start: start"),
    "renormalize_logits": (1,),
    "max_new_tokens": (*_NOT_INTEGERS, 0, -1, 4097),
    "max_tokens": (0, "many"),
    "max_length": (0, -5, "x", 2**40),
    "min_new_tokens": (-1, "2", 4097),
    "min_length": (-1, 0.5),
    "seed": (*_NOT_INTEGERS, -1, 2**63),
    "temperature": (*_NOT_NUMBERS, -0.1, 101),
    "top_p": (*_NOT_NUMBERS, 0, 1.01, -1),
    "top_k": (*_NOT_INTEGERS, -1),
    "min_p": (-0.1, 1.1, "x"),
    "top_h": (0, 1.1, "half"),
    "typical_p": (0, 2, []),
    "epsilon_cutoff": (1, -0.1),
    "eta_cutoff": (1, -0.1, "a"),
    "repetition_penalty": (0, -1, "x", 1e9),
    "encoder_repetition_penalty": (0, -1, 1e9),
    "no_repeat_ngram_size": (-1, 2.5, "2", 10**6),
    "encoder_no_repeat_ngram_size": (-1, 10**9),
    "max_time": (0, -1, "x", 1e9),
    "stop": ("", [""], [1], {}, 5, ["a"] * 17, ["a" * 1000], [["a"]]),
    "stop_strings": (5, [None]),
    "bad_words_ids": ([], [[]], [5], "x", [[-1]], [[NO_TOKEN]], [["a"]], [[1.5]], [[1]] * 2000, [[1] * 500]),
    "sequence_bias": (
        [],
        {},
        {"[5]": 1.0},
        [[5, 1.0]],
        [[[5], "x"]],
        [[[5]]],
        [[[], 1.0]],
        [[[NO_TOKEN], 1.0]],
    ),
    "suppress_tokens": ([], [-1], [NO_TOKEN], 5, ["a"], [True], [5] * 5000),
    "begin_suppress_tokens": ([], [-1], [NO_TOKEN], "x"),
    "forced_bos_token_id": (-1, NO_TOKEN, [5], "x"),
    "forced_eos_token_id": ([], -1, NO_TOKEN, [NO_TOKEN], "x"),
    "eos_token_id": ([], -1, NO_TOKEN, [-1], "</s>"),
    "pad_token_id": (-1, NO_TOKEN, "x"),
    "bos_token_id": (-1, NO_TOKEN),
    "exponential_decay_length_penalty": ([], [1], [1, 2, 3], [-1, 1.1], [1, 0], [1, 100], [1.5, 1.1], 5, "x"),
    "num_beams": (0, -1, 17, 10**9, "4"),
    "num_return_sequences": (0, 17, "2"),
    "length_penalty": (100, "x"),
    "early_stopping": ("always", 1, []),
    "guidance_scale": (-1, "x", 1e6),
    "negative_prompt_ids": ([], [-1], [NO_TOKEN], "text"),
    "prompt_lookup_num_tokens": (0, -1, 1000, "x"),
    "max_matching_ngram_size": (0, 1000),
    "watermarking_config": (
        [],
        "x",
        {"greenlist_ratio": 0},
        {"greenlist_ratio": 1},
        {"seeding_scheme": "none"},
        {"context_width": 0},
        {"hashing_key": -1},
        {"bias": "x"},
        {"ngram_len": 5},
    ),
}

_WRONG_TOGETHER: tuple[tuple[str, dict[str, object]], ...] = (
    ("json_schema and regex", {"json_schema": {"type": "object"}, "regex": "a"}),
    ("eos_token_id", {"regex": "a", "eos_token_id": 5}),
    ("max_tokens", {"max_tokens": 5, "max_new_tokens": 5}),
    ("stop", {"stop": "a", "stop_strings": "b"}),
    ("do_sample", {"do_sample": True, "temperature": 0}),
    ("num_return_sequences", {"num_return_sequences": 2, "do_sample": False}),
    ("num_return_sequences", {"num_return_sequences": 2, "temperature": 0}),
    ("num_return_sequences", {"num_return_sequences": 4, "num_beams": 2}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3, "num_beams": 2}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3, "use_cache": False}),
    ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3, "guidance_scale": 2}),
    ("negative_prompt_ids", {"negative_prompt_ids": [5]}),
    ("negative_prompt_ids", {"negative_prompt_ids": [5], "guidance_scale": 2, "num_beams": 2}),
    ("forced_eos_token_id", {"forced_eos_token_id": 5, "suppress_tokens": [5]}),
    ("forced_eos_token_id", {"forced_eos_token_id": [5], "begin_suppress_tokens": [5], "max_new_tokens": 1}),
    ("bad_words_ids", {"bad_words_ids": [[5]], "eos_token_id": 5}),
    ("sequence_bias", {"sequence_bias": [[[5], 1.0], [[5], -1.0]]}),
    ("min_new_tokens", {"min_new_tokens": 10, "max_new_tokens": 5}),
    ("min_length", {"min_length": 4000, "max_new_tokens": 5}),
    ("max_length", {"max_length": 1}),
    (
        "exponential_decay_length_penalty",
        {"exponential_decay_length_penalty": [1, 10], "max_new_tokens": 1000},
    ),
    (
        "exponential_decay_length_penalty",
        {"exponential_decay_length_penalty": [1, 1.5], "remove_invalid_values": True},
    ),
    ("watermarking_config", {"watermarking_config": {"seeding_scheme": "selfhash", "greenlist_ratio": 0.01}}),
    ("stream", {"stream": True, "num_beams": 2}),
    ("stream", {"stream": True, "num_return_sequences": 2}),
    ("temprature", {"temprature": 0.5}),
    ("maxTokens", {"maxTokens": 5}),
    ("parameters", {"parameters": {"top_k": 5}}),
    ("inputs", {"inputs": "Hello"}),
    ("custom_generate", {"custom_generate": "org/repo"}),
    ("trust_remote_code", {"trust_remote_code": True}),
    ("assistant_model", {"assistant_model": "org/repo"}),
    ("cache_implementation", {"cache_implementation": "static"}),
    ("compile_config", {"compile_config": {}}),
    ("output_attentions", {"output_attentions": True}),
    ("penalty_alpha", {"penalty_alpha": 0.6}),
    ("dola_layers", {"dola_layers": "high"}),
    ("constraints", {"constraints": []}),
    ("force_words_ids", {"force_words_ids": [[5]]}),
    ("num_beam_groups", {"num_beam_groups": 2}),
    ("use_mtp", {"use_mtp": True}),
    ("generation_config", {"generation_config": {"top_k": 5}}),
    ("__class__", {"__class__": {}}),
)

_USER = {"role": "user", "content": "Hello"}
_WRONG_BODIES: tuple[tuple[str, object], ...] = (
    ("body", None),
    ("body", []),
    ("body", "Hello"),
    ("body", 5),
    ("body", True),
    ("prompt", {}),
    ("prompt", {"max_new_tokens": 5}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": ["Hello"]}),
    ("prompt", {"prompt": {"text": "Hello"}}),
    ("messages", {"prompt": "Hello", "messages": [_USER]}),
    ("instances", {"prompt": "Hello", "instances": ["Hello"]}),
    ("prompt", {"prompt": "word " * 10_000}),
    ("prompt", {"prompt": "a" * 1_000_000}),
    ("prompt", {"prompt": "\U0001f600" * 10_000}),
    ("messages", {"messages": []}),
    ("messages", {"messages": None}),
    ("messages", {"messages": "Hello"}),
    ("messages", {"messages": _USER}),
    ("messages[0]", {"messages": ["Hello"]}),
    ("messages[0]", {"messages": [{}]}),
    ("messages[0]", {"messages": [{"role": "user"}]}),
    ("messages[0]", {"messages": [{"content": "Hello"}]}),
    ("messages[0]", {"messages": [{**_USER, "name": "Ann"}]}),
    ("messages[0].role", {"messages": [{"role": 5, "content": "Hello"}]}),
    ("messages[0].role", {"messages": [{"role": "", "content": "Hello"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": ["Hello"]}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[1]", {"messages": [_USER, None]}),
    ("messages", {"messages": [{"role": "wizard", "content": "Hello"}]}),
    ("messages", {"messages": [{"role": "user", "content": "word " * 10_000}]}),
    ("messages", {"messages": [_USER] * 20_000}),
    ("instances", {"instances": []}),
    ("instances", {"instances": "Hello"}),
    ("instances", {"instances": None}),
    ("instances", {"instances": {"prompt": "Hello"}}),
    ("instances", {"instances": ["Hello"] * 33}),
    ("instances[1]", {"instances": ["Hello", 5]}),
    ("instances[0]", {"instances": [None]}),
    ("instances[0]", {"instances": [["Hello"]]}),
    ("instances[0]", {"instances": [{}]}),
    ("instances[0]", {"instances": [{"prompt": "Hello", "messages": [_USER]}]}),
    ("instances[0].prompt", {"instances": [""]}),
    ("instances[1].prompt", {"instances": ["Hello", {"prompt": "word " * 10_000}]}),
    ("instances[0].top_k", {"instances": [{"prompt": "Hello", "top_k": -1}]}),
    ("instances[0].topk", {"instances": [{"prompt": "Hello", "topk": 5}]}),
    ("instances[0].messages", {"instances": [{"messages": []}]}),
    ("instances[0].messages", {"instances": [{"messages": [{"role": "wizard", "content": "Hello"}]}]}),
    ("parameters.top_k", {"instances": ["Hello"], "parameters": {"top_k": -1}}),
    ("parameters.top_q", {"instances": ["Hello"], "parameters": {"top_q": 1}}),
    ("parameters", {"instances": ["Hello"], "parameters": [1]}),
    ("parameters", {"instances": ["Hello"], "parameters": "top_k=5"}),
    ("top_k", {"instances": ["Hello"], "top_k": 5}),
    ("stream", {"instances": ["Hello"], "stream": True}),
    ("stream", {"instances": ["Hello", "Hello"], "parameters": {"stream": True}}),
    ("num_return_sequences", {"instances": ["Hello"] * 3, "parameters": {"num_return_sequences": 16}}),
)

_WRONG_BYTES: tuple[tuple[str, str, bytes], ...] = (
    ("empty", "body", b""),
    ("blank", "body", b"  \n"),
    ("not JSON", "body", b"prompt=Hello"),
    ("cut short", "body", b'{"prompt": "Hel'),
    ("trailing comma", "body", b'{"prompt": "Hello",}'),
    ("two values", "body", b'{"prompt": "Hello"} {}'),
    ("invalid UTF-8", "body", b'{"prompt": "\xff\xfe"}'),
    ("half a character", "body", b'{"prompt": "\xf0\x9f\x98"}'),
    ("Latin-1", "body", '{"prompt": "café"}'.encode("latin-1")),
    ("UTF-16", "body", '{"prompt": "Hello"}'.encode("utf-16")),
    ("lone surrogate", "body", b'{"prompt": "\\ud800"}'),
    ("raw control character", "body", b'{"prompt": "a\x00b"}'),
    ("bad escape", "body", b'{"prompt": "\\x41"}'),
    ("single quotes", "body", b"{'prompt': 'Hello'}"),
    ("infinite exponent", "body", b'{"prompt": "Hello", "temperature": 1e999}'),
    ("endless digits", "body", b'{"prompt": "Hello", "seed": ' + b"9" * 5000 + b"}"),
    ("deep lists", "body", b"[" * 100_000),
    ("deep objects", "body", b'{"prompt": ' * 50_000),
    ("deep closed lists", "stop", b'{"prompt": "a", "stop": ' + b"[" * 900 + b"]" * 900 + b"}"),
    ("binary", "body", bytes(range(256))),
)


def _table() -> list[Malformed]:
    rows = []
    for name, values in _WRONG.items():
        for value in values:
            body = json.dumps({"prompt": "Hello", name: value}).encode()
            # JSON has no NaN or Infinity: the whole body is invalid, so the error cannot name a field.
            word = "body" if value in (INFINITY, -INFINITY) or value != value else name
            rows.append(Malformed(f"{name}={ascii(value)[:40]}", body, word))
    for word, fields in _WRONG_TOGETHER:
        rows.append(Malformed(ascii(fields)[:60], json.dumps({"prompt": "Hello"} | fields).encode(), word))
    for word, wrong in _WRONG_BODIES:
        rows.append(Malformed(ascii(wrong)[:60], json.dumps(wrong).encode(), word))
    rows += [Malformed(name, content, word) for name, word, content in _WRONG_BYTES]
    return rows


MALFORMED = _table()
