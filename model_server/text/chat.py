"""From a conversation and its tools to a prompt: by the model's chat template, or in Mistral 7B v0.3's own format.

Leaves out which conversations are valid (`api/tools/messages.py`) and what the model answers (`tool_calls.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from model_server.errors import BadRequest
from model_server.text import mistral_v3
from model_server.text.mistral_v3 import Control, Part

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]


class ChatPrompts:
    """Writes the prompts of conversations. Shared by all requests; safe to use from several threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encode: Callable[[str], list[int]], *, fix_template: bool = True
    ) -> None:
        """Take the tokenizer and how a rendered prompt becomes tokens.

        With `fix_template`, a template that is known to differ from Mistral 7B v0.3's format is not used.
        """
        self._tokenizer = tokenizer
        self._encode_rendered = encode
        self.fixes_template = fix_template and mistral_v3.is_known_template(tokenizer.chat_template)

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """Return the prompt up to the answer, as text.

        Raises:
            BadRequest: there is no template, or it refuses the messages.
        """
        if not messages:
            raise BadRequest("messages must hold at least one message.", field="messages")
        if self.fixes_template:
            return mistral_v3.prompt_text(mistral_v3.prompt_parts(messages, tools))
        if not self._tokenizer.chat_template:
            raise BadRequest("messages: this model has no chat template; send prompt instead.", field="messages")
        try:
            prompt = self._tokenizer.apply_chat_template(
                [_for_template(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except jinja2.TemplateError as error:
            raise BadRequest(f"messages: the model's chat template refuses them: {error}", field="messages") from error
        except Exception as error:  # a template is a program and can fail in any way
            raise BadRequest(
                "messages: the model's chat template cannot render them; "
                "each needs a role that it knows and a string as content.",
                field="messages",
            ) from error
        assert isinstance(prompt, str)
        return prompt

    def encode(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[str, list[int]]:
        """Return the prompt as text, and its tokens.

        Raises:
            BadRequest: as `render`.
        """
        if messages and self.fixes_template:
            parts = mistral_v3.prompt_parts(messages, tools)
            return mistral_v3.prompt_text(parts), [token_id for part in parts for token_id in self._part_ids(part)]
        prompt = self.render(messages, tools)
        return prompt, self._encode_rendered(prompt)

    @cached_property
    def tool_calls_id(self) -> int | None:
        """The token that begins tool calls; None if the model has no tool tokens or its template ignores tools."""
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        if not special.issuperset(control.token for control in mistral_v3.TOOL_TOKENS):
            return None
        if not (self.fixes_template or mistral_v3.TOOL_CALLS.token in str(self._tokenizer.chat_template)):
            return None
        return self._control_id(mistral_v3.TOOL_CALLS)

    def _part_ids(self, part: Part) -> list[int]:
        if isinstance(part, Control):
            return [self._control_id(part)]
        plain, prefix = self._plain
        return plain.encode(prefix + part, add_special_tokens=False).ids

    def _control_id(self, control: Control) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(control.token)
        assert isinstance(token_id, int)
        return token_id

    @cached_property
    def _plain(self) -> tuple[Tokenizer, str]:
        """The tokenizer for a text behind a control token, in which no token is special, and what to put before it.

        SentencePiece puts a space before every text. A tokenizer.json does the same, or only if there is none yet.
        """
        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        without, with_space = (plain.encode(text, add_special_tokens=False).ids for text in ("a", " a"))
        return plain, " " if without == with_space else ""


def _for_template(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it: the arguments of a tool call as an object."""
    given = dict(message)
    if calls := given.pop("tool_calls", ()):
        given["tool_calls"] = [
            call | {"function": function | {"arguments": mistral_v3.parsed_json(function["arguments"])}}
            for call in calls
            for function in [call["function"]]
        ]
    return given
