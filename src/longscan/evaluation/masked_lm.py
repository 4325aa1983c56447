"""Masked-token and next-sentence accuracy of a BERT on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from longscan.core.runtime import Signals
from longscan.models import Bert
from longscan.models.bert import PretrainingBatch
from longscan.models.common.losses import IGNORE

__all__ = ["measure"]


@torch.inference_mode()
def measure(
    model: Bert, batches: Iterable[PretrainingBatch], usual: int, signals: Signals | None = None
) -> dict[str, float] | None:
    """Measure how well a BERT does what it is pre-trained for.

    Args:
        model: in evaluation mode.
        batches: held-out pairs.
        usual: the word to guess if one knows nothing: the most frequent one of the training text.
        signals: what may interrupt it.

    Returns:
        Losses in nats, shares of right answers, and those of guessing; None if a signal came.
    """
    sums = torch.zeros(6, dtype=torch.float64)  # nats, right, guessed right of the words; of the next ones
    words = pairs = 0
    for whole in batches:
        if signals and signals.received:
            return None
        batch = PretrainingBatch(*(tensor.to(model.device) for tensor in whole))
        output = model(batch.ids, batch.types)
        chosen = batch.labels != IGNORE
        wanted = batch.labels[chosen]
        for place, logits, labels in (
            (0, model.words(output.hidden[chosen]), wanted),
            (3, model.follows(output.pooled), batch.is_random),
        ):
            sums[place] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            sums[place + 1] += (logits.argmax(-1) == labels).sum().item()
        sums[2] += (wanted == usual).sum().item()
        sums[5] += batch.is_random.sum().item()
        words, pairs = words + len(wanted), pairs + len(batch.is_random)
    word, right, guess = (sums[:3] / max(words, 1)).tolist()
    follow, told, random = (sums[3:] / max(pairs, 1)).tolist()
    return {
        "valid_loss": word + follow,
        "valid_word_loss": word,
        "valid_word_accuracy": right,
        "valid_word_baseline": guess,
        "valid_next_loss": follow,
        "valid_next_accuracy": told,
        "valid_next_baseline": max(random, 1 - random),
    }
