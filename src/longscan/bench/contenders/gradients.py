"""The gradient of a sequence in chunks beside that of one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from longscan.bench.contenders import workloads
from longscan.bench.contenders.longscan import fresh
from longscan.bench.worker import Run, peak_memory, settle
from longscan.training.chunked_loss import chunked_loss

__all__ = ["gradient"]


def gradient(model: dict[str, Any], seq_len: int, chunk: int, dtype: str) -> Run:
    """Prepare the gradient of a sequence in chunks and in one pass, and the difference of the two.

    Args:
        model: see `fresh`, for the same random weights in every process.
        seq_len: tokens of the sequence.
        chunk: tokens per chunk.
        dtype: of the weights, a name in torch.
    """
    lm = fresh(model, torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    ids = workloads.random_ids(1, seq_len, model["vocab_size"])
    parameters = list(lm.parameters())

    def measured(loss: Callable[[], Tensor]) -> tuple[list[Tensor], int]:
        settle()
        grads = torch.autograd.grad(loss(), parameters)
        return list(grads), peak_memory()

    def run() -> dict[str, Any]:
        chunks, low = measured(lambda: chunked_loss(lm, ids, chunk=chunk)[0])
        whole, high = measured(lambda: cast(Tensor, lm(ids, labels=ids, return_logits=False).loss))
        largest = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(chunks, whole, strict=True) if b.any()
        )
        return {"difference": largest, "chunks_bytes": low, "whole_bytes": high}

    return run
