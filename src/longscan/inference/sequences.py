"""Class probabilities or values of whole sequences, also at another sampling rate."""

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
    """Tell what sequences are.

    Args:
        model: in any mode, which it keeps.
        data: the sequences.
        rows: read at a time.

    Returns:
        (n, n_outputs): log p of the classes, or the numbers.
    """
    training = model.training
    model.eval()
    found = torch.empty(len(data), model.config.n_outputs)
    order = np.argsort(data.lengths, kind="stable").tolist()  # about equal lengths: little padding
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        x, lengths, _, times = data.batch(numbers)
        times = None if times is None else times.to(model.device)
        outputs = model(x.to(model.device), lengths.to(model.device), times).float().cpu()
        found[numbers] = outputs.log_softmax(-1) if model.config.labels else outputs
    model.train(training)
    return found


def to_rate(model: SequenceModel, rate: float | None) -> None:
    """Make a model read signals of another rate than it was trained on, by longer or shorter time steps.

    Args:
        model: changed in place, unless the rates are equal or one is unknown.
        rate: samples per second.

    Raises:
        LongscanError: its body knows no time.
    """
    trained = model.config.rate
    if rate and trained and rate != trained:
        try:
            model.rescale_time(trained / rate)
        except LongscanError as error:
            raise LongscanError(
                f"the signals have {rate:g} samples per second, the model was trained on {trained:g}: {error}"
            ) from error
