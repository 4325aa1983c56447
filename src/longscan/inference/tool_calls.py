"""Calls of tools in what a model writes: their formats, the grammar that makes them valid, and their reader.

Nothing is called here. A format is known by the marker that a chat template shows to the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from longscan.errors import UsageError
from longscan.inference.json_schema import GrammarError, json_rule

__all__ = ["FORMATS", "CallFormat", "CallReader", "Choice", "Part", "Tool", "call_grammar", "find_format"]

MAX_CALLS = 16  # of one answer
MAX_BYTES = 128 << 10  # of the parameters of all tools

Choice: TypeAlias = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: JSON objects with `name` and `arguments`, each marked, or as one list.

    Attributes:
        opening: before a call, or the list of them.
        closing: after it; nothing if the text ends there.
        listed: whether calls stand in a list.
    """

    opening: str
    closing: str
    listed: bool = False


#: name -> format
FORMATS = {
    "hermes": CallFormat("<tool_call>", "</tool_call>"),  # also Qwen, Falcon-H1, Granite 4
    "granite": CallFormat("<|tool_call|>", "", listed=True),  # Granite 3
    "nemotron": CallFormat("<TOOLCALL>", "</TOOLCALL>", listed=True),
    "jamba": CallFormat("<tool_calls>", "</tool_calls>", listed=True),
}
FOREIGN = ("<function=", "<arg_key>")  # of formats that are not JSON, and use the same markers


@dataclass(frozen=True)
class Tool:
    """What a model may call.

    Attributes:
        name: of letters, digits, _ and -.
        parameters: JSON Schema of its arguments, an object.
    """

    name: str
    parameters: Mapping[str, Any]


def find_format(template: str) -> CallFormat:
    """Return the format of calls that a chat template describes.

    Args:
        template: Jinja.

    Raises:
        UsageError: it describes none, or one that is not known here.
    """
    known = [one for one in FORMATS.values() if one.opening in template]
    if not known or "tools" not in template:
        markers = ", ".join(one.opening for one in FORMATS.values())
        raise UsageError(
            f"this model's chat template knows no tools: expected one with `tools` and one of {markers}. "
            "Give another one with --template."
        )
    if foreign := [marker for marker in FOREIGN if marker in template]:
        raise UsageError(f"this model's chat template writes calls with {foreign[0]}, not as JSON.")
    return known[0]


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    choice: Choice,
    *,
    parallel: bool = True,
    answer: str | None = None,
    markers: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Return a grammar in Lark of answers that may, must or must not call tools.

    Args:
        form: how calls are written.
        tools: that may be called.
        choice: "auto" allows text and then calls, "required" only calls, "none" only text.
        parallel: whether there may be several calls.
        answer: the rule of an answer without calls; any text if None.
        markers: of the format, those that are tokens by themselves: see `Grammars.marker`.

    Raises:
        GrammarError: the parameters of a tool are no schema of an object, or too large; or no tool is given.
    """
    if choice == "none":
        spelled = re.escape(form.opening)
        return f"start: {answer or 'TEXT'}\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{spelled}(.|\\n)*/"
    if not tools:
        raise GrammarError("tools: expected at least one that may be called.")
    rules = [_call_rule(tool) for tool in tools]
    if sum(map(len, rules)) > MAX_BYTES:
        raise GrammarError(f"tools: expected parameters of at most {MAX_BYTES:,} bytes together.")
    token = markers.get(form.opening)
    text = "TEXT" if token is None else f"TEXT | TEXT <[{token}]> calls"
    start = {
        "required": "opening calls",
        "auto": f"opening calls | {answer}" if answer else f"begun calls | {text}",
    }[choice]
    another = '", " call' if form.listed else '"\\n" opening body'
    more = f"({another}){{0,{MAX_CALLS - 1}}}" if parallel else ""
    lines = [
        f"start: {start}",
        "TEXT: /(.|\\n)*/",
        f"begun[lazy]: TEXT {json.dumps(form.opening)}",
        f"opening: {_marker(form.opening, markers)}",
        f"closing: {_marker(form.closing, markers)}",
        f'calls: "[" call {more} "]" closing' if form.listed else f"calls: body {more}",
        'body: "\\n" call "\\n" closing',
        f"call: {' | '.join(f'call_{i}' for i in range(len(rules)))}",
        *(f"call_{i}: {rule}" for i, rule in enumerate(rules)),
    ]
    return "\n".join(lines)


def _marker(text: str, markers: Mapping[str, int]) -> str:
    """Return a marker as a rule: its token, or its letters."""
    return json.dumps(text) + (f" | <[{markers[text]}]>" if text in markers else "")


def _call_rule(tool: Tool) -> str:
    """Return the rule of a call."""
    if tool.parameters.get("type", "object") != "object":
        raise GrammarError(f"the parameters of {tool.name}: expected a JSON schema of an object.")
    head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
    try:
        return f'{head} {json_rule({"type": "object", **tool.parameters})} "}}"'
    except GrammarError as error:
        raise GrammarError(f"the parameters of {tool.name}: {error}") from error


class Part(NamedTuple):
    """The next part of an answer: text, or of a call.

    Attributes:
        text: of the answer, or of the arguments of a call.
        call: the number of the call, from 0; None for text.
        name: what is called, in the first part of a call.
    """

    text: str
    call: int | None = None
    name: str | None = None


HEAD = r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
MAX_HEAD = 1000  # characters of what may become a call


class CallReader:
    """Splits what a model writes into text and calls, as it comes.

    What begins like a call and is none comes back as text. White space around calls is dropped.

    Args:
        form: how calls are written.
        names: of the tools.

    Attributes:
        calls: the number of calls so far.
    """

    def __init__(self, form: CallFormat, names: Iterable[str]) -> None:
        closing = re.escape(form.closing)
        self._form, self._names = form, frozenset(names)
        self._first = re.compile((r"\s*\[" if form.listed else "") + HEAD)
        self._later = re.compile(r"\s*," + HEAD)
        self._end = re.compile((r"\s*\}\s*\]\s*" if form.listed else r"\s*\}\s*") + closing)
        self._held = ""  # read, and not decided yet
        self._next: Callable[[], Part | None] = self._text
        self._depth, self._quoted, self._escaped = 0, False, False  # inside the arguments
        self._listing = False  # whether another call of a list follows
        self.calls = 0

    @property
    def complete(self) -> bool:
        """Whether no call is cut."""
        return not self._depth and self._next not in (self._head, self._arguments)

    def push(self, text: str) -> Iterator[Part]:
        """Yield the parts that more text completes.

        Args:
            text: what follows.
        """
        self._held += text
        while (part := self._next()) is not None:
            if part.text or part.name:
                yield part

    def close(self) -> Iterator[Part]:
        """Yield what is left at the end."""
        if self._next == self._head:  # cut short
            if not self.calls:
                yield Part(self._form.opening + self._held)
        elif self._next == self._text and self._held:
            # behind a call, the beginning of the next one is no text
            yield Part("" if self.calls and self._form.opening.startswith(self._held.strip()) else self._held)
        self._held = ""

    def _text(self) -> Part | None:
        """Read text up to the next marker; each of these methods returns None if it needs more."""
        text, marker, rest = self._held.partition(self._form.opening)
        if marker:
            self._held, self._next = rest, self._head
            return Part(text.rstrip())
        opening = self._form.opening
        begun = next((n for n in range(len(opening) - 1, 0, -1) if text.endswith(opening[:n])), 0)
        text = text[: len(text) - begun].rstrip()
        self._held = self._held[len(text) :]
        return Part(text) if text else None

    def _head(self) -> Part | None:
        """Read a call up to its arguments."""
        found = (self._later if self._listing else self._first).match(self._held)
        if found and found[1] in self._names:
            self._held, self._next = self._held[found.end() :], self._arguments
            self._listing, self.calls = False, self.calls + 1
            return Part("", self.calls - 1, found[1])
        closed = self._form.closing and self._form.closing in self._held
        if not (found or closed or len(self._held) > MAX_HEAD):
            return None
        self._next, self._listing = self._text, False
        return Part(self._form.opening)

    def _arguments(self) -> Part | None:
        """Read a part of the arguments, at most up to their end."""
        n = 0
        for n, char in enumerate(self._held, 1):  # noqa: B007
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self._next = self._tail
                    break
        part, self._held = self._held[:n], self._held[n:]
        return Part(part, self.calls - 1) if part else None

    def _tail(self) -> Part | None:
        """Read what follows the arguments."""
        if self._form.listed and (more := re.match(r"\s*\}(?=\s*,)", self._held)):
            self._held, self._next, self._listing = self._held[more.end() :], self._head, True
            return Part("")
        if found := self._end.match(self._held):
            self._held, self._next = self._held[found.end() :], self._text
            return Part("")
        if len(self._held.strip()) <= len(self._form.closing) + 8:
            return None
        self._next = self._text  # not as the format has it
        return Part("")
