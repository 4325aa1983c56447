"""States of conversations, found by what they hold: the second turn costs only its new tokens.

A state is stored with the rendered pieces of the conversation up to it. Pieces are compared as text, not as
ids: the ids that a model wrote are often not those that its text is encoded as.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from longscan.inference.prefill import encode
from longscan.models import LanguageModel
from longscan.models.common.state import SavedState
from longscan.tokenizers.base import Tokenizer
from longscan.tokenizers.chat import Pieces, join
from longscan.tokenizers.chat_spans import after

__all__ = ["Known", "Turns", "answered", "encode_pieces"]


class Known(NamedTuple):
    """A state, and the part of a conversation it holds.

    Attributes:
        pieces: the rendered text and special tokens.
        saved: after them.
    """

    pieces: Pieces
    saved: SavedState

    @property
    def length(self) -> int:
        """The tokens it holds."""
        return self.saved.position + len(self.saved.pending)

    @property
    def nbytes(self) -> int:
        """The size of the state in bytes."""
        return self.saved.state.used().nbytes


class Turns:
    """States of conversations; the least recently used make way. Threads may share it.

    Args:
        model: of the states.
        max_bytes: of all states together.
        least: so many stay, whatever their size.
    """

    def __init__(self, model: LanguageModel, max_bytes: int, least: int = 0) -> None:
        self._model, self._max_bytes, self._least = model, max_bytes, least
        self._known: list[Known] = []  # the most recently used last
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """The number of states."""
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """The size of all states in bytes."""
        with self._lock:
            return sum(known.nbytes for known in self._known)

    def best(self, whole: Pieces) -> Known:
        """Return the state that holds the longest beginning of a conversation; at worst that of nothing.

        Args:
            whole: the conversation.
        """
        with self._lock:
            fitting = [known for known in self._known if after(whole, known.pieces) is not None]
            if not fitting:
                return self.nothing()
            best = max(fitting, key=lambda known: known.length)
            self._known.remove(best)
            self._known.append(best)
        return best

    def store(self, known: Known) -> None:
        """Store a state, in place of one with the same pieces.

        Args:
            known: not modified afterwards.
        """
        with self._lock:
            self._known = [one for one in self._known if one.pieces != known.pieces] + [known]
            while len(self._known) > self._least and sum(one.nbytes for one in self._known) > self._max_bytes:
                self._known.pop(0)

    def clear(self) -> None:
        """Drop all states."""
        with self._lock:
            self._known = []

    def nothing(self) -> Known:
        """Return the state before the first token."""
        return Known([], SavedState(self._model.init_state(1), 0, []))


def answered(
    tokenizer: Tokenizer, prompt: Pieces, ids: Sequence[int], text: str, saved: SavedState, ended: bool
) -> Known | None:
    """Return what a state in or after an answer holds, or None if that is not what the answer's text says.

    Args:
        tokenizer: of the model.
        prompt: what was answered.
        ids: of the answer, those that the state holds: not all if a stop string ended it.
        text: of the answer, as it was shown.
        saved: the state.
        ended: whether its last token ends the answer; then the template says what follows.
    """
    if ended:
        ids, saved = ids[:-1], saved._replace(pending=[])
    held = tokenizer.decode(ids).lstrip()  # the space before it is a matter of the tokenizer
    begin = len(text) - len(text.lstrip())
    special = set(tokenizer.special_tokens.values())
    if not held or special & set(ids) or text[begin : begin + len(held)] != held:
        return None
    return Known(join([*prompt, text[: begin + len(held)]]), saved)


def encode_pieces(tokenizer: Tokenizer, pieces: Pieces) -> np.ndarray:
    """Return the ids of pieces (n,).

    Args:
        tokenizer: of the model.
        pieces: text, and ids of special tokens.
    """
    parts = [
        np.array([piece], np.int64) if isinstance(piece, int) else encode(tokenizer, [piece], begins=False)[0]
        for piece in pieces
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])
