"""Translate sentences in batches, greedily or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longscan.core.checks import check_texts
from longscan.data.sentence_pairs import EOS, rows
from longscan.errors import LongscanError
from longscan.inference.beam_search import translate_ids
from longscan.models import Translator
from longscan.tokenizers.base import Tokenizer

__all__ = ["BATCH_TOKENS", "Translation", "describe", "translate"]


BATCH = 64  # sentences

BATCH_TOKENS = 4096  # per forward pass


class Translation(NamedTuple):
    """A translated sentence."""

    text: str
    score: float  # log p, divided by the length penalty


def translate(
    model: Translator,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    beam_size: int = 5,
    length_penalty: float = 0.6,
) -> list[Translation]:
    """Return the translations of sentences, each independent of the others.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        sentences: any number; an empty one gives an empty one.
        beam_size: beam width; 1 = greedy.
        length_penalty: see `translate_ids`.

    Returns:
        The translations in the order of the sentences.

    Raises:
        LongscanError: the tokenizer is not the model's, or a sentence is too long for the model.
    """
    check_texts("sentences", sentences)
    _check_tokenizer(model, tokenizer)
    translations = [Translation("", 0.0)] * len(sentences)
    encoded = tokenizer.encode_batch([sentence.strip() for sentence in sentences])
    order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: len(encoded[i]))
    limit = model.max_positions
    if order and limit is not None:
        _check_length(sentences[order[-1]], len(encoded[order[-1]]) + 1, limit)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        source = rows([encoded[i] for i in chosen], bos=False).to(model.device)
        hypotheses = translate_ids(model, source, beam_size=beam_size, length_penalty=length_penalty)
        for i, hypothesis in zip(chosen, hypotheses, strict=True):
            translations[i] = Translation(tokenizer.decode(hypothesis.ids), hypothesis.score)
    return translations


def describe(model: Translator) -> str:
    """Return the class and the size of a translator as text."""
    return f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters"


def _check_tokenizer(model: Translator, tokenizer: Tokenizer) -> None:
    """Raise unless a tokenizer is that of the model."""
    config = model.config
    ours = (tokenizer.vocab_size, tokenizer.eos_id)
    if ours != (config.vocab_size, config.eos_id) or config.eos_id != EOS:
        raise LongscanError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and ends texts with {tokenizer.eos_id}, the "
            f"model was trained with {config.vocab_size:,} and {config.eos_id}. Use its own tokenizer."
        )


def _check_length(sentence: str, length: int, limit: int) -> None:
    """Raise if a sentence is too long for the model."""
    if length > limit:
        raise LongscanError(
            f"a sentence of {length:,} tokens ({sentence[:40]!r}...) is longer than the {limit:,} positions "
            "of the model. Split it."
        )
