"""The message of a chat answer, as it grows: text and calls of tools."""

from __future__ import annotations

import secrets
import string
from typing import Any

from longscan.inference.sampling import Event
from longscan.inference.tool_calls import CallReader, Part
from longscan.serve import answers

__all__ = ["Message"]

LETTERS = string.ascii_letters + string.digits


class Message:
    """An answer so far.

    Args:
        reader: splits its text; None if it has no calls.

    Attributes:
        finish: why it ended, in OpenAI's words; None while it grows.
    """

    def __init__(self, reader: CallReader | None) -> None:
        self._reader, self._content = reader, ""
        self._calls: list[dict[str, Any]] = []
        self.finish: str | None = None

    def add(self, event: Event) -> list[dict[str, Any]]:
        """Take in a token, and return what a stream shows of it.

        Args:
            event: of the engine.
        """
        if self._reader is None:
            parts = [Part(event.text)] if event.text else []
        else:
            parts = list(self._reader.push(event.text))
            parts += self._reader.close() if event.finish else ()
        deltas = [self._delta(part) for part in parts if part.text or part.name]
        if event.finish:
            self.finish = answers.finish_reason(event.finish)
            # a stop string may end a text amid a call
            if self._calls and self.finish == "stop" and self._reader and self._reader.complete:
                self.finish = "tool_calls"
        return deltas

    def whole(self) -> dict[str, Any]:
        """Return all of it."""
        content = None if self._calls and not self._content else self._content
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        return message | ({"tool_calls": self._calls} if self._calls else {})

    def _delta(self, part: Part) -> dict[str, Any]:
        """Return the next part of a stream."""
        if part.call is None:
            self._content += part.text
            return {"content": part.text}
        if part.name is not None:
            function = {"name": part.name, "arguments": part.text}
            call = {"id": new_call(), "type": "function", "function": function}
            self._calls.append(call)
            return {"tool_calls": [{"index": part.call, **call, "function": dict(function)}]}
        self._calls[part.call]["function"]["arguments"] += part.text
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}


def new_call() -> str:
    """Return the id of a call."""
    return "call_" + "".join(secrets.choice(LETTERS) for _ in range(24))
