"""What an answer must look like: `response_format`, `tools` and `tool_choice`, checked."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, Field, model_validator

from longscan.inference.tool_calls import Choice, Tool

__all__ = [
    "FORMATS",
    "MAX_TOOLS",
    "NamedTool",
    "ResponseFormat",
    "ToolBody",
    "UnsupportedError",
    "calling_messages",
    "choose",
]

FORMATS = ("text", "json_object", "json_schema", "regex")
MAX_TOOLS = 64

Name: TypeAlias = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Schema: TypeAlias = dict[str, Any]


class UnsupportedError(ValueError):
    """A field asks for what this server does not do.

    Attributes:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class JsonSchemaBody(BaseModel):
    """A JSON schema with a name. `strict` changes nothing: the schema always holds."""

    name: Name
    values: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What an answer must look like."""

    type: Annotated[str, Field(strict=True)]
    json_schema: JsonSchemaBody | None = None
    regex: Annotated[str, Field(strict=True, min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type not in FORMATS:
            raise UnsupportedError(
                "response_format",
                f"response_format.type: expected {', '.join(FORMATS)}, got {self.type[:40]!r}.",
            )
        for name in ("json_schema", "regex"):
            if self.type == name and getattr(self, name) is None:
                raise UnsupportedError("response_format", f"response_format.{name}: expected with this type.")
        return self


class FunctionBody(BaseModel):
    """A function that a model may call."""

    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ToolBody(BaseModel):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionBody

    def as_tool(self) -> Tool:
        """Return what its grammar is made of."""
        return Tool(self.function.name, self.function.parameters or {"additionalProperties": False})


class FunctionName(BaseModel):
    """The name of a function."""

    name: Name


class NamedTool(BaseModel):
    """The choice of one function."""

    type: Literal["function"] = "function"
    function: FunctionName


def choose(tools: Sequence[ToolBody], choice: str | NamedTool | None) -> tuple[Choice, list[Tool]]:
    """Return whether tools may be called, and which.

    Args:
        tools: of a request, at least one.
        choice: its `tool_choice`.

    Raises:
        UnsupportedError: two tools have one name, or the chosen one does not exist.
    """
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise UnsupportedError("tools", "tools: expected different names.")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise UnsupportedError("tool_choice", f"tool_choice: no tool is named {choice.function.name!r}.")
        return "required", [tools[names.index(choice.function.name)].as_tool()]
    found: Choice = "required" if choice == "required" else "none" if choice == "none" else "auto"
    return found, [tool.as_tool() for tool in tools]


def calling_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the arguments of calls as objects, as most templates read them.

    Args:
        messages: of a chat.

    Raises:
        UnsupportedError: a call is malformed, or a result belongs to none of the last calls.
    """
    checked, issued = [], set[str]()
    for index, message in enumerate(messages):
        role, calls = message.get("role"), message.get("tool_calls")
        where = f"messages[{index}]"
        if role == "assistant":
            given = calls or []
            if not isinstance(given, list) or len(given) > 2 * MAX_TOOLS:
                raise UnsupportedError("messages", f"{where}.tool_calls: expected a list.")
            read = [_read_call(call, f"{where}.tool_calls") for call in given]
            issued = {call["id"] for call in read if "id" in call}
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message |= {"tool_calls": read} if read else {}
        elif role == "tool" and str(message.get("tool_call_id")) not in issued:
            raise UnsupportedError(
                "messages", f"{where}.tool_call_id: expected the id of a call in the last assistant message."
            )
        checked.append(message)
    return checked


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """Return a call of an earlier answer, with its arguments parsed if they are JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnsupportedError("messages", f"{where}: expected a function with a name.")
    if not isinstance(call.get("id", ""), str):
        raise UnsupportedError("messages", f"{where}: expected an id that is text.")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # cut short, say: the template still shows it
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}
