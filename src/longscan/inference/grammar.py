"""Constrained decoding: texts that follow a JSON schema, a regular expression or a grammar.

Before each token llguidance computes which ids may follow, from the bytes of all tokens; the sampler sees no
others. A special token may stand only where a grammar names it, and an end-of-text token only where the text
is complete, so what ends by itself follows the grammar. If nothing may follow, the text ends with an error.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longscan.core.optional import require
from longscan.core.worker_process import WorkerProcess
from longscan.errors import LongscanError
from longscan.inference.json_schema import GrammarError, check_regex, json_rule
from longscan.inference.sampling import Constraint
from longscan.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    import llguidance

__all__ = ["GrammarConstraint", "GrammarError", "Grammars"]

CACHED = 32  # compiled grammars
WORKER = Path(__file__).with_name("grammar_worker.py")  # a script: importing it would import llguidance
SECONDS = 30.0  # that it may take on a busy machine; of the processor's time it has one
LIMITS = {  # of a grammar
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Grammars:
    """Compiles grammars for one tokenizer, and remembers the most recent ones. Threads may share it.

    Each method returns what a `Request` takes as `constraint`, with `ends` as its `eos_id`.

    Args:
        tokenizer: of the model; one with a tokenizer.json.
        ends: the tokens that end a text; None for the tokenizer's.

    Raises:
        LongscanError: llguidance is not installed, or it does not know the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int] | None = None) -> None:
        self.ends = tuple(tokenizer.eos_ids if ends is None else ends)
        self._library = require("llguidance", "grammars")
        self._special = sorted(tokenizer.special_tokens.values())
        try:
            self._tokenizer = self._library.LLTokenizer(tokenizer.to_json(), eos_token=tokenizer.eos_id)
        except (ValueError, RuntimeError) as error:
            raise LongscanError(
                f"grammars: this tokenizer is none that llguidance knows: {error}."
            ) from error
        self._described = {"tokenizer": tokenizer.to_json(), "eos_id": tokenizer.eos_id}
        self._worker: WorkerProcess | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any]) -> Callable[[], Constraint]:
        """Return the constraint of JSON that a schema describes.

        It has no white space, or that of Python's `json`; properties come in the order of the schema.

        Args:
            schema: JSON Schema 2020-12 without keywords that a grammar cannot express.

        Raises:
            GrammarError: the schema is wrong, too large, or has such a keyword, which the message names.
        """
        return self.lark(f"start: {json_rule(schema)}")

    def json_object(self) -> Callable[[], Constraint]:
        """Return the constraint of any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Callable[[], Constraint]:
        """Return the constraint of texts that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's regex: no look-around, no back-references.

        Raises:
            GrammarError: it is wrong or too long.
        """
        return self.lark(f"start: {self.regex_rule(pattern)}")

    def marker(self, text: str) -> int | None:
        """Return the token that a grammar must name as such, <[id]>, for it to stand for a text; or None.

        Args:
            text: such as <tool_call>.
        """
        ids: list[int] = self._tokenizer.tokenize_str(text, parse_special=True)
        return ids[0] if len(ids) == 1 and self._tokenizer.is_special_token(ids[0]) else None

    def regex_rule(self, pattern: str) -> str:
        """Return a regular expression as a rule of a Lark grammar, after a check.

        Args:
            pattern: see `regex`.

        Raises:
            GrammarError: it is too long.
        """
        check_regex(pattern)
        return f"/{self._library.regex_to_lark(pattern, '')}/"

    def lark(self, source: str, tokens: Sequence[int] = ()) -> Callable[[], Constraint]:
        """Return the constraint of a grammar.

        Args:
            source: in llguidance's variant of Lark.
            tokens: the special tokens that it names.

        Raises:
            GrammarError: it is wrong or too large, or no text follows it.
        """
        return self._compile(self._library.LLMatcher.grammar_from_lark(source), tokens)

    def _compile(self, grammar: str, tokens: Sequence[int] = ()) -> Callable[[], Constraint]:
        """Return the constraint of a grammar of llguidance's."""
        special = np.array([token for token in self._special if token not in tokens], np.int64)

        def compiled() -> llguidance.LLMatcher:
            limits = self._library.LLParserLimits(**LIMITS)
            matcher: llguidance.LLMatcher = self._library.LLMatcher(
                self._tokenizer, grammar, log_level=0, limits=limits
            )
            return matcher

        with self._lock:
            matcher = self._compiled.pop(grammar, None)
            if matcher is None:
                self._try(grammar)
            if matcher is None or _fails(matcher.deep_copy()):  # see `_renew`
                matcher = compiled()
            if matcher.is_error():
                raise GrammarError(_reason(matcher.get_error()))
            constraint = partial(GrammarConstraint, matcher, compiled, self.ends, special)
            constraint().allowed()  # or no text follows it
            self._compiled[grammar] = matcher
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return constraint

    def _try(self, grammar: str) -> None:
        """Compile a grammar in another process first, which it may crash, or fill the memory of."""
        if self._worker is None or not self._worker.running:
            self._worker = WorkerProcess(str(WORKER), SECONDS)
            if self._worker.ask(self._described) is None:
                raise LongscanError("grammars: the process that compiles them does not start.")
        fault = self._worker.ask({"grammar": grammar, "limits": LIMITS})
        if fault is None:
            raise GrammarError("the grammar: compiling it takes too long, or too much memory. Simplify it.")
        if fault:
            raise GrammarError(_reason(fault))


class GrammarConstraint:
    """Which tokens may come next in one text that follows a grammar.

    Args:
        matcher: of the grammar, not modified.
        compiled: makes another one.
        ends: the tokens that may end the text.
        special: (n,) ids that are no text.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        compiled: Callable[[], llguidance.LLMatcher],
        ends: Sequence[int],
        special: np.ndarray,
    ) -> None:
        self._matcher, self._compiled = matcher.deep_copy(), compiled
        self._ends, self._special = list(ends), special
        self._ids: list[int] = []
        self._own = False  # whether no other text shares its automaton

    def allowed(self) -> np.ndarray:
        """Return (n,) bool, which ids may be next.

        Raises:
            GrammarError: none may.
        """
        words = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._renew()
            words = self._matcher.compute_bitmask()
            if self._matcher.is_error():
                raise GrammarError(_reason(self._matcher.get_error()))
        allowed = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little").view(np.bool_)
        allowed[self._special] = False
        allowed[self._ends] = self._matcher.is_accepting()
        if not allowed.any():
            raise GrammarError("the grammar: no token may follow here. Does any text follow it?")
        return allowed

    def accept(self, token: int) -> None:
        """Take notice of the next token.

        Args:
            token: its id.

        Raises:
            GrammarError: it may not follow.
        """
        if token in self._ends:
            return  # `allowed` has it only where the text is complete
        self._ids.append(token)
        if not self._matcher.consume_token(token):
            self._renew()

    def _renew(self) -> None:
        """Continue with an automaton of its own.

        Copies share one, whose states are limited. Others may have used them up; that must not end this text.
        """
        if self._own:
            raise GrammarError(_reason(self._matcher.get_error()))
        self._matcher, self._own = self._compiled(), True
        if not self._matcher.consume_tokens(self._ids):
            raise GrammarError(_reason(self._matcher.get_error()))


def _fails(matcher: llguidance.LLMatcher) -> bool:
    """Whether a copy of a matcher is of no more use."""
    matcher.compute_bitmask()
    return bool(matcher.is_error())


def _reason(error: str) -> str:
    """Return what llguidance says in one line, without positions in grammars that users do not see."""
    if "NoExtension" in error:
        return "the grammar: no text follows it."
    lines = [line for line in error.split("<state>")[0].splitlines() if not re.match(r"\s*(\d+ )?\|", line)]
    text = re.sub(r"\^+", "", " ".join(" ".join(lines).replace("<non-verbose/>", "").split()))
    text = re.sub(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ", "", text).strip(" .")
    return f"the grammar: {text[:400] or 'it cannot be compiled'}."
