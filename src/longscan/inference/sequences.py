"""Class probabilities or values of whole sequences, at any sampling rate."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longscan.data.labeled_sequences import Sequences
from longscan.errors import LongscanError
from longscan.models.sequence_classifier import SequenceModel

__all__ = ["answers", "to_rate"]


@torch.inference_mode()
def answers(model: SequenceModel, data: Sequences, rows: int = 32) -> Tensor:
    """Return the predictions for sequences.

    Args:
        model: in any mode, which does not change.
        data: the sequences.
        rows: batch size.

    Returns:
        (n, n_outputs): log p of the classes, or the predicted values.
    """
    training = model.training
    model.eval()
    predictions = torch.empty(len(data), model.config.n_outputs, dtype=torch.float32)
    order = np.argsort(data.lengths, kind="stable").tolist()  # batches of similar lengths need little padding
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        x, lengths, _, times = data.batch(numbers)
        times = None if times is None else times.to(model.device)
        outputs = model(x.to(model.device), lengths.to(model.device), times).float().cpu()
        predictions[numbers] = outputs.log_softmax(-1) if model.config.labels else outputs
    model.train(training)
    return predictions


def to_rate(model: SequenceModel, rate: float | None) -> None:
    """Adapt a model to signals of another sampling rate, by rescaling its time steps.

    Args:
        model: modified in place, unless the rates are equal or one is unknown.
        rate: samples per second.

    Raises:
        LongscanError: its blocks have no time steps.
    """
    trained = model.config.rate
    if rate and trained and rate != trained:
        try:
            model.rescale_time(trained / rate)
        except LongscanError as error:
            raise LongscanError(
                f"the signals have {rate:g} samples per second, the model was trained on {trained:g}: {error}"
            ) from error
