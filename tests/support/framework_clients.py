"""Runs unmodified LangChain, instructor and litellm against a running server, in a separate environment.

    python tests/support/framework_clients.py http://localhost:8080

Needs `pip install langchain langchain-openai instructor litellm`. Prints a line for each client that fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import instructor
import litellm
import openai
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

MODEL = "mistral-7b"
QUESTION = "What colour is a ripe tomato, and how many are there? Answer in JSON."
MESSAGES = [{"role": "user", "content": QUESTION}]


class Answer(BaseModel):
    colour: Literal["red", "green"]
    count: int = Field(ge=0, le=9)


@tool
def get_weather(city: Literal["Paris", "Rome"]) -> str:
    """Return the weather of a city."""
    return f"20 degrees in {city}"


def calls(base_url: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    model = ChatOpenAI(base_url=base_url, api_key="none", model=MODEL, max_tokens=300, max_retries=0)
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    lite = {"model": f"openai/{MODEL}", "api_base": base_url, "api_key": "none", "max_tokens": 300}

    def call_a_tool() -> object:
        asked = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False).invoke(
            "What is the weather in Paris?"
        )
        results = [get_weather.invoke(call) for call in asked.tool_calls]
        assert results
        return model.bind_tools([get_weather]).invoke([HumanMessage("And?"), asked, *results])

    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Answer, method=method)
        yield f"LangChain {method}", lambda structured=structured: Answer.model_validate(structured.invoke(QUESTION))
    yield "LangChain bind_tools", call_a_tool
    # Not instructor.Mode.JSON: it sends the schema only in the prompt, which only a trained model follows.
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        patched = instructor.from_openai(client, mode=mode).chat.completions
        yield (
            f"instructor {mode.value}",
            lambda patched=patched: patched.create(
                model=MODEL, response_model=Answer, messages=MESSAGES, max_tokens=300, max_retries=0
            ),
        )
    yield (
        "litellm response_format",
        lambda: Answer.model_validate_json(
            litellm.completion(messages=MESSAGES, response_format=Answer, **lite).choices[0].message.content
        ),
    )


def main(url: str) -> int:
    failed = 0
    for name, call in calls(f"{url}/openai/v1"):
        try:
            call()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
