"""Decoding tokens into the text that is safe to show."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from longscan.inference.sampling import Finish
from longscan.tokenizers.base import StreamDecoder, Tokenizer

__all__ = ["CONTEXT", "TextWriter"]

CONTEXT = 8  # tokens of a prompt that may affect the text of the first new one


class TextWriter:
    """Decodes the tokens of a row into text, which ends before a stop string.

    A possible start of a stop string is held back, so that no text has to be retracted.

    Args:
        tokenizer: decodes the tokens; without one there is no text.
        prompt: the ids before the first new one.
        stop: strings that end the text.
        shown: special tokens that are shown, and how; others give no text.

    Attributes:
        settled: tokens that the text so far includes, if only in part, and those before them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: tuple[str, ...],
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._stop, self._held, self._shown = stop, "", shown
        self.settled = self._decoded = self._released = 0  # tokens; characters
        self._begins: deque[int] = deque()  # where the text of each token begins that is not settled
        self._stream = tokenizer.stream() if tokenizer else None
        if self._stream:
            for token in prompt[-CONTEXT:]:
                self._stream.push(token)  # in some vocabularies a space depends on the token before it

    @property
    def holds(self) -> bool:
        """Whether a possible start of a stop string is held back."""
        return bool(self._held)

    def push(self, token: int, *, is_eos: bool, is_last: bool) -> tuple[str, Finish | None]:
        """Return the new text after a token, and why the row ends here, or None.

        Args:
            token: its id.
            is_eos: whether it is an end-of-text token, which has no text.
            is_last: whether it is the last token allowed.
        """
        text, decoded = "", self._decoded
        if self._stream:
            text = "" if is_eos else self._text(token, self._stream)
            text += self._stream.flush() if is_eos or is_last else ""
        self._decoded += len(text)
        text, stopped = self._release(self._held + text)
        ended = (is_eos or is_last) and not stopped
        if ended:
            text += self._held
        self._settle(decoded, text, everything=ended or not self._stop)
        return text, "stop" if stopped else None if not ended else "eos" if is_eos else "length"

    def _settle(self, begin: int, text: str, *, everything: bool) -> None:
        """Count the tokens that released text includes; the text of the newest token begins at `begin`."""
        self._begins.append(begin)
        self._released += len(text)
        while self._begins and (everything or self._begins[0] < self._released):
            self._begins.popleft()
            self.settled += 1

    def _text(self, token: int, stream: StreamDecoder) -> str:
        """Return the text that a token completes."""
        shown = self._shown.get(token)
        return stream.push(token) if shown is None else stream.flush() + shown

    def _release(self, text: str) -> tuple[str, bool]:
        """Return the text before the first stop string; without one, hold back a possible start of one."""
        # the first to be complete counts, so the result does not depend on how the text is split
        complete = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if complete:
            return text[: min(complete)[1]], True
        started = [n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        cut = len(text) - max(started, default=0)
        self._held = text[cut:]
        return text[:cut], False
