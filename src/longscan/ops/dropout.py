"""Dropout whose randomness costs a quarter: torch draws a number for each decision, here one serves four."""

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 2**16  # a decision is 16 bits, so p is rounded to a multiple of 1 / STEPS


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Set a random share of the numbers to zero and enlarge the others, so that the mean stays.

    Args:
        x: (...).
        p: the share, from 0 to below 1.
        training: whether to do anything at all.

    Returns:
        (...).
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
