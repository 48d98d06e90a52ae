"""Text to tokens and back: the tokenizer, its chat template, and the text of each token.

Byte-level tokenizers (GPT-2, Tekken) and byte-fallback ones (Mistral 7B, Llama 2) are reproduced exactly; other
decoders as far as they decode a token independently of its position. Streams and stop strings are in `detokenizer`.
Knows nothing of HTTP or torch, nor which token ends an answer.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model_server.errors import BadRequest, StartupError
from model_server.text.chat import ChatPrompts
from model_server.text.detokenizer import IncrementalDetokenizer
from model_server.text.full_text import FullTextDetokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNBOUNDED = sys.maxsize


class Text:
    """A model's tokenizer and chat template. Shared by all requests; safe to use from several threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, fix_chat_template: bool = True) -> None:
        self.tokenizer = tokenizer
        self._chat = ChatPrompts(tokenizer, self._encode_rendered, fix_template=fix_chat_template)
        self._backend = tokenizer.backend_tokenizer
        self._special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        decoder = _steps(self._backend.decoder)
        decoder_types = {step["type"] for step in decoder}
        self._strip_start = sum(step["start"] for step in decoder if step["type"] == "Strip" and step["content"] == " ")
        self._byte_level = "ByteLevel" in decoder_types
        self._byte_fallback = "ByteFallback" in decoder_types
        self._pieces: dict[int, str | bytes | None] = {}
        # The first call removes the truncation and padding that a tokenizer was saved with. Later calls only read, so
        # that threads can make them at the same time.
        self.encode("")

    @classmethod
    def load(cls, model_dir: str | Path, *, fix_chat_template: bool = True) -> Text:
        """Read the tokenizer of a local model directory; never runs code from it.

        Raises:
            StartupError: there is none, or it is not a fast one.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a broken file makes the library raise anything
            reason = " ".join(str(error).split())[:300]
            raise StartupError(
                f"The tokenizer in {model_dir} cannot be read: {reason or type(error).__name__}"
            ) from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise StartupError(
                f"The tokenizer in {model_dir} is a {type(tokenizer).__name__}, not a fast one: add its tokenizer.json."
            )
        return cls(tokenizer, fix_chat_template=fix_chat_template)

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the prompt's tokens, by default with the special ones that the tokenizer adds.

        Raises:
            BadRequest: the prompt holds half of a surrogate pair, which JSON's escapes allow.
        """
        return self._encode(prompt, field="prompt", add_special_tokens=add_special_tokens)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt of a conversation up to the answer, with the tools that the answer may call.

        Raises:
            BadRequest: there is no chat template, or it refuses the messages.
        """
        return self._chat.render(messages, tools)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[str, list[int]]:
        """Return the rendered prompt and its tokens; the template writes the special tokens itself.

        Raises:
            BadRequest: as `render_chat` and `encode`.
        """
        return self._chat.encode(messages, tools)

    @property
    def tool_calls_id(self) -> int | None:
        """The token that begins tool calls; None if this model cannot call tools."""
        return self._chat.tool_calls_id

    @property
    def fixes_chat_template(self) -> bool:
        """Whether prompts are in the model's own format, because its chat template is known to differ from it."""
        return self._chat.fixes_template

    def tokenizer_json(self) -> str:
        """Return the tokenizer as the text of a tokenizer.json."""
        written: str = self._backend.to_str()
        return written

    def stream(self, stop: tuple[str, ...] = ()) -> IncrementalDetokenizer:
        """Return a detokenizer for one answer, which ends before the first of the stop strings."""
        return IncrementalDetokenizer(self.piece, stop, byte_runs=self._byte_fallback)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a whole answer: the joined pieces of a stream without stop strings."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def full_text_stream(
        self,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        *,
        with_prompt: bool = True,
        skip_special_tokens: bool = False,
    ) -> FullTextDetokenizer:
        """Return a fresh stream for one sequence, as Transformers' `TextStreamer` would print it."""
        return FullTextDetokenizer(
            self.piece if skip_special_tokens else self._piece_or_special,
            prompt_ids,
            stop,
            byte_runs=self._byte_fallback,
            strip_start=self._strip_start,
            with_prompt=with_prompt,
        )

    def full_text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return what Transformers' `tokenizer.decode` gives."""
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def vocabulary_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens as the vocabulary writes them."""
        texts: list[str] = self.tokenizer.convert_ids_to_tokens(list(ids))
        return texts

    def token_text(self, token_id: int) -> str:
        """Return a token as readable text, special ones included; incomplete UTF-8 as `bytes:\\xf0\\x9f`."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token in the middle of a text; b'' if there is no such token."""
        piece = self._piece_or_special(token_id) or b""
        return piece.encode() if isinstance(piece, str) else piece

    def piece(self, token_id: int) -> str | bytes | None:
        """Return the text of a token: a string, bytes that may be part of a character, None if it is skipped."""
        try:
            return self._pieces[token_id]
        except KeyError:
            return self._pieces.setdefault(token_id, self._read_piece(token_id))

    def _piece_or_special(self, token_id: int) -> str | bytes | None:
        special = self._special.get(token_id)
        if special is None:
            return self.piece(token_id)
        return special.encode() if self._byte_level else special

    def max_prompt_chars(self, num_tokens: int) -> int:
        """Return an upper bound of the characters that a prompt of so many tokens can have.

        A longer prompt is refused before it is tokenized. A tokenizer that may drop or merge text of any length has no
        useful bound.
        """
        return num_tokens * self._longest_token if self._keeps_every_char else UNBOUNDED

    def _encode_rendered(self, prompt: str) -> list[int]:
        return self._encode(prompt, field="messages", add_special_tokens=False)

    def _encode(self, text: str, *, field: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"{field} must be valid Unicode, without half of a surrogate pair.", field=field
            ) from error
        return self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids

    def _read_piece(self, token_id: int) -> str | bytes | None:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._special:
            return None
        if self._byte_level:
            try:
                return bytes(BYTE_OF_CHAR[char] for char in token)
            except KeyError:  # an added token, written as plain text
                return token.encode()
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        # The difference of two copies and one: a decoder may strip a space from the first token of a text.
        once = self._backend.decode([token_id], skip_special_tokens=False)
        twice = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(once) :]

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    @cached_property
    def _keeps_every_char(self) -> bool:
        """Whether every character of a prompt is in the text of one of its tokens.

        Only for steps that are known to keep their input; others may shorten it.
        """
        backend, model = self._backend, self._backend.model
        steps = [*_steps(backend.normalizer), *_steps(backend.pre_tokenizer)]
        vocab = backend.get_vocab(with_added_tokens=False)
        if any(step["type"] == "ByteLevel" for step in steps):
            no_unknown = vocab.keys() >= BYTE_OF_CHAR.keys()
        else:
            no_unknown = bool(getattr(model, "byte_fallback", False)) and all(
                f"<0x{byte:02X}>" in vocab for byte in range(256)
            )
        return (
            type(model).__name__ == "BPE"
            and not (model.continuing_subword_prefix or model.end_of_word_suffix)
            and no_unknown
            and all(map(_keeps_length, steps))
            # Such tokens consume the white space beside them.
            and not any(token.lstrip or token.rstrip for token in self.tokenizer.added_tokens_decoder.values())
        )


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte behind each character of byte-level vocabularies.

    Printable Latin-1 characters are their own bytes; the other bytes, in order, are the characters from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return {chr(byte if byte in printable else next(spare)): byte for byte in range(256)}


BYTE_OF_CHAR = _byte_level_alphabet()


def _steps(component: Any) -> list[dict[str, Any]]:
    """Return the elements of a normalizer, pre-tokenizer or decoder, flat, as in tokenizer.json."""
    return [] if component is None else _flat(json.loads(component.__getstate__()))


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    parts = next(value for key, value in step.items() if key != "type")  # the key differs with the kind
    return [leaf for part in parts for leaf in _flat(part)]


def _keeps_length(step: dict[str, Any]) -> bool:
    """Whether a step of the tokenizer never shortens a text."""
    match step["type"]:
        case "ByteLevel" | "Metaspace" | "Prepend" | "Digits":
            return True
        case "Replace":
            pattern = step["pattern"].get("String")
            return bool(pattern) and len(step["content"]) >= len(pattern)
        case "Split" | "Punctuation":
            return step["behavior"] != "Removed"
        case _:
            return False
