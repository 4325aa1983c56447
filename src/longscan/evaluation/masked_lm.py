"""Masked-token and next-sentence accuracy of a BERT on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from longscan.core.runtime import StopSignals
from longscan.models import Bert
from longscan.models.bert import PretrainingBatch
from longscan.models.common.losses import IGNORE

__all__ = ["measure"]


@torch.inference_mode()
def measure(
    model: Bert, batches: Iterable[PretrainingBatch], most_frequent: int, signals: StopSignals | None = None
) -> dict[str, float] | None:
    """Return the metrics of a BERT's pre-training tasks.

    Args:
        model: in evaluation mode.
        batches: held-out pairs.
        most_frequent: the most frequent token of the training text, the prediction of the baseline.
        signals: checked after every batch.

    Returns:
        Losses in nats, accuracies, and those of the majority baselines; None if a signal arrived.
    """
    sums = torch.zeros(
        6, dtype=torch.float64
    )  # nats, correct, correct by the baseline: tokens; next sentences
    tokens = pairs = 0
    for whole in batches:
        if signals and signals.received:
            return None
        batch = PretrainingBatch(*(tensor.to(model.device) for tensor in whole))
        output = model(batch.ids, batch.types)
        masked = batch.labels != IGNORE
        targets = batch.labels[masked]
        for first, logits, labels in (
            (0, model.mlm_logits(output.hidden[masked]), targets),
            (3, model.nsp_logits(output.pooled), batch.is_random),
        ):
            sums[first] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            sums[first + 1] += (logits.argmax(-1) == labels).sum().item()
        sums[2] += (targets == most_frequent).sum().item()
        sums[5] += batch.is_random.sum().item()
        tokens, pairs = tokens + len(targets), pairs + len(batch.is_random)
    token_loss, token_accuracy, baseline = (sums[:3] / max(tokens, 1)).tolist()
    next_loss, next_accuracy, random = (sums[3:] / max(pairs, 1)).tolist()
    return {
        "valid_loss": token_loss + next_loss,
        "valid_word_loss": token_loss,
        "valid_word_accuracy": token_accuracy,
        "valid_word_baseline": baseline,
        "valid_next_loss": next_loss,
        "valid_next_accuracy": next_accuracy,
        "valid_next_baseline": max(random, 1 - random),
    }
