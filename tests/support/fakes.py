"""Doubles for the edges of the server: a byte tokenizer, and an engine that plays a script.

They are small working objects, not mocks: the tokenizer decodes bytes as a real one decodes tokens, and events use the
real channel.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Collection, Sequence

from tokenizers import Tokenizer, decoders, models

from model_server.errors import BadRequest, GrammarTooComplex, ServeError
from model_server.request import Finished, FinishReason, Request, TextDelta

BOS = 1
FIRST_BYTE = 3
VOCAB_SIZE = FIRST_BYTE + 256


class ByteStream:
    """Decodes bytes as they arrive; returns only whole characters."""

    stopped = False

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id - FIRST_BYTE]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FullByteStream(ByteStream):
    """A `ByteStream` that decodes prompt and completion as one text."""

    def __init__(self, prompt: str) -> None:
        super().__init__()
        self.prompt = prompt
        self.ids: list[int] = []

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        return super().push(token_id)


class ByteText:
    """A tokenizer whose tokens are bytes, with a chat template that knows user and assistant."""

    def encode(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + [byte + FIRST_BYTE for byte in prompt.encode()]

    def vocabulary_texts(self, ids: Sequence[int]) -> list[str]:
        return [f"<0x{token_id - FIRST_BYTE:02X}>" if token_id >= FIRST_BYTE else "<s>" for token_id in ids]

    tool_calls_id = None

    def encode_chat(self, messages: list[dict[str, str]], tools: Sequence[object] = ()) -> tuple[str, list[int]]:
        for message in messages:
            if message["role"] not in ("user", "assistant"):
                raise BadRequest("messages must have the roles user and assistant.", field="messages")
        written = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return written, self.encode(written)

    def tokenizer_json(self) -> str:
        vocab = {"<unk>": 0, "<s>": BOS, "</s>": 2} | {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
        backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        return str(backend.to_str())

    def stream(self, stop: tuple[str, ...] = ()) -> ByteStream:
        return ByteStream()

    def full_text_stream(self, prompt_ids: list[int], stop: tuple[str, ...] = (), **options: bool) -> FullByteStream:
        return FullByteStream(self.full_text(prompt_ids))

    def full_text(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(id - FIRST_BYTE for id in ids if id >= FIRST_BYTE).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.full_text([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - FIRST_BYTE]) if token_id >= FIRST_BYTE else b""

    def max_prompt_chars(self, num_tokens: int) -> int:
        return 4 * num_tokens


def play(request: Request, *script: str | ServeError | FinishReason) -> None:
    """Play the engine for one answer: a string is a chunk, a finish reason ends it. Call it in the event loop."""
    for item in script:
        match item:
            case FinishReason():
                request.channel.send(Finished(item, request.num_prompt_tokens, completion_tokens=len(script) - 1))
            case str():
                request.channel.send(TextDelta(item))
            case error:
                request.channel.send(error)
    request.channel.wake()


class TokenIds:
    """A detokenizer whose text is the token ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.stopped = False

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class Stopping(TokenIds):
    """A detokenizer that finds a stop string after some tokens."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def push(self, token_id: int) -> str:
        text = super().push(token_id)
        self.stopped = len(self.ids) == self.after
        return text


class OnlyTokens:
    """A matcher that allows the same tokens at every step; it can fail as a real matcher does."""

    field = "grammar"

    def __init__(
        self,
        allowed: Collection[int],
        *,
        active: bool = True,
        fill_error: Exception | None = None,
        accept_error_after: int | None = None,
    ) -> None:
        self.allowed = allowed
        self.active = active
        self.accepted: list[int] = []
        self._fill_error = fill_error
        self._accept_error_after = accept_error_after

    @property
    def first_mask(self) -> bytes | None:
        return None

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)
        if len(self.accepted) == self._accept_error_after:
            raise GrammarTooComplex("grammar: the grammar became too complex.", field="grammar")

    @staticmethod
    def fill_all(matchers: Sequence[OnlyTokens], address: int, num_bytes: int) -> dict[int, ServeError]:
        ctypes.memset(address, 0, num_bytes)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        failures = {}
        for i, matcher in enumerate(matchers):
            if isinstance(matcher._fill_error, ServeError):
                failures[i] = matcher._fill_error
                continue  # the mask of a failed matcher is undefined; here, it allows no token
            if matcher._fill_error is not None:
                raise matcher._fill_error
            for token_id in matcher.allowed:
                memory[i * (num_bytes // len(matchers)) + token_id // 8] |= 1 << token_id % 8
        return failures
