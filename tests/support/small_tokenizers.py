"""Tiny tokenizers of two real kinds: with byte fallback, as Mistral 7B's, and byte-level, as GPT-2's."""

from __future__ import annotations

import functools
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from demo.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS
from model_server.request import Detokenizer
from model_server.text.tokenizer import Text

SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "The meaning of life is to be kind, to learn, and to leave things better than you found them.",
    "  two spaces, a tab\t and a new line\n then the theme of them all: hello hello, world world!",
    "日本語の日本語、中文中文 naïve café Ünïcödé e\u0301e\u0301 👩‍👩‍👧‍👦👍🏽👍🏽 🎉🎉",
]
MISTRAL_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- elif message['role'] == 'user' -%}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}
{%- else -%}{{ raise_exception('Only user and assistant roles are supported!') }}{%- endif -%}{% endfor %}"""


def trained(pre_tokenizer, alphabet, vocab_size, first_tokens) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁") if pre_tokenizer is None else None
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*first_tokens, *(token for token in model["vocab"] if token not in first_tokens)]
    return {token: i for i, token in enumerate(tokens)}, [tuple(merge) for merge in model["merges"]]


def wrapped(backend: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.post_processor = TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs
    )


@functools.cache
def byte_fallback() -> Text:
    """A tiny tokenizer in the form of Mistral 7B's tokenizer.json."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab, merges = trained(None, [], 200, SPECIAL + bytes_)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Text(wrapped(backend, chat_template=MISTRAL_TEMPLATE))


@functools.cache
def with_tools() -> Text:
    """`byte_fallback` with the demo model's control tokens and chat template, which call tools in v0.3's format."""
    text = byte_fallback()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text.tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS]
    )
    return Text(tokenizer)


@functools.cache
def byte_level() -> Text:
    """A tiny tokenizer in the form of GPT-2's and Tekken's, with one added token of plain text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab, merges = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), alphabet, 340, SPECIAL)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("two words: 日本", normalized=False)])
    return Text(wrapped(backend))


def streamed(text: Text, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Return the pieces of a stream: one for each token, and one that the end releases."""
    stream: Detokenizer = text.stream(stop)
    return [*map(stream.push, ids), stream.flush()]
