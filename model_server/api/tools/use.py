"""Applies a request's tools to its prompt, its grammar and its detokenizer.

`tool_use` reads the fields; a `ToolUse` is what the parsers of both APIs need. Leaves out how calls are written in an
answer (`answers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_server.api.prompts import ServedModel
from model_server.api.tools.messages import NAME, NAME_RULE, NOT_SUPPORTED
from model_server.api.tools.schema import Function, NamedTool, ToolFields
from model_server.errors import BadRequest
from model_server.request import Detokenizer, TokenMatcher
from model_server.text.grammar import GrammarKind, GrammarSpec
from model_server.text.tool_calls import ToolCallDetokenizer
from model_server.text.tool_grammar import NO_ARGUMENTS, ToolSignature, tool_call_grammar


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request."""

    definitions: tuple[dict[str, Any], ...]
    """The tools for the prompt, in the form of the chat template."""
    callable: tuple[ToolSignature, ...]
    """Those that the answer may call; none of them with the choice "none"."""
    required: bool
    """The answer must be a call."""
    parallel: bool
    """The answer may have several calls."""
    tool_calls_id: int
    """The token that begins the calls."""

    def matcher(self, model: ServedModel, answer: GrammarSpec | None = None) -> TokenMatcher | None:
        """Return a matcher that restricts one answer to its tools, or to the grammar of an answer without a call.

        Raises:
            BadRequest: a schema is wrong or too large, or the grammar does not work with tools.
        """
        if not self.callable:
            return model.matcher(answer)
        if answer is not None and answer.kind is not GrammarKind.JSON_SCHEMA:
            raise BadRequest(f"{answer.field} does not work with tools; a JSON schema does.", field=answer.field)
        instead = None if self.required else answer
        wakes = not self.required and instead is None
        grammar = tool_call_grammar(
            self.callable,
            parallel=self.parallel,
            tool_calls_id=None if wakes else self.tool_calls_id,
            answer=instead,
        )
        try:
            return model.matcher(grammar, wake_token_id=self.tool_calls_id if wakes else None)
        except BadRequest:
            for tool in self.callable:  # its error names the place in the schema
                model.matcher(tool.arguments_grammar)
            model.matcher(answer)
            raise

    def detokenizer(self, model: ServedModel, stop: tuple[str, ...]) -> Detokenizer:
        """Return a detokenizer of one answer, for `ToolCallParser`."""
        text = model.text.stream(stop)
        return ToolCallDetokenizer(text, model.text.stream(), self.tool_calls_id) if self.callable else text

    def generate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `generate`; with the choice "none" the answer cannot begin a call."""
        if self.callable:
            return dict(arguments)
        return {**arguments, "suppress_tokens": [*arguments.get("suppress_tokens", ()), self.tool_calls_id]}


def tool_use(fields: ToolFields, model: ServedModel, where: str = "") -> ToolUse | None:
    """Return how a request uses tools, or None if it offers none.

    Args:
        where: put before the fields' names in sentences, as in `instances[2].`.

    Raises:
        BadRequest: the sentence names the field.
    """
    tools, choice = fields.tools, fields.tool_choice
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise BadRequest(f"{where}tool_choice needs tools.", field=f"{where}tool_choice")
    if model.text.tool_calls_id is None:
        raise BadRequest(f"{where}tools: {NOT_SUPPORTED}.", field=f"{where}tools")
    signatures: dict[str, ToolSignature] = {}
    for i, tool in enumerate(tools):
        here = f"{where}tools[{i}].function"
        signature = _signature(tool.function, here)
        if signatures.setdefault(signature.name, signature) is not signature:
            raise BadRequest(f"{here}.name must differ from the other tools' names.", field=f"{where}tools")
    may_call = tuple(signatures.values())
    if isinstance(choice, NamedTool):
        if choice.function.name not in signatures:
            raise BadRequest(
                f"{where}tool_choice.function.name must be the name of one of the tools.", field=f"{where}tool_choice"
            )
        may_call = (signatures[choice.function.name],)
    elif choice == "none":
        may_call = ()
    return ToolUse(
        definitions=tuple(_definition(tool.function) for tool in tools) if may_call else (),
        callable=may_call,
        required=choice not in (None, "auto", "none"),
        parallel=fields.parallel_tool_calls and not isinstance(choice, NamedTool),
        tool_calls_id=model.text.tool_calls_id,
    )


def _signature(function: Function, here: str) -> ToolSignature:
    if not NAME.fullmatch(function.name):
        raise BadRequest(f"{here}.name {NAME_RULE}.", field=here)
    place = f"{here}.parameters"
    parameters = function.parameters or NO_ARGUMENTS
    if parameters.get("type", "object") != "object":
        raise BadRequest(f'{place}.type must be "object".', field=place)
    signature = ToolSignature(function.name, parameters, bool(function.strict), place)
    _ = signature.arguments_grammar  # refuses a schema that is nested too deeply, before anything reads it
    return signature


def _definition(function: Function) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {},
        },
    }
