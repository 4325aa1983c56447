"""The cross-entropy of a language model, in chunks: the logits are the largest tensor of a training step.

It is always computed in at least float32 and over the real vocabulary: rows that pad the embedding to a round
number are left out.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from longscan import ops
from longscan.ops._autocast import exact
from longscan.ops._derivatives import composed, gradients

IGNORE = -100  # a label that is left out of the loss, as everywhere in torch


def next_tokens(labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """Return the labels aligned with the positions that predict them.

    Args:
        labels: (batch, seq_len) int64.
        seq_idx: (batch, seq_len) integers, a value per packed sequence, negative for padding.

    Returns:
        (batch, seq_len): labels[:, t + 1] at t; -100 at the end of a row, in padding, and where the next
        token is padding or of another sequence.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if seq_idx is None:
        return targets
    joined = (seq_idx[:, 1:] == seq_idx[:, :-1]) & (seq_idx[:, 1:] >= 0)
    return targets.masked_fill(~F.pad(joined, (0, 1)), IGNORE)


def count(targets: Tensor) -> Tensor:
    """Return the number of predicted positions; at least 1, so that the mean loss of none is 0.

    Args:
        targets: (...) int64.

    Returns:
        () int64.
    """
    return (targets != IGNORE).sum().clamp(min=1)


def nats(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return -log p of each target, in nats.

    Args:
        logits: (rows, padded_vocab_size).
        targets: (rows,) int64 below vocab_size, or -100.
        vocab_size: how many of the logits belong to tokens.

    Returns:
        (rows,) at least float32; 0 where the target is -100.
    """
    logits = logits[:, :vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def row_chunks(hidden: Tensor, targets: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of rows whose logits take about 16 MB of float32.

    Args:
        hidden: (..., d_model).
        targets: (...).
        vocab_size: width of the logits.

    Yields:
        (rows, d_model) of hidden and (rows,) of targets.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    rows = max(256, 2**22 // vocab_size)
    for begin in range(0, targets.shape[0], rows):
        yield hidden[begin : begin + rows], targets[begin : begin + rows]


def linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy of a linear head, in nats, without materialising all logits at once.

    Only second derivatives need them all.

    Args:
        hidden: (..., d_model).
        weight: (padded_vocab_size, d_model).
        targets: (...) int64 below vocab_size, or -100.
        vocab_size: how many rows of the weight belong to tokens.
        label_smoothing: probability mass spread over the other vocab_size - 1 tokens, as in tensor2tensor;
            Szegedy et al., 2015, spread it over all vocab_size.

    Returns:
        () at least float32; 0 if there is no target.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))  # under autocast it may be narrower
    arguments = hidden, weight, targets, vocab_size, label_smoothing
    if composed():
        return _loss_of_logits(*arguments)
    return cast(Tensor, _LinearLoss.apply(*arguments))  # type: ignore[no-untyped-call]


def _loss_of_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, smoothing: float
) -> Tensor:
    """Return the same as a composite of torch's operations, differentiable any number of times."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = []
    for h, t in row_chunks(hidden, targets, vocab_size):
        scores = F.log_softmax(ops.linear(h, weight[:vocab_size]).to(dtype), dim=-1)  # (rows, vocab_size)
        other = smoothing / (vocab_size - 1) if smoothing else 0.0
        of_target = scores.gather(1, t.masked_fill(t == IGNORE, 0)[:, None])[:, 0]
        nats_of = -(1 - smoothing - other) * of_target
        if other:
            nats_of = nats_of - other * scores.sum(1)
        losses.append(nats_of.masked_fill(t == IGNORE, 0))
    return torch.cat(losses).sum() / count(targets).to(dtype)


class _LinearLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass, while each chunk of the logits exists.

    With p = softmax(W h) and q the target distribution, one-hot or smoothed, the gradient of the logits is
    (p - q) / n_targets: known at once, so nothing of size (tokens, vocab_size) is saved for the backward pass
    and nothing is computed twice.
    """

    @staticmethod
    @exact
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, smoothing: float
    ) -> Tensor:
        used = weight[:vocab_size]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss, dhidden = hidden.new_zeros((), dtype=dtype), []
        # a frozen head, as under an adapter, needs no gradient
        dweight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        share = 1.0 / count(targets).to(dtype)
        other = smoothing / (vocab_size - 1) if smoothing else 0.0  # q of each token that is not the target
        for h, t in row_chunks(hidden, targets, vocab_size):
            share_of = (t != IGNORE)[:, None] * share  # (rows, 1) weight of each row in the mean
            index = t.masked_fill(t == IGNORE, 0)[:, None]  # (rows, 1)
            scores = F.log_softmax(ops.multiply(h, used.T).to(dtype), dim=-1)  # (rows, vocab_size)
            loss -= ((1 - smoothing - other) * scores.gather(1, index) * share_of).sum()
            if other:
                loss -= other * (scores.sum(1, keepdim=True) * share_of).sum()
            dlogits = scores.exp_()
            if other:
                dlogits -= other
            dlogits.scatter_add_(1, index, torch.full_like(share_of, smoothing + other - 1)).mul_(share_of)
            dhidden.append(ops.multiply(dlogits.to(h.dtype), used))
            if dweight is not None:
                dweight[:vocab_size] += ops.multiply(dlogits.T, h.to(dtype))
        dweight = None if dweight is None else dweight.to(weight.dtype)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(dhidden).view(hidden.shape), dweight)
        ctx.rest = vocab_size, smoothing
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden, weight, targets, dhidden, dweight = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # that is, create_graph=True

            def composite(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (_loss_of_logits(hidden, weight, targets, *ctx.rest),)

            of = gradients(composite, (hidden, weight), (dloss,))
            return of[0], of[1], None, None, None
        scaled = None if dweight is None else dweight * dloss.to(dweight.dtype)
        return dhidden * dloss.to(dhidden.dtype), scaled, None, None, None
