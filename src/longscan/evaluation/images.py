"""Top-1 and top-5 accuracy, losses and confusions of classifiers of images or clips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.data.labelled import Labelled
from longscan.errors import LongscanError
from longscan.evaluation.classification import Scores, score
from longscan.inference.images import classify_images
from longscan.models.common.vision import VisionModel

__all__ = ["TOP", "ImageScores", "match_labels", "measure_images"]

TOP = 5
L = TypeVar("L", bound=Labelled[Any])


class ImageScores(NamedTuple):
    """How well images were classified.

    Attributes:
        loss: mean cross-entropy in nats.
        top1: fraction whose most likely class is the true one.
        top5: fraction whose true class is among the five most likely.
        scores: precision, recall and F1 of each class.
        confusion: (n_classes, n_classes) number of images by true and predicted class.
    """

    loss: float
    top1: float
    top5: float
    scores: Scores
    confusion: Tensor


def match_labels(data: L, model: VisionModel) -> L:
    """Return images or clips with the class indices of a model.

    Args:
        data: with labels in any order.
        model: with names of its classes, or else as many classes as the data, in order of their names.

    Raises:
        LongscanError: a label was not in the training data, or the numbers of classes differ.
    """
    if model.config.labels:
        return data.labelled(model.config.labels)
    if len(data.labels) != model.config.n_classes:
        raise LongscanError(
            f"{data.name(0)}: the model has {model.config.n_classes} classes without names, "
            f"expected as many in the data, got {len(data.labels)}."
        )
    return data


def measure_images(
    model: VisionModel,
    data: Labelled[Any],
    batch_size: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> ImageScores | None:
    """Return the scores of a model on labelled images, or clips.

    Args:
        model: in any mode, which does not change.
        data: at least one, with the class indices of the model.
        batch_size: images or clips per forward pass; see `classify_images`.
        stopped: asked after each batch, whether to stop.

    Returns:
        The scores; None if it was stopped.

    Raises:
        LongscanError: an image can't be decoded.
    """
    batches = []
    openers = (partial(data.item, number) for number in range(len(data)))
    for batch in classify_images(model, openers, batch_size):
        batches.append(batch)
        if stopped():
            return None
    predictions, truth = torch.cat(batches), torch.from_numpy(data.truth)
    order = predictions.topk(min(TOP, predictions.shape[1]), dim=1).indices
    right = order == truth[:, None]
    n_classes = predictions.shape[1]
    return ImageScores(
        loss=F.nll_loss(predictions, truth).item(),
        top1=right[:, 0].float().mean().item(),
        top5=right.any(1).float().mean().item(),
        scores=score(truth.tolist(), order[:, 0].tolist()),
        confusion=torch.bincount(truth * n_classes + order[:, 0], minlength=n_classes**2).view(n_classes, -1),
    )
