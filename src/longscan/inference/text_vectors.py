"""Vectors of texts from a causal model: the mean of its final hidden states over all tokens.

The last token alone would say more about what comes next than about the text, unless a model was trained for
it. The states are those that the head turns into logits, behind the final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan.errors import LongscanError
from longscan.inference.prefill import CHUNK, Ids, as_tensor
from longscan.models import LanguageModel, State

__all__ = ["fill_vectors", "shortened", "text_vectors"]


def text_vectors(model: LanguageModel, texts: Sequence[Ids]) -> Tensor:
    """Return the vectors of texts, scaled to length 1.

    Args:
        model: any causal model.
        texts: the ids of each, at least one.

    Returns:
        (n_texts, d_model) float32, whose dot products are cosine similarities.

    Raises:
        LongscanError: a text has no tokens, an id is not of the model, or the model computes no numbers.
    """
    vectors = torch.empty(len(texts), model.config.d_model)
    for _ in fill_vectors(model, texts, vectors):
        pass
    return vectors


@torch.inference_mode()
def fill_vectors(model: LanguageModel, texts: Sequence[Ids], vectors: Tensor) -> Iterator[int]:
    """Fill in the vectors of texts, and yield after each pass the number of its tokens.

    Args:
        model: any causal model.
        texts: the ids of each.
        vectors: (n_texts, d_model) float32.

    Raises:
        LongscanError: see `text_vectors`.
    """
    for ids, vector in zip(texts, vectors, strict=True):
        tokens, state = as_tensor(ids), None
        wrong = tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]
        if len(wrong) or not len(tokens):
            got = f"{int(wrong[0]):,}" if len(wrong) else "none"
            raise LongscanError(f"token ids: expected 0 to {model.config.vocab_size - 1:,}, got {got}.")
        total = torch.zeros(model.config.d_model, dtype=torch.float64)
        for begin in range(0, len(tokens), CHUNK):
            chunk = tokens[begin : begin + CHUNK]
            hidden, state = _hidden(model, chunk, state)
            total += hidden.double().sum(0).cpu()
            yield len(chunk)
        if not torch.isfinite(total).all():
            raise LongscanError("the model computed NaN or infinite states: its weights are damaged.")
        vector.copy_(F.normalize(total, dim=0))


def _hidden(model: LanguageModel, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Return the final hidden states (seq_len, d_model) of ids, and the state after them."""
    hidden, state = model.backbone(ids[None].to(model.device), state)
    return hidden[0], state


def shortened(vectors: Tensor, dimensions: int) -> Tensor:
    """Return the first numbers of vectors, scaled to length 1 again.

    Args:
        vectors: (n_texts, d_model).
        dimensions: 1 to d_model.
    """
    return F.normalize(vectors[:, :dimensions], dim=-1)
