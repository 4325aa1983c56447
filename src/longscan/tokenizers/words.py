"""Tokens as a figure shows them: grouped into words, or each for itself."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longscan.tokenizers.base import Tokenizer

__all__ = ["Grouping", "group", "visible"]

START, END = "<s>", "</s>"
SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
PART = "·"  # a part of a character, or a character without a shape
CJK = "\u2e80"  # from here on scripts are written without spaces: a token is a word by itself


class Grouping(NamedTuple):
    """Words, and which word each token belongs to; the end of the sentence is the last word."""

    words: list[str]
    word_of: list[int]

    def read(self) -> Grouping:
        """Return the decoder's input words when it predicts each of these: shifted by one position."""
        return Grouping([START, *self.words[:-1]], [0, *(word + 1 for word in self.word_of[:-1])])

    def matrix(self, *, mean: bool) -> Tensor:
        """Return the matrix that maps values of tokens to values of words.

        Args:
            mean: whether a word gets the mean of its tokens, or their sum.

        Returns:
            (n_words, n_tokens) float32.
        """
        matrix = torch.zeros(len(self.words), len(self.word_of))
        matrix[self.word_of, range(len(self.word_of))] = 1.0
        return matrix / matrix.sum(1, keepdim=True) if mean else matrix


def group(tokenizer: Tokenizer, ids: Sequence[int], pieces: bool = False) -> Grouping:
    """Return the words of a sentence.

    Args:
        tokenizer: that made the ids.
        ids: of a sentence, without special ones; its end is added.
        pieces: whether to take each token as a word.

    Returns:
        The words. Tokens that are parts of one character stay together at any rate.
    """
    words, word_of, stream, whole = list[str](), list[int](), tokenizer.stream(), True
    for token in ids:
        text = stream.push(token)
        before = words[-1][-1:] if words else ""
        inside = text[:1].isalnum() and text[0] < CJK and before.isalnum() and before < CJK
        joins = words and (not whole or (not pieces and (inside or not words[-1])))  # to a lonely space, too
        if not joins:
            words.append("")
        words[-1] += text.strip()
        word_of.append(len(words) - 1)
        whole = bool(text)
    if words:
        words[-1] += stream.flush()
    return Grouping([*words, END], [*word_of, len(words)])


def visible(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, with a sign for each character that could not be seen.

    A line break is ↵, a tab ⇥, any other control character a middle dot; spaces stay. A token that ends
    inside a character is a middle dot, and the one that completes it has the character. A special token is
    its id after #.

    Args:
        tokenizer: that made the ids.
        ids: of a text.
    """
    stream = tokenizer.stream()
    return [
        _signs(stream.push(token)) or (PART if tokenizer.decode([token]) else f"#{token}") for token in ids
    ]


def _signs(text: str) -> str:
    """Return a text with signs for what has no shape."""
    hidden = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return "".join(
        SIGNS.get(letter, PART if letter == "\ufffd" or unicodedata.category(letter) in hidden else letter)
        for letter in text
    )
