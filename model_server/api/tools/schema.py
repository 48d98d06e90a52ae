"""The fields of a request that offer tools, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOOLS = 128
"""Tools of one request. OpenAI allows as many."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Function(_Strict):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=64, description="letters, digits, underscores and dashes")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema of an object")
    strict: bool | None = None


class Tool(_Strict):
    """A tool; only functions are known."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """Which function."""

    name: str


class NamedTool(_Strict):
    """The one tool that the answer must call."""

    type: Literal["function"]
    function: FunctionName


CHOICE_RULE = '"none", "auto", "required" or {"type": "function", "function": {"name": "..."}}'


class ToolFields(BaseModel):
    """The fields of a body with messages that concern tools."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = []
    tool_choice: Annotated[Literal["none", "auto", "required"] | NamedTool | None, Field(title=CHOICE_RULE)] = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] = True
