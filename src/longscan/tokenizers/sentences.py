"""Texts cut into sentences, for tasks that need pairs of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from longscan.core.checks import check_texts
from longscan.tokenizers.base import StreamDecoder, Tokenizer
from longscan.tokenizers.wordpiece import WordPieceTokenizer

__all__ = ["SentenceTokenizer", "split_sentences"]


# where a sentence ends: a mark, closing quotes, space, no small letter; a mark of Chinese; the end of a line
END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?…]+[\"'”’)\]]*\s+(?![a-z])|[。！？]+[”’」』）]*|\n+"
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, stripped, by a simple rule; lines end sentences too.

    Args:
        text: any.
    """
    ends = [match.end() for match in END.finditer(text)]
    pieces = [text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece]


class SentenceTokenizer(Tokenizer):
    """Writes files of tokens in which [SEP] closes each sentence and [CLS] each document.

    Args:
        wordpiece: turns sentences into ids.
    """

    def __init__(self, wordpiece: WordPieceTokenizer) -> None:
        self._wordpiece = wordpiece
        self.vocab_size, self.eos_id = wordpiece.vocab_size, wordpiece.cls_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode the sentences of each text, each closed by [SEP]; those without a word are left out."""
        check_texts("texts", texts)
        sentences = [split_sentences(text) for text in texts]
        encoded = iter(self._wordpiece.encode_batch([one for text in sentences for one in text]))
        ids = [[next(encoded) for _ in text] for text in sentences]
        return [[token for one in text if one for token in (*one, self._wordpiece.sep_id)] for text in ids]

    def stream(self) -> StreamDecoder:
        """Return a decoder; see `Tokenizer.stream`."""
        return self._wordpiece.stream()

    def save(self, directory: str | Path) -> None:
        """Write the vocabulary's files; see `Tokenizer.save`."""
        self._wordpiece.save(directory)

    @property
    def fingerprint(self) -> str:
        """A short hash; see `Tokenizer.fingerprint`."""
        return f"sentences-1 {self._wordpiece.fingerprint}"
