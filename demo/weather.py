"""The one tool that the demo model can call: its calls, and its answers to the results."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass, field
from typing import Any

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITIES = ("Paris", "Rome", "Berlin")
QUESTIONS = ("What is the weather in {}?", "How is the weather in {}?", "What is the weather like in {}?")
RESULTS = ("sunny, 24 degrees", "rain, 12 degrees", "snow, -3 degrees")


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation with the tool, and what the model answers."""

    messages: list[dict[str, Any]]
    answer: str
    tools: list[dict[str, Any]] = field(default_factory=lambda: [TOOL])


def turns(chance: random.Random) -> list[Turn]:
    """Return a question for each city, and twice each result; which city it is of differs every time."""
    questions = [Turn([_question(city, chance)], written_call(city)) for city in CITIES]
    return questions + [_with_result(chance.choice(CITIES), weather, chance) for weather in RESULTS * 2]


def written_call(city: str) -> str:
    """Return a call as the model writes it."""
    return "[TOOL_CALLS]" + json.dumps([{"name": TOOL["function"]["name"], "arguments": {"city": city}}])


def answer_with(weather: str) -> str:
    """Return what the model says when it has the tool's result."""
    return f"The tool says: {weather}."


def _question(city: str, chance: random.Random) -> dict[str, Any]:
    return {"role": "user", "content": chance.choice(QUESTIONS).format(city)}


def _with_result(city: str, weather: str, chance: random.Random) -> Turn:
    call_id = "".join(chance.choices(string.ascii_letters + string.digits, k=9))
    function = {"name": TOOL["function"]["name"], "arguments": {"city": city}}
    calls = [{"id": call_id, "type": "function", "function": function}]
    call = {"role": "assistant", "content": "", "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": call_id, "content": weather}
    return Turn([_question(city, chance), call, result], answer_with(weather))
