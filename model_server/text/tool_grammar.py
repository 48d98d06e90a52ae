"""The grammar of tool calls: a call of one of the tools, with arguments that fit the tool's JSON schema.

In Mistral's v3 format, and with white space only where the prompt has it, so that a call reads the same when it is
sent back. Leaves out how the calls are read (`tool_calls.py`) and how a grammar is compiled (`grammar.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model_server.text.grammar import WHITESPACE, GrammarKind, GrammarSpec

Schema = Mapping[str, Any]

_PLAIN = frozenset({"type", "title", "description", "properties", "required", "$defs", "definitions"})
"""Keywords of a schema that allows other properties only because it does not say otherwise."""

NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolSignature:
    """What the grammar needs to know of a tool."""

    name: str
    parameters: Schema
    """A JSON schema of an object."""
    strict: bool = False
    """Refuse a keyword of JSON schema that the grammar cannot enforce; otherwise it is left out."""
    field: str = "tools"
    """The request field of the schema, for errors."""

    @property
    def arguments(self) -> Schema:
        """The schema of the arguments, with the form in which they are written.

        Where it names properties and nothing else, there are no others: a function has no use for an unknown argument.
        """
        form = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": not self.strict}
        closed = {"additionalProperties": False} if self.parameters.keys() <= _PLAIN and self.properties else {}
        return {"type": "object", **closed, **self.parameters, "x-guidance": form}

    @property
    def properties(self) -> object:
        return self.parameters.get("properties")

    @property
    def arguments_grammar(self) -> GrammarSpec:
        """The grammar of the arguments alone. Its errors name the schema's place."""
        return GrammarSpec.json_schema(dict(self.arguments), self.field)


def tool_call_grammar(
    tools: Sequence[ToolSignature],
    *,
    parallel: bool,
    tool_calls_id: int | None = None,
    answer: GrammarSpec | None = None,
) -> GrammarSpec:
    """Return the grammar of one or more calls of these tools.

    Args:
        parallel: several calls are allowed.
        tool_calls_id: the token that the grammar begins with; without it, the grammar is what follows that token.
        answer: the JSON schema of an answer that may stand in place of the calls.
    """
    begin = "" if tool_calls_id is None else f"<[{tool_calls_id}]> "
    more = ' (", " call)*' if parallel else ""
    rules = [f'calls: {begin}" "? "[" call{more} "]"', "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        opening = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        rules.append(f'call_{i}: {opening} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {json.dumps(tool.arguments, ensure_ascii=False)}")
    if answer is not None:
        schema = json.loads(answer.source) | {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        rules.append(f"answer: %json {json.dumps(schema, ensure_ascii=False)}")
    start = "start: calls" if answer is None else "start: calls | answer"
    return GrammarSpec(GrammarKind.LARK, "\n".join([start, *rules]), "tools")
