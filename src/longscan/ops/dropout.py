"""Dropout at a quarter of the cost of randomness: one random number makes four decisions, in torch one."""

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 2**16  # a decision is 16 bits, so p is rounded to a multiple of 1 / STEPS


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Return x (...) with random elements set to zero and the others scaled up to preserve the mean.

    Args:
        x: (...).
        p: the dropout probability, at least 0 and below 1.
        training: if False, x is returned unchanged.
    """
    if not training or not p:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = min(round(p * STEPS), STEPS - 1)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(
        -(2**63), None
    )  # all 64 bits
    decisions = draws.view(torch.int16)[: x.numel()].view(x.shape)  # from -STEPS / 2 on
    return x * (decisions >= dropped - STEPS // 2).to(x.dtype).mul_(STEPS / (STEPS - dropped))
