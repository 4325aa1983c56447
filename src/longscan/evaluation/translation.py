"""BLEU, chrF and perplexity of a translator on sentence pairs."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from longscan.data.sentence_pairs import IdPairs, TextPairs
from longscan.evaluation.bleu import by_length, score
from longscan.inference.translate import BATCH_TOKENS, translate
from longscan.models import Translator
from longscan.tokenizers.base import Tokenizer

__all__ = ["mean_loss", "measure"]


def measure(
    model: Translator,
    tokenizer: Tokenizer,
    pairs: TextPairs,
    beam_size: int,
    length_penalty: float,
    tokenize: str,
) -> dict[str, Any]:
    """Return the metrics of a translator on sentence pairs.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        pairs: sentences and their reference translations.
        beam_size: see `translate`.
        length_penalty: see `translate`.
        tokenize: see `bleu.score`.

    Returns:
        The scores of `bleu.score`, sentences, perplexity of the references, by_length, seconds of the
        translation, sentences_per_second, and the translations.

    Raises:
        LongscanError: as `translate`.
    """
    begin = time.perf_counter()
    results = translate(model, tokenizer, pairs.source, beam_size=beam_size, length_penalty=length_penalty)
    seconds = time.perf_counter() - begin
    hypotheses = [each.text for each in results]
    ids, _ = IdPairs.encode(pairs, tokenizer, model.max_positions or 2**31)
    return {
        "sentences": len(hypotheses),
        **score(hypotheses, pairs.target, tokenize),
        "perplexity": round(math.exp(min(mean_loss(model, ids), 700.0)), 4),
        "by_length": by_length(pairs.source, hypotheses, pairs.target, tokenize),
        "seconds": round(seconds, 3),
        "sentences_per_second": round(len(hypotheses) / seconds, 2),
        "translations": hypotheses,
    }


@torch.inference_mode()
def mean_loss(model: Translator, pairs: IdPairs, batch_tokens: int = BATCH_TOKENS) -> float:
    """Return the mean cross-entropy per target token, in nats.

    Args:
        model: in evaluation mode.
        pairs: the sentence pairs.
        batch_tokens: per forward pass.
    """
    total = 0.0
    for batch in pairs.in_order(batch_tokens):
        loss = model.loss(batch.source.to(model.device), batch.target.to(model.device))
        total += loss.item() * batch.tokens
    return total / int(pairs.target_lengths.sum())
