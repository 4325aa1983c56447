"""From what a request asks for to the constraint of its texts, compiled beside the event loop."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from longscan.errors import LongscanError
from longscan.inference.grammar import Grammars
from longscan.inference.json_schema import json_rule
from longscan.inference.sampling import Constraint
from longscan.inference.tool_calls import CallFormat, CallReader, call_grammar, find_format
from longscan.serve.bodies import ChatBody, CompletionBody
from longscan.serve.errors import ApiError, BusyError
from longscan.serve.formats import ResponseFormat, choose
from longscan.tokenizers.base import Tokenizer

__all__ = ["Constraints", "Rules"]


@dataclass(frozen=True)
class Rules:
    """What a text must follow.

    Attributes:
        constraint: on its tokens; None if all are free.
        form: of calls in it; None if there are none.
        names: of the tools that may be called.
        shown: special tokens that appear in its text: the markers of calls.
    """

    constraint: Callable[[], Constraint] | None = None
    form: CallFormat | None = None
    names: Sequence[str] = ()
    shown: dict[int, str] = field(default_factory=dict)

    def reader(self) -> CallReader | None:
        """Return what splits a text into parts; None if it has no calls."""
        return None if self.form is None else CallReader(self.form, self.names)


class Constraints:
    """Makes the rules of texts; one grammar is compiled at a time.

    Args:
        tokenizer: of the model.
        ends: the tokens that end a text that follows a grammar.
        queue: requests that may wait for it.
        deadline: seconds that they may wait.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], queue: int, deadline: float) -> None:
        self._tokenizer, self._ends, self._compiling = tokenizer, ends, asyncio.Lock()
        self._queue, self._deadline, self._waiting = queue, deadline, 0

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """The compiler; it takes a while to make, so it is made when the first request needs it."""
        return Grammars(self._tokenizer, self._ends)

    async def of(self, body: CompletionBody | ChatBody, template: str = "") -> Rules:
        """Return the rules of a request.

        Args:
            body: of it.
            template: the chat template, of a chat.

        Raises:
            ApiError: a schema, an expression or a tool is at fault, this model cannot do it, or the deadline
                has passed.
            BusyError: too many wait.
        """
        tools = isinstance(body, ChatBody) and body.tools
        if not tools and body.form is None:
            return Rules()
        if self._compiling.locked() and self._waiting >= self._queue:
            raise BusyError(2)
        self._waiting += 1
        try:
            async with asyncio.timeout(self._deadline), self._compiling:
                return await asyncio.to_thread(self._compile, body, template)
        except TimeoutError:
            message = "the deadline has passed before the grammar was compiled."
            raise ApiError(504, message, "deadline_exceeded") from None
        finally:
            self._waiting -= 1

    def _compile(self, body: CompletionBody | ChatBody, template: str) -> Rules:
        """Return the rules of a request that has some."""
        param = "response_format"
        try:
            answer = None if body.form is None else self._rule(body.form)
            if not isinstance(body, ChatBody) or not body.tools:
                return Rules(self._grammars.lark(f"start: {answer}"))
            param = "tools"
            choice, tools = choose(body.tools, body.tool_choice)
            form, parallel = find_format(template), body.parallel_tool_calls is not False
            found = {text: self._grammars.marker(text) for text in (form.opening, form.closing)}
            markers = {text: token for text, token in found.items() if token is not None}
            source = call_grammar(form, tools, choice, parallel=parallel, answer=answer, markers=markers)
            if choice == "none":
                return Rules(self._grammars.lark(source))
            constraint = self._grammars.lark(source, tuple(markers.values()))
            special = self._tokenizer.special_tokens.values()
            shown = {token: text for text, token in markers.items() if token in special}
            return Rules(constraint, form, [tool.name for tool in tools], shown)
        except LongscanError as error:
            raise ApiError(400, str(error), "invalid_value", param) from error

    def _rule(self, form: ResponseFormat) -> str:
        """Return the rule of Lark that a format stands for."""
        if form.json_schema is not None and form.type == "json_schema":
            return json_rule(form.json_schema.values)
        if form.regex is not None and form.type == "regex":
            return self._grammars.regex_rule(form.regex)
        return json_rule({"type": "object"})
