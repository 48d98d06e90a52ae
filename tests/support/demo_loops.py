"""Runs tool loops and structured output against the demo model, in a separate environment.

    python tests/support/demo_loops.py http://localhost:8080

Needs `pip install langchain langchain-openai instructor litellm openai`. The demo model knows one tool: it calls the
weather tool and repeats the result. Prints a line for each client that fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import instructor
import litellm
import openai
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

MODEL = "mistral-7b"
QUESTION = "What is the weather in Paris?"
RESULT = "sunny, 24 degrees"
ANSWER = "The tool says: sunny, 24 degrees."
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Get the weather in a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
COLOUR = "Which colour has a ripe tomato? Answer in JSON."


class Answer(BaseModel):
    colour: Literal["red", "green"]
    reason: str


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return RESULT if city == "Paris" else "unknown"


def same(found: object, expected: object) -> None:
    if isinstance(found, str):
        found = found.strip()
    if found != expected:
        raise AssertionError(f"{found!r} is not {expected!r}")


def run(name: str, arguments: str) -> str:
    same(name, "get_weather")
    return str(get_weather.invoke(json.loads(arguments)))


def langchain_agent(url: str) -> None:
    model = ChatOpenAI(base_url=url, api_key="none", model=MODEL, temperature=0, max_retries=0)
    state = create_agent(model, [get_weather]).invoke({"messages": [{"role": "user", "content": QUESTION}]})
    same([type(m).__name__ for m in state["messages"]], ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"])
    same(state["messages"][-1].content, ANSWER)


def langchain_streamed_agent(url: str) -> None:
    model = ChatOpenAI(base_url=url, api_key="none", model=MODEL, temperature=0, max_retries=0)
    agent = create_agent(model, [get_weather])
    question = {"messages": [{"role": "user", "content": QUESTION}]}
    parts = [part for part, _ in agent.stream(question, stream_mode="messages")]
    same("".join(part.content for part in parts if type(part).__name__ == "AIMessageChunk"), ANSWER)


def chat_loop(create: Callable[..., Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(3):
        message = create(messages=messages, tools=TOOLS, temperature=0).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            content = run(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    same(messages[-1].content, ANSWER)


def openai_chat(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    chat_loop(lambda **fields: client.chat.completions.create(model=MODEL, **fields))


def openai_streamed_chat(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)

    def create(**fields: Any) -> Any:
        with client.chat.completions.stream(model=MODEL, **fields) as stream:
            return stream.get_final_completion()

    chat_loop(create)


def litellm_chat(url: str) -> None:
    chat_loop(lambda **f: litellm.completion(model=f"openai/{MODEL}", api_base=url, api_key="none", **f))


def openai_responses(url: str, *, streamed: bool = False) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    tools = [{"type": "function", "strict": False, **FUNCTION}]
    for _ in range(3):
        fields = {"model": MODEL, "input": items, "tools": tools, "temperature": 0, "store": False}
        if streamed:
            with client.responses.stream(**fields) as stream:
                response = stream.get_final_response()
        else:
            response = client.responses.create(**fields)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        items += response.output
        items += [
            {"type": "function_call_output", "call_id": call.call_id, "output": run(call.name, call.arguments)}
            for call in calls
        ]
    same(response.output_text, ANSWER)


def instructor_answer(url: str) -> None:
    """Use `Mode.JSON_SCHEMA`, because this model knows only its own tool and ignores a schema in the prompt."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    patched = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA).chat.completions
    question = [{"role": "user", "content": COLOUR}]
    answer = patched.create(model=MODEL, response_model=Answer, messages=question, temperature=0, max_retries=0)
    same(answer.colour, "red")


def openai_parse(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    completion = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": COLOUR}], response_format=Answer, temperature=0
    )
    same(completion.choices[0].message.parsed.colour, "red")


def main(url: str) -> int:
    clients: dict[str, Callable[[str], None]] = {
        "LangChain agent": langchain_agent,
        "LangChain agent, streamed": langchain_streamed_agent,
        "openai chat": openai_chat,
        "openai chat, streamed": openai_streamed_chat,
        "openai responses": openai_responses,
        "openai responses, streamed": lambda url: openai_responses(url, streamed=True),
        "openai parse": openai_parse,
        "litellm chat": litellm_chat,
        "instructor": instructor_answer,
    }
    failed = 0
    for name, client in clients.items():
        try:
            client(f"{url}/openai/v1")
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
