"""Decoding tokens into the text that is safe to show."""

from __future__ import annotations

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
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: tuple[str, ...],
        shown: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._stop, self._held, self._shown = stop, "", shown
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
        text = ""
        if self._stream:
            text = "" if is_eos else self._text(token, self._stream)
            text += self._stream.flush() if is_eos or is_last else ""
        text, stopped = self._release(self._held + text)
        if stopped:
            return text, "stop"
        if is_eos or is_last:
            return text + self._held, "eos" if is_eos else "length"
        return text, None

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
