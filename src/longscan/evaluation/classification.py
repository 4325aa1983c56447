"""Accuracy, macro-F1 and losses of classifiers, and a TF-IDF baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from longscan.core.optional import require
from longscan.data.labeled_sequences import Sequences
from longscan.data.labeled_texts import (
    Example,
    number_labels,
    read_whole,
)
from longscan.data.synthetic import IGNORED, Examples
from longscan.inference.sequences import answers
from longscan.models import LanguageModel
from longscan.models.sequence_classifier import SequenceModel

__all__ = ["Scores", "accuracy", "measure", "score", "tfidf"]


def tfidf(train: Sequence[Example], test: Sequence[Example], labels: Sequence[str]) -> list[int]:
    """Return the predictions of the classical baseline: TF-IDF of words and bigrams, and logistic regression.

    Args:
        train: the training examples; 5-fold cross-validation chooses the regularisation.
        test: the examples to classify.
        labels: the classes.

    Returns:
        The indices of the classes.

    Raises:
        LongscanError: scikit-learn is not installed, or a label is not among `labels`.
    """
    names = "feature_extraction.text", "linear_model", "model_selection"
    text, linear, selection = (require("scikit-learn", "baselines", f"sklearn.{name}") for name in names)
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    counts = words.fit_transform([read_whole(example) for example in train])
    search = selection.GridSearchCV(linear.LogisticRegression(max_iter=1000), {"C": [0.1, 1, 10, 100]}, cv=5)
    search.fit(counts, number_labels(train, labels))
    answers: list[int] = search.predict(words.transform([read_whole(example) for example in test])).tolist()
    return answers


def measure(model: SequenceModel, data: Sequences, rows: int = 32) -> dict[str, float]:
    """Return the metrics of a model on labelled sequences.

    Args:
        model: with the same labels.
        data: the sequences.
        rows: batch size.

    Returns:
        loss; for classes also accuracy and macro_f1, for regression the root mean squared error, rmse.
    """
    predictions, truth = answers(model, data, rows), torch.from_numpy(data.truth)
    loss = model.loss(predictions, truth).item()
    if not model.config.labels:
        return {"loss": loss, "rmse": loss**0.5}
    scores = score(data.truth.tolist(), predictions.argmax(1).tolist())
    return {"loss": loss, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


class Scores(NamedTuple):
    """How well texts were classified.

    Attributes:
        accuracy: fraction of correct predictions.
        macro_f1: mean F1 over the classes that occur among labels or predictions.
        classes: index of the class -> precision, recall, F1, and number of examples.
    """

    accuracy: float
    macro_f1: float
    classes: dict[int, tuple[float, float, float, int]]


def score(truth: Sequence[int], answers: Sequence[int]) -> Scores:
    """Return the scores of predictions.

    Args:
        truth: indices of the true classes, at least one.
        answers: indices of the predicted classes.

    Returns:
        The scores; 0 / 0 counts as 0.
    """
    right = Counter(a for a, b in zip(truth, answers, strict=True) if a == b)
    true, predicted = Counter(truth), Counter(answers)
    classes = {}
    for number in sorted({*true, *predicted}):
        precision = right[number] / predicted[number] if predicted[number] else 0.0
        recall = right[number] / true[number] if true[number] else 0.0
        f1 = 2 * right[number] / (true[number] + predicted[number])
        classes[number] = (precision, recall, f1, true[number])
    mean = sum(f1 for _, _, f1, _ in classes.values()) / len(classes)
    return Scores(right.total() / len(truth), mean, classes)


@torch.inference_mode()
def accuracy(model: LanguageModel, examples: Examples, chunk_size: int = 4096) -> float:
    """Return the accuracy of a language model on a synthetic task.

    Args:
        model: in any mode, which does not change.
        examples: sequences of any length, processed in memory that grows only with a KV cache.
        chunk_size: tokens per pass.

    Returns:
        The fraction of targets at which the most likely token is correct.
    """
    training, vocab_size = model.training, model.config.vocab_size
    model.eval()
    state, right = None, 0
    for start in range(0, examples.ids.shape[1], chunk_size):
        ids, targets = (part[:, start : start + chunk_size].to(model.device) for part in examples)
        hidden, state = model.backbone(ids, state)
        counted = targets != IGNORED
        if bool(counted.any()):
            predicted = model.head(hidden[counted])[:, :vocab_size].argmax(1)
            right += int((predicted == targets[counted]).sum())
    model.train(training)
    return right / int((examples.targets != IGNORED).sum())
